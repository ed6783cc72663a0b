"""The cost of many tasks in one file: a mixed batch, relative to a single-task file.

    python bench/tasks.py --json bench/results/cpu-2-cores/tasks.json

For every number of tasks there is one ONNX file with the same encoder. All are timed in turn with
the single-task file, a file with tasks as data, and one session per task. First, each file's
answers for its first task are compared with those of the single-task file.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib as mpl
import torch
import tyro
from matplotlib.figure import Figure

from adavipro_fast import AdaViPro, cli, open_artifact
from adavipro_fast.artifact.artifact import Artifact
from adavipro_fast.artifact.open_tasks import OpenArtifact
from adavipro_fast.errors import VerificationError
from adavipro_fast.export import comparison
from adavipro_fast.export.graph import Form
from adavipro_fast.export.onnx_export import Source
from adavipro_fast.export.open_tasks import folded_task
from adavipro_fast.files.checkpoint import checkpoint_of
from adavipro_fast.method.model import Prediction
from lib.subject import Subject, write_sources
from lib.table import Json, Plot, publish
from lib.task_models import NAMES, task_model
from lib.timing import compared, percentiles, until_steady

# Number of tasks in the row with tasks as data.
OPEN = 8
# Numbers of tasks in the rows with a file and a session per task.
SEPARATE = (2, 4, 8)
# Between two int8 files with the same weights that were calibrated on different images.
LEAST_COSINE_INT8 = 0.99
Work = Callable[[], object]


@dataclass(frozen=True)
class TasksConfig:
    """Time mixed batches over the number of tasks."""

    model: str = "ViT-B-32"
    """open_clip name, random weights, or demo"""
    tasks: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """how many in a file; repeatable (default: 1, 8, 64 and 512; 4096 takes minutes to export)"""
    batch: int = 16
    """images in a call"""
    prompt_size: int = 30
    """of every task, pixels"""
    precision: Literal["fp32", "int8"] = "fp32"
    """of all files; int8 rounds every product, and leaves out the files with one task each"""
    seconds: float = 120.0
    """longest time to measure for"""
    device: cli.Device = "auto"
    json: Json = None
    plot: Plot = None


def main() -> None:
    """Parse, measure, print."""
    cli.main(TasksConfig, command)


def command(config: TasksConfig) -> dict[str, Any]:
    """Export, check, then time all files in turn."""
    subject = Subject(config.model, images=config.batch, device=config.device)
    counts = config.tasks or (1, 8, 64, 512)
    models = [task_model(subject, config.prompt_size, number) for number in range(max(counts))]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        # Written before any is opened: models and sessions together would not fit in memory.
        write(subject, models[:1], folder / "single.onnx", config.precision)
        for count in counts:
            write(subject, models[:count], folder / f"{count}.onnx", config.precision)
        models = models[: max(OPEN, *SEPARATE)]
        single = opened(subject, folder / "single.onnx")
        size = (folder / "single.onnx").stat().st_size
        rows: list[dict[str, Any]] = [{"name": "single", "tasks": 1, "bytes": size}]
        works: dict[str, Work] = {"single": lambda: single(subject.sample)}
        for count in counts:
            name, path = f"tasks_{count}", folder / f"{count}.onnx"
            many = opened(subject, path)
            check(name, many(subject.sample, "0"), single(subject.sample), config.precision)
            rows.append({"name": name, "tasks": count, "bytes": path.stat().st_size})
            if count > 1:
                rows[-1]["bytes_a_task"] = (rows[-1]["bytes"] - rows[0]["bytes"]) / count
            works[name] = partial(many, subject.sample, drawn(count, config.batch))
        alone = models[: max(SEPARATE)] if config.precision == "fp32" else []
        files = separate(subject, alone, folder)
        more = [separate_row(subject, files[:n], size) for n in SEPARATE if n <= len(files)]
        for row, work in (open_row(subject, config, models, single, folder), *more):
            rows.append(row)
            works[row["name"]] = work
        bases = {name: "single" for name in works if name != "single"}
        times = until_steady(works, subject.device, seconds=config.seconds, bases=bases)
    for row in rows:
        row.update(percentiles(times[row["name"]]))
        row["images_per_s"] = 1e3 * config.batch / row["p50_ms"]
        if row["name"] in bases:
            row.update(compared(times[row["name"]], times["single"]))
    kept = ("model", "batch", "prompt_size", "precision")
    settings = {name: getattr(config, name) for name in kept}
    title = ", ".join(f"{name} {value}" for name, value in settings.items())
    if config.plot is not None:
        draw(rows, config.plot)
    return publish(rows, subject.device, config.json, title) | settings


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw memory and time over the number of tasks, in one file and in separate files."""
    mpl.rcParams["svg.hashsalt"] = "adavipro_fast"
    figure = Figure(figsize=(8, 3), layout="constrained")
    memory, time_ = figure.subplots(1, 2)
    for kind, label in (("tasks", "one file"), ("separate", "a file and a session each")):
        own = [row for row in rows if row["name"].startswith(kind)]
        if kind == "separate":
            own.insert(0, rows[0])
        counts = [row["tasks"] for row in own]
        memory.plot(counts, [row["bytes"] / 1e6 for row in own], "o-", label=label)
        time_.plot(counts, [row["p50_ms"] for row in own], "o-", label=label)
    memory.set(xlabel="tasks", ylabel="file, MB", xscale="log", yscale="log")
    time_.set(xlabel="tasks", ylabel="a mixed batch, ms", xscale="log", ylim=(0, None))
    memory.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def drawn(count: int, batch: int) -> list[str]:
    """Draw a random task for each image."""
    generator = torch.Generator().manual_seed(0)
    return [str(n) for n in torch.randint(count, (batch,), generator=generator).tolist()]


def open_row(
    subject: Subject, config: TasksConfig, models: list[AdaViPro], single: Artifact, folder: Path
) -> tuple[dict[str, Any], Work]:
    """Build the row of a file with tasks as data, and time adding a task."""
    path = folder / "open.onnx"
    write(subject, models[:1], path, config.precision)
    artifact = opened(subject, path)
    assert isinstance(artifact, OpenArtifact)
    seconds = []
    for number, model in enumerate(models[:OPEN]):
        path = folder / f"{number}.task"
        folded_task(str(number), checkpoint_of(model, NAMES), model).save(path)
        began = time.perf_counter()
        artifact.add(path)
        seconds.append(time.perf_counter() - began)
    check("open", artifact(subject.sample, "0"), single(subject.sample), config.precision)
    size = (folder / "0.task").stat().st_size
    row = {"name": f"open_{OPEN}", "tasks": len(seconds), "bytes_a_task": size}
    work = partial(artifact, subject.sample, drawn(len(seconds), len(subject.sample)))
    return row | {"add_ms": 1e3 * statistics.median(seconds)}, work


def separate(subject: Subject, models: list[AdaViPro], folder: Path) -> list[Artifact]:
    """Open a file and a session for each task."""
    paths = [folder / f"own-{number}.onnx" for number in range(len(models))]
    for model, path in zip(models, paths, strict=True):
        write(subject, [model], path, alone=True)
    return [opened(subject, path) for path in paths]


def separate_row(subject: Subject, files: list[Artifact], size: int) -> tuple[dict[str, Any], Work]:
    """Build the row of one session per task, each called in turn with its own images."""
    names = drawn(len(files), len(subject.sample))
    shares = {
        int(name): subject.sample[[place for place, other in enumerate(names) if other == name]]
        for name in dict.fromkeys(names)
    }

    def work() -> list[Prediction]:
        return [files[number](share) for number, share in shares.items()]

    count = len(files)
    row = {"name": f"separate_{count}", "tasks": count, "bytes": size * count, "bytes_a_task": size}
    return row, work


def opened(subject: Subject, path: Path) -> Artifact:
    """Open a file on the bench's device."""
    return open_artifact(path, device=str(subject.device), runtime="onnxruntime")


def write(
    subject: Subject,
    models: list[AdaViPro],
    path: Path,
    precision: Literal["fp32", "int8"] = "fp32",
    *,
    alone: bool = False,
) -> None:
    """Export models with uint8 input.

    Args:
        subject: of the bench.
        models: the tasks; files named `single` or `open` need only the first.
        path: the file; its name defines the form.
        precision: of the encoder.
        alone: export one unnamed task.
    """
    kind: Literal["alone", "baked", "open"] = "baked"
    if alone or path.stem == "single":
        kind = "alone"
    elif path.stem == "open":
        kind = "open"
    sources = [
        Source(checkpoint_of(model, NAMES), model, str(number))
        for number, model in enumerate(models)
    ]
    form = Form(precision=precision, input="uint8", tasks=kind)
    write_sources(subject, sources, path, form)


def check(name: str, got: Prediction, own: Prediction, precision: str) -> None:
    """Compare the answers for the first task with those of its own file.

    The ranges of two int8 files may differ.

    Raises:
        VerificationError: they differ by more than rounding.
    """
    error = (got.embedding - own.embedding).abs().max().item()
    same = torch.equal(got.mask, own.mask)
    near = (got.embedding * own.embedding).sum(1).min().item() > LEAST_COSINE_INT8
    if not (near if precision == "int8" else error <= comparison.LARGEST_ERROR_FP32) or not same:
        raise VerificationError(f"{name}: embeddings differ by {error:.1e}, masks equal: {same}")


if __name__ == "__main__":
    main()
