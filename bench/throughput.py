"""Images per second by batch size, encoder, runtime and over time, and of the data loader.

    python bench/throughput.py --model ViT-B-32 --model ViT-B-16 --json FILE

Every point times the folded ONNX graph in turn with the same encoder without a prompt. The first
model is measured at all batch sizes, to find where throughput saturates; at that size, it is also
measured in int8 and in OpenVINO. The other models have one batch size and show how the prompt's
share falls as encoder and image grow.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from adavipro_fast import cli
from adavipro_fast.artifact.artifact import NotRunnableError
from adavipro_fast.method.config import Precision, Runtime
from lib.loader import loader_rows
from lib.subject import Row, Subject, export, obstacle
from lib.table import Json, Plot, Rows, draw
from lib.timing import compared, interleaved_ms, summary

SATURATED = 0.95
QUICK_SIZES = (1, 8)
# Number of different images; larger batches repeat them.
IMAGES = 8
# Suffix of the file's name, and its runtime.
VARIANTS: tuple[tuple[str, Runtime], ...] = (
    ("_int8", "onnxruntime"),
    ("", "openvino"),
    ("_int8", "openvino"),
)
MODELS = ("ViT-B-32", "ViT-S-32", "ViT-B-32-256", "ViT-B-16")


@dataclass(frozen=True)
class ThroughputConfig:
    """Measure images per second with and without the prompt, and of the data loader."""

    model: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """open_clip names, random weights; repeatable (default: ViT-B-32 and three others)"""
    batch: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """images per call of the first model; repeatable (default: 1 to 64, to 1024 on a GPU)"""
    precision: Precision = "fp32"
    """of the encoder"""
    seconds: float = 20.0
    """how long the sustained row runs"""
    quick: bool = False
    """under a minute: one model in fp32, two batch sizes, a shorter sustained row"""
    device: cli.Device = "auto"
    json: Json = None
    plot: Plot = None


def main() -> None:
    """Parse, measure, print."""
    cli.main(ThroughputConfig, command)


def command(config: ThroughputConfig) -> dict[str, Any]:
    """Measure all rows.

    Raises:
        VerificationError: a graph's answers are wrong; nothing is timed.
    """
    first, *others = config.model or (MODELS[:1] if config.quick else MODELS)
    open_subject = partial(Subject, images=IMAGES, precision=config.precision, device=config.device)
    subject = open_subject(first)
    cuda = subject.device.type == "cuda"
    sizes = config.batch or ((1, 4, 16, 64, 256, 1024) if cuda else (1, 2, 4, 8, 16, 32, 64))
    if config.quick and not config.batch:
        sizes = QUICK_SIZES
    rows = Rows(subject.device, config.json)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batches(subject, sizes, folder, config, rows)
    for model in others:
        with tempfile.TemporaryDirectory() as name:
            count = 16 if cuda else 4
            rows.append(point_or_reason(open_subject(model), count, Path(name)))
    preprocess = subject.model.encoder.preprocess
    rows += loader_rows(preprocess, subject.device, count=64 if config.quick else 512, batch=32)
    if config.plot is not None:
        draw(rows, config.plot, value="images_per_s", label="images per second")
    return rows.published(f"throughput: {config.precision}, {subject.device}", ("model",))


def batches(
    subject: Subject, sizes: tuple[int, ...], folder: Path, config: ThroughputConfig, rows: Rows
) -> None:
    """Measure the first model: over batch sizes, over time, in int8 and in OpenVINO."""
    rows += (point_or_reason(subject, count, folder) for count in sizes)
    points = [row for row in rows if "skipped" not in row]
    if not points:
        return
    best = max(row["images_per_s"] for row in points)
    saturated = next(r["batch"] for r in points if r["images_per_s"] >= SATURATED * best)
    rows.append({"name": "saturation", "model": points[0]["model"], "batch": saturated})
    rows.append(sustained(subject, saturated, folder, 5.0 if config.quick else config.seconds))
    for ending, runtime in VARIANTS:
        reason = "--quick" if config.quick else obstacle(subject, f"folded{ending}", runtime)
        if reason:
            rows.append({"name": f"folded{ending}, {runtime}", "skipped": reason})
        else:
            rows.append(point_or_reason(subject, saturated, folder, ending, runtime))


def point_or_reason(
    subject: Subject,
    count: int,
    folder: Path,
    ending: str = "",
    runtime: Runtime = "onnxruntime",
) -> dict[str, Any]:
    """Measure a point, or return why it cannot run here."""
    try:
        return point(subject, count, folder, ending, runtime)
    except NotRunnableError as error:
        name = f"{subject.model.encoder.name} batch {count}{ending.replace('_', ', ')}"
        return {"name": name, "skipped": str(error)}


def checked_work(
    subject: Subject, name: str, count: int, folder: Path, runtime: Runtime = "onnxruntime"
) -> Callable[[], object]:
    """Open an exported graph on `count` images, and check its answer.

    Raises:
        NotRunnableError: the graph cannot run here.
        VerificationError: its answers are wrong.
    """
    artifact = export(subject, name, folder, runtime)
    if isinstance(artifact, str):
        raise NotRunnableError(f"{name}: {artifact}")
    image = artifact.about.image(subject.sample.to(subject.device))
    contract = "encoder" if name.startswith("baseline") else "prompt + encoder"
    row = Row(name, name, contract, partial(artifact.run, image), int8=name.endswith("_int8"))
    subject.checked(row, IMAGES)
    return partial(artifact.run, image[torch.arange(count) % IMAGES])


def point(
    subject: Subject,
    count: int,
    folder: Path,
    ending: str = "",
    runtime: Runtime = "onnxruntime",
) -> dict[str, Any]:
    """Time one batch size of one model, with and without the prompt."""
    works = {
        kind: checked_work(subject, kind + ending, count, folder, runtime)
        for kind in ("baseline", "folded")
    }
    calls = max(5, min(21, 64 // count))
    times = interleaved_ms(works, subject.device, rounds=calls, warm_up=1)
    medians = {name: summary(t)["median_ms"] for name, t in times.items()}
    model = subject.model.encoder.name
    also = "" if runtime == "onnxruntime" else f", {runtime}"
    return {
        "name": f"{model} batch {count}{ending.replace('_', ', ')}{also}",
        "model": model,
        "precision": ending.removeprefix("_") or subject.precision,
        "runtime": runtime,
        "side": subject.model.encoder.preprocess.size,
        "batch": count,
        "images_per_s": 1e3 * count / medians["folded"],
        "encoder_images_per_s": 1e3 * count / medians["baseline"],
        **compared(times["folded"], times["baseline"]),
    }


def sustained(subject: Subject, count: int, folder: Path, seconds: float) -> dict[str, Any]:
    """Run the folded graph without pauses; compare the first and the last third."""
    work = checked_work(subject, "folded", count, folder)
    work()
    began = previous = time.perf_counter()
    calls: list[float] = []
    while previous - began < seconds or len(calls) < 6:
        work()
        now = time.perf_counter()
        calls.append(now - previous)
        previous = now
    third = len(calls) // 3
    first, last = (statistics.median(part) for part in (calls[:third], calls[-third:]))
    return {
        "name": f"sustained {seconds:.0f} s",
        "model": subject.model.encoder.name,
        "batch": count,
        "images_per_s": count * len(calls) / (previous - began),
        "last_third_to_first": first / last,
    }


if __name__ == "__main__":
    main()
