"""The cost of serving: requests per second and latency of closed loops of clients on loopback.

    python bench/serving.py --json bench/results/cpu-2-cores/serving.json

The server is a separate process of `python -m adavipro_fast.serve`. The upper limit is the bare
runner, called with full batches of pixels while the servers are idle. The runner, a server with
batching and one without are measured in turn. Every answer is compared with the runner's.
"""

import asyncio
import io
import json
import re
import statistics
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image

from adavipro_fast import cli, open_artifact
from adavipro_fast.artifact.artifact import Artifact
from adavipro_fast.data.images import decode
from adavipro_fast.errors import VerificationError
from adavipro_fast.export.graph import Form
from adavipro_fast.export.onnx_export import Source
from adavipro_fast.files.checkpoint import checkpoint_of
from lib.server import server
from lib.subject import CLASS_NAMES, Subject, write_sources
from lib.table import Json, publish
from lib.task_models import NAMES, PROMPT_SIZE, task_model

IMAGES = 32
# Largest difference between probabilities computed in different batches.
LARGEST_DIFFERENCE = 1e-4


@dataclass(frozen=True)
class ServingConfig:
    """Measure a server under closed loops of clients."""

    model: str = "ViT-B-32"
    """open_clip name, random weights, or demo"""
    clients: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """how many at once; repeatable (default: 1, 8, 32 and 128)"""
    send: Literal["jpeg", "pixels"] = "jpeg"
    """image files of 224 x 224 to /classify, or resized pixels by KServe"""
    precision: Literal["fp32", "int8"] = "fp32"
    """of the file"""
    tasks: int = 1
    """in the file; each request asks for the next one"""
    batch: int = 32
    """of the server, and of the bare runner"""

    def __post_init__(self) -> None:
        if self.tasks > 1 and self.send == "pixels":
            raise ValueError("several tasks are asked for by JPEG; leave --send out")

    seconds: float = 10.0
    """of each measurement"""
    rounds: int = 3
    """measurements of each row, in turn"""
    json: Json = None


@dataclass(frozen=True)
class Load:
    """Prepared requests, and the expected answers."""

    paths: list[str]
    requests: list[bytes]
    expected: list[list[float]]
    """the first list of numbers in each answer"""
    read: re.Pattern[bytes]
    """matches the numbers"""


def main() -> None:
    """Parse, measure, print."""
    cli.main(ServingConfig, command)


def command(config: ServingConfig) -> dict[str, Any]:
    """Export, serve with and without batching, and measure in turn."""
    subject = Subject(config.model, images=IMAGES, device="cpu")
    counts = config.clients or (1, 8, 32, 128)
    with tempfile.TemporaryDirectory() as place:
        path = exported(subject, config, Path(place))
        artifact = open_artifact(path, device="cpu", runtime="onnxruntime")
        load = load_of(config, subject, artifact)
        pixels = subject.sample[torch.arange(config.batch) % IMAGES]
        mixed = [str(n % config.tasks) for n in range(config.batch)] if config.tasks > 1 else None
        results: dict[str, list[dict[str, Any]]] = {"runner": []}
        with (
            server(path, "--batch", str(config.batch)) as batching,
            server(path, "--batch", "1", "--delay-ms", "0") as single,
        ):
            for _ in range(config.rounds):
                results["runner"].append(bare(artifact, pixels, mixed, config.seconds))
                for name, address in (("serve", batching), ("serve_batch_1", single)):
                    for count in counts:
                        row = measured(address, load, count, config.seconds)
                        results.setdefault(f"{name}_{count}", []).append(row)
    limit = statistics.median(row["images_per_s"] for row in results["runner"])
    rows = [{"name": name, **middle(of), "errors": errors(of)} for name, of in results.items()]
    for row in rows:
        row["of_runner"] = row["images_per_s"] / limit
    kept = ("model", "batch", "send", "precision", "tasks")
    settings = {name: getattr(config, name) for name in kept}
    title = ", ".join(f"{name} {value}" for name, value in settings.items())
    return publish(rows, torch.device("cpu"), config.json, title) | settings


def middle(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median of each figure over rounds."""
    return {
        name: statistics.median(row[name] for row in rows) for name in rows[0] if name != "errors"
    }


def errors(rows: list[dict[str, Any]]) -> int:
    """Return the number of failed requests."""
    return sum(int(row.get("errors", 0)) for row in rows)


def exported(subject: Subject, config: ServingConfig, folder: Path) -> Path:
    """Export the subject, or several tasks for its encoder, with uint8 input."""
    path, several = folder / "served.onnx", config.tasks > 1
    sources = [Source(checkpoint_of(subject.model, CLASS_NAMES), subject.model)]
    if several:
        models = [task_model(subject, PROMPT_SIZE, number) for number in range(config.tasks)]
        sources = [
            Source(checkpoint_of(model, NAMES), model, str(number))
            for number, model in enumerate(models)
        ]
    form = Form(precision=config.precision, input="uint8", tasks="baked" if several else "alone")
    write_sources(subject, sources, path, form)
    return path


def load_of(config: ServingConfig, subject: Subject, artifact: Artifact) -> Load:
    """Prepare the requests and their expected answers."""
    contents = []
    for pixels in subject.sample:
        content = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(content, "JPEG", quality=90)
        contents.append(content.getvalue())
    if config.send == "pixels":
        prediction = artifact(subject.sample)
        return Load(
            ["/v2/models/served/infer"] * len(subject.sample),
            [kserve(pixels.numpy()) for pixels in subject.sample],
            prediction.logits.tolist(),
            re.compile(rb'"logits".*?"data": ?\[([^\]]*)\]'),
        )
    transform = artifact.about.preprocess.pixels()
    decoded = [transform(decode(c, "", artifact.about.preprocess)) for c in contents]
    pixels, path = torch.from_numpy(np.stack(decoded)), "/classify?top=1"
    names = [str(number % config.tasks) for number in range(len(contents))]
    several = config.tasks > 1
    logits = artifact(pixels, names if several else None).logits
    best = artifact.about.calibration.probabilities(logits).amax(1)
    return Load(
        [f"{path}&task={name}" if several else path for name in names],
        contents,
        [[value] for value in best.tolist()],
        re.compile(rb'"probability":([^}]*)\}'),
    )


def kserve(pixels: Any) -> bytes:
    """Return a KServe request, preceded by the length of its JSON."""
    size = {"binary_data_size": pixels.size}
    tensor = {"name": "image", "shape": [1, *pixels.shape], "datatype": "UINT8", "parameters": size}
    head = json.dumps({"inputs": [tensor]}).encode()
    return b"".join([len(head).to_bytes(4, "little"), head, pixels.tobytes()])


def bare(
    artifact: Artifact, pixels: torch.Tensor, tasks: list[str] | None, seconds: float
) -> dict[str, Any]:
    """Call the runner with full batches, with the task of each image."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        artifact(pixels, tasks)
        times.append(1e3 * (time.perf_counter() - began))
    images = len(pixels)
    rate = 1e3 * images / statistics.median(times)
    p99 = float(np.percentile(times, 99))
    return {
        "images_per_s": rate,
        "p50_ms": statistics.median(times),
        "p99_ms": p99,
        "mean_batch": float(images),
        "largest_difference": 0.0,
    }


def measured(address: str, load: Load, clients: int, seconds: float) -> dict[str, Any]:
    """Run a closed loop of clients.

    Raises:
        VerificationError: an answer differs from the runner's.
    """
    before = batches(address)
    times, differences, failed, spent = asyncio.run(drive(address, load, clients, seconds))
    images, calls = (now - then for now, then in zip(batches(address), before, strict=True))
    largest = max(differences, default=0.0)
    if not largest <= LARGEST_DIFFERENCE * max(1.0, *map(abs, load.expected[0])):
        raise VerificationError(f"{address} answers other than the runner by {largest:.1e}")
    return {
        "images_per_s": len(times) / spent,
        "p50_ms": float(np.percentile(times, 50)),
        "p99_ms": float(np.percentile(times, 99)),
        "mean_batch": images / max(calls, 1),
        "largest_difference": largest,
        "errors": failed,
    }


def batches(address: str) -> tuple[float, float]:
    """Read the numbers of images and batches from the server's metrics."""
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        text = answer.read().decode()
    found = [re.findall(rf"adavipro_batch_images_{kind} (\S+)", text) for kind in ("sum", "count")]
    return float(found[0][0]), float(found[1][0])


async def drive(
    address: str, load: Load, clients: int, seconds: float
) -> tuple[list[float], list[float], int, float]:
    """Let clients send requests in a loop; return times (ms), differences, errors, seconds."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    times: list[float] = []
    differences: list[float] = []
    failed, began = 0, time.perf_counter()

    async def client(number: int) -> None:
        nonlocal failed
        reader, writer = await asyncio.open_connection(host, int(port))
        turn = number
        while time.perf_counter() - began < seconds:
            at = turn % len(load.requests)
            sent = time.perf_counter()
            writer.write(framed(load.paths[at], load.requests[at]))
            status, body = await answered(reader)
            times.append(1e3 * (time.perf_counter() - sent))
            if status != 200:
                failed += 1
            else:
                found = load.read.search(body)
                got = json.loads(b"[" + found[1] + b"]") if found else [float("inf")]
                right = load.expected[at]
                pairs = zip(got, right, strict=True)
                differences.append(max(abs(a - b) for a, b in pairs))
            turn += clients
        writer.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    return times, differences, failed, time.perf_counter() - began


def framed(path: str, content: bytes) -> bytes:
    """Return an HTTP request."""
    extra = ""
    if path.startswith("/v2"):
        extra = f"Inference-Header-Content-Length: {int.from_bytes(content[:4], 'little')}\r\n"
        content = content[4:]
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\n{extra}Content-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


async def answered(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Read an HTTP response."""
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    found = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    return status, await reader.readexactly(int(found[1]) if found else 0)


if __name__ == "__main__":
    main()
