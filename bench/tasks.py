"""What many tasks in one file cost: a mixed batch beside the file of a single task.

    python bench/tasks.py --json bench/results/cpu-2-cores/tasks.json

Every number of tasks is one ONNX file with the same encoder; all are timed in turn with the
single-task file, with a file whose tasks are data, and with one session a task. Before that each is
compared with the single-task answers of its first task.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from adavipro_fast import AdaViPro, PromptConfig, cli, open_artifact
from adavipro_fast.artifact.description import Artifact
from adavipro_fast.artifact.open_tasks import OpenArtifact
from adavipro_fast.errors import VerificationError
from adavipro_fast.export import graph, to_onnx, verify
from adavipro_fast.export.fold import Plain, deployed
from adavipro_fast.export.open_tasks import OpenTasks, folded_task
from adavipro_fast.export.tasks import Tasks
from adavipro_fast.files.checkpoint import checkpoint_of
from adavipro_fast.method.model import Prediction
from lib.subject import Subject
from lib.table import Json, publish
from lib.timing import compared, percentiles, until_steady

NAMES = tuple(map(str, range(10)))
# Tasks of the rows where each has a session, or a file, of its own.
SEPARATE = 8
Work = Callable[[], object]


@dataclass(frozen=True)
class TasksConfig:
    """Time mixed batches over the number of tasks."""

    model: str = "ViT-B-32"
    """open_clip name, random weights, or demo"""
    tasks: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """how many in a file; repeatable (default: 1, 8, 64 and 512)"""
    batch: int = 16
    """images in a call"""
    prompt_size: int = 30
    """of every task, pixels"""
    seconds: float = 120.0
    """longest time to measure for"""
    device: cli.Device = "auto"
    json: Json = None


def main() -> None:
    """Parse, measure, print."""
    cli.main(TasksConfig, command)


def command(config: TasksConfig) -> dict[str, Any]:
    """Export, check, then time all files in turn."""
    subject = Subject(config.model, images=config.batch, device=config.device)
    counts = config.tasks or (1, 8, 64, 512)
    models = [task_model(subject, config, number) for number in range(max(counts))]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        single = exported(subject, models[:1], folder / "single.onnx")
        rows: list[dict[str, Any]] = [{"name": "single", "tasks": 1}]
        works: dict[str, Work] = {"single": lambda: single(subject.sample)}
        for count in counts:
            name, path = f"tasks_{count}", folder / f"{count}.onnx"
            many = exported(subject, models[:count], path)
            check(name, many(subject.sample, "0"), single(subject.sample))
            more = path.stat().st_size - (folder / "single.onnx").stat().st_size
            rows.append({"name": name, "tasks": count})
            if count > 1:
                rows[-1]["bytes_a_task"] = more / count
            works[name] = partial(many, subject.sample, drawn(count, config.batch))
        for row, work in (
            opened_row(subject, models, single, folder),
            separate_row(subject, models, folder),
        ):
            rows.append(row)
            works[row["name"]] = work
        bases = {name: "single" for name in works if name != "single"}
        times = until_steady(works, subject.device, seconds=config.seconds, bases=bases)
    for row in rows:
        row.update(percentiles(times[row["name"]]))
        if row["name"] in bases:
            row.update(compared(times[row["name"]], times["single"]))
    settings = {"model": config.model, "batch": config.batch, "prompt_size": config.prompt_size}
    title = ", ".join(f"{name} {value}" for name, value in settings.items())
    return publish(rows, subject.device, config.json, title) | settings


def drawn(count: int, batch: int) -> list[str]:
    """Draw a task for each image."""
    generator = torch.Generator().manual_seed(0)
    return [str(n) for n in torch.randint(count, (batch,), generator=generator).tolist()]


def opened_row(
    subject: Subject, models: list[AdaViPro], single: Artifact, folder: Path
) -> tuple[dict[str, Any], Work]:
    """Build the row of a file whose tasks are data; say how long adding one takes."""
    opened = exported(subject, models[:1], folder / "open.onnx")
    assert isinstance(opened, OpenArtifact)
    seconds = []
    for number, model in enumerate(models[:SEPARATE]):
        path = folder / f"{number}.task"
        folded_task(str(number), checkpoint_of(model, NAMES), model).save(path)
        began = time.perf_counter()
        opened.add(path)
        seconds.append(time.perf_counter() - began)
    check("open", opened(subject.sample, "0"), single(subject.sample))
    size = (folder / "0.task").stat().st_size
    row = {"name": f"open_{SEPARATE}", "tasks": SEPARATE, "bytes_a_task": size}
    work = partial(opened, subject.sample, drawn(len(seconds), len(subject.sample)))
    return row | {"add_ms": 1e3 * statistics.median(seconds)}, work


def separate_row(
    subject: Subject, models: list[AdaViPro], folder: Path
) -> tuple[dict[str, Any], Work]:
    """Build the row of one session a task, each called with its own images in turn."""
    paths = [folder / f"own-{number}.onnx" for number in range(min(SEPARATE, len(models)))]
    files = {
        str(n): exported(subject, [models[n]], path, alone=True) for n, path in enumerate(paths)
    }
    names = drawn(len(files), len(subject.sample))
    shares = {
        name: subject.sample[[place for place, other in enumerate(names) if other == name]]
        for name in dict.fromkeys(names)
    }

    def work() -> list[Prediction]:
        return [files[name](share) for name, share in shares.items()]

    size = paths[0].stat().st_size
    return {"name": f"separate_{SEPARATE}", "tasks": len(files), "bytes_a_task": size}, work


def task_model(subject: Subject, config: TasksConfig, number: int) -> AdaViPro:
    """Make a task with a prompt and classes of its own."""
    torch.manual_seed(number)
    width = subject.model.class_embeddings.shape[1]
    prompt = PromptConfig(
        prompt_size=config.prompt_size,
        region_size=subject.model.config.region_size,
        edge="laplacian-magnitude",
        edge_padding="replicate",
        embed_dim=8,
    )
    rows = torch.nn.functional.normalize(torch.randn(len(NAMES), width), dim=-1)
    return AdaViPro(subject.model.encoder, rows, prompt).eval()


def exported(
    subject: Subject, models: list[AdaViPro], path: Path, *, alone: bool = False
) -> Artifact:
    """Export models, bytes as input, and open the file.

    Args:
        subject: of the bench.
        models: the tasks; of one named `single` or `open` the first is all.
        path: named after what it holds.
        alone: one task without a name.
    """
    module: Plain
    stored = [checkpoint_of(model, NAMES) for model in models]
    first = path.with_suffix(".safetensors")
    stored[0].save(first)
    config = to_onnx.OnnxConfig(first, path, input="uint8")
    about = to_onnx.describe(stored[0], config, "folded")
    if alone or path.stem == "single":
        module = deployed(models[0], uint8=True)
    elif path.stem == "open":
        module = OpenTasks(models[0], dtype=torch.float32, uint8=True)
        about["open_for"] = asdict(to_onnx.open_for(stored))
    else:
        module = Tasks(models, folded=True, dtype=torch.float32, uint8=True)
        about["tasks"] = [
            to_onnx.describe_task(str(number), checkpoint, first)
            for number, checkpoint in enumerate(stored)
        ]
    side = subject.model.preprocess.size
    graph.write(module, path, side=side, opset=to_onnx.OPSETS["fp32"], metadata=about)
    return open_artifact(path, device=str(subject.device))


def check(name: str, got: Prediction, own: Prediction) -> None:
    """Compare the answers for the first task with its own file's.

    Raises:
        VerificationError: they differ by more than rounding.
    """
    error = (got.embedding - own.embedding).abs().max().item()
    same = torch.equal(got.mask, own.mask)
    if not error <= verify.LARGEST_ERROR_FP32 or not same:
        raise VerificationError(f"{name}: embeddings differ by {error:.1e}, masks equal: {same}")


if __name__ == "__main__":
    main()
