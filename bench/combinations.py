"""Try every combination of precision, input, tasks and runtime with the demo's encoder.

    python bench/combinations.py --json bench/results/cpu-2-cores/combinations.json

A combination works if its file is exported and verified, and then: ONNX Runtime and OpenVINO answer
like PyTorch on the CPU, TensorRT (on a machine with a GPU) and TensorRT-RTX build the engine, which
is not run, Triton's repository is written, and `serve` answers over HTTP. Any failure must have a
reason in `REASONS`.
"""

import io
import json
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro
from PIL import Image

from adavipro_fast import cli, open_artifact
from adavipro_fast.artifact.open_tasks import OpenArtifact
from adavipro_fast.errors import VerificationError
from adavipro_fast.export import onnx_export, to_task, to_tensorrt, to_triton
from adavipro_fast.files.checkpoint import checkpoint_of
from adavipro_fast.method.config import ExportPrecision, Input
from adavipro_fast.method.model import Prediction
from lib.published import NEEDS_GPU, NOT_INSTALLED
from lib.server import server
from lib.subject import Subject
from lib.table import Json, publish
from lib.task_models import NAMES, PROMPT_SIZE, task_model

Tasks = Literal["one", "baked", "data"]
WHERE = ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "triton", "serve")
# Part of an error message, and the table's explanation of it, in at most ten words.
REASONS = {
    "on cpu: ": "ONNX Runtime has bf16 on CUDA devices only",
    "on auto: ": "ONNX Runtime has bf16 on CUDA devices only",
    "its fp8 rounding": "OpenVINO's fp8 rounding does not follow the file",
    "builds for the GPU of this machine": NEEDS_GPU,
    "tensorrt is not installed": NOT_INSTALLED,
    "needs normalised floats": "Triton's clients send bytes: export with --input uint8",
    "was exported with --tasks open": "Triton cannot keep tables: bake the tasks",
}
LEAST_COSINE = 0.97
CAPABILITIES = ("8.9", "12.0")


@dataclass(frozen=True)
class CombinationsConfig:
    """Try every combination of precision, input, tasks and runtime."""

    precision: Annotated[tuple[ExportPrecision, ...], tyro.conf.UseAppendAction] = ()
    """repeatable (default: all)"""
    input: Annotated[tuple[Input, ...], tyro.conf.UseAppendAction] = ()
    """repeatable (default: all)"""
    tasks: Annotated[tuple[Tasks, ...], tyro.conf.UseAppendAction] = ()
    """repeatable (default: all)"""
    engines: bool = True
    """build engines, seconds each"""
    json: Json = None


@dataclass(frozen=True)
class Trial:
    """The checkpoints to export, and the answers expected of their files."""

    folder: Path
    checkpoints: tuple[Path, ...]
    expected: tuple[Prediction, ...]
    """PyTorch's predictions for each task"""
    pixels: torch.Tensor


def main() -> None:
    """Parse, try, print."""
    cli.main(CombinationsConfig, command)


def command(config: CombinationsConfig) -> dict[str, Any]:
    """Try all combinations.

    Raises:
        VerificationError: a combination fails for an unknown reason.
    """
    axes = (
        config.precision or get_args(ExportPrecision),
        config.input or get_args(Input),
        config.tasks or get_args(Tasks),
    )
    with tempfile.TemporaryDirectory() as place:
        trial = prepared(Path(place))
        rows = [row_of(trial, *cell, engines=config.engines) for cell in product(*axes)]
        serve(trial, rows)
    for row in rows:
        del row["file"]
    holes = [
        f"{row['name']} in {where}: {row[where]}"
        for row in rows
        for where in WHERE
        if row.get(where, "") not in ("", *REASONS.values())
    ]
    result = publish(rows, torch.device("cpu"), config.json, "demo encoder; empty cells work")
    if holes:
        raise VerificationError("not explained: " + "; ".join(holes))
    return result


def prepared(folder: Path) -> Trial:
    """Save two tasks' checkpoints, their .task files, and calibration images."""
    subject = Subject("demo", images=6, device="cpu")
    paths, expected = [], []
    for number in range(2):
        model = task_model(subject, PROMPT_SIZE, number)
        model.prompt.initialise(subject.sample)
        path = folder / "tasks" / f"{number}.safetensors"
        checkpoint_of(model, NAMES).save(path)
        to_task.command(to_task.TaskConfig(path, path.with_suffix(".task"), task=str(number)))
        paths.append(path)
        with torch.inference_mode():
            expected.append(model(subject.sample))
    (folder / "images").mkdir()
    for number, image in enumerate(subject.various):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture.save(folder / "images" / f"{number}.png")
    return Trial(folder, tuple(paths), tuple(expected), subject.sample)


def row_of(
    trial: Trial, precision: ExportPrecision, input: Input, tasks: Tasks, *, engines: bool
) -> dict[str, Any]:
    """Export a combination and try it in every runtime except `serve`."""
    name = f"{precision}-{input}-{tasks}"
    path = trial.folder / f"{name}.onnx"
    first, other = trial.checkpoints
    more = () if tasks == "one" else (other,)
    export = onnx_export.OnnxConfig(
        first, path, more,
        task=("0", "1") if more else (), tasks="open" if tasks == "data" else "baked",
        precision=precision, input=input, images=(trial.folder / "images",), largest_loss=100.0,
    )  # fmt: skip
    onnx_export.export(export)
    build = to_tensorrt.TensorRtConfig(
        path, path.with_suffix(".engine"), runtime="tensorrt",
        batch="1,4,16", image_size="32,224,512", builder_level=0,
    )  # fmt: skip
    build_rtx = replace(build, runtime="tensorrt-rtx", compute_capability=CAPABILITIES)
    triton = to_triton.TritonConfig(path, trial.folder / "triton")
    works: dict[str, Callable[[], object]] = {
        "onnxruntime": partial(answered, trial, path, tasks, "onnxruntime"),
        "openvino": partial(answered, trial, path, tasks, "openvino"),
        "tensorrt": partial(to_tensorrt.command, build),
        "tensorrt-rtx": partial(to_tensorrt.command, build_rtx),
        "triton": partial(to_triton.command, triton),
    }
    if not engines:
        del works["tensorrt"], works["tensorrt-rtx"]
    tried = {where: reason_of(work) for where, work in works.items()}
    return {
        "name": name,
        "precision": precision,
        "input": input,
        "tasks": tasks,
        **tried,
        "file": path,
    }


def reason_of(work: Callable[[], object]) -> str:
    """Call `work`; return an empty text, or why it failed."""
    try:
        work()
    except (ImportError, ValueError, VerificationError) as error:
        return explained(str(error).split("\n")[0])
    return ""


def explained(error: str) -> str:
    """Return the table's explanation of an error, or the error if there is none."""
    return next((reason for known, reason in REASONS.items() if known in error), error)


def answered(trial: Trial, path: Path, tasks: Tasks, runtime: Any) -> None:
    """Compare a file's answers with PyTorch's for each task.

    Raises:
        VerificationError: they differ by more than rounding.
    """
    artifact = open_artifact(path, device="cpu", runtime=runtime)
    if isinstance(artifact, OpenArtifact):
        for checkpoint in trial.checkpoints:
            artifact.add(checkpoint.with_suffix(".task"))
    asked = [None] if tasks == "one" else ["0", "1"]
    for task, expected in zip(asked, trial.expected, strict=False):
        got = artifact(trial.pixels, task)
        near = torch.cosine_similarity(got.embedding, expected.embedding).min().item()
        if near < LEAST_COSINE or not torch.equal(got.mask.int(), expected.mask.int()):
            raise VerificationError(f"answers are not PyTorch's: worst cosine {near:.4f}")


def serve(trial: Trial, rows: list[dict[str, Any]]) -> None:
    """Serve all files that can be opened here in one process, and send each a request."""
    files = []
    for row in rows:
        opened = reason_of(partial(open_artifact, row["file"], device="cpu"))
        row["serve"] = opened
        files += [] if opened else [row]
    if not files:
        return
    flags = [str(row["file"]) for row in files[1:]]
    if any(row["tasks"] == "data" for row in files):
        flags += ["--tasks-folder", str(trial.folder / "tasks")]
    content = io.BytesIO()
    Image.fromarray(trial.pixels[0].permute(1, 2, 0).numpy()).save(content, "PNG")
    with server(files[0]["file"], *flags, runtime="auto") as address:
        for row in files:
            task = "" if row["tasks"] == "one" else "&task=1"
            url = f"{address}/classify?model={row['name']}{task}"
            row["serve"] = asked(url, content.getvalue())


def asked(url: str, image: bytes) -> str:
    """Send an image; return an empty text, or what is wrong with the answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, image, method="POST")) as answer:
            values = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read().decode()[:200]}"
    return "" if "answer" in json.dumps(values) else f"no answer: {values}"


if __name__ == "__main__":
    main()
