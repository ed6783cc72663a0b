"""What many tasks in one file cost: a mixed batch beside the file of a single task.

    python bench/tasks.py --json bench/results/cpu-2-cores/tasks.json

Every number of tasks is one ONNX file with the same encoder; all are timed in turn with the
single-task file. Before that each is compared with the single-task answers of its first task.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from adavipro_fast import AdaViPro, PromptConfig, cli
from adavipro_fast.artifact.onnx import OnnxArtifact
from adavipro_fast.errors import VerificationError
from adavipro_fast.export import graph, to_onnx, verify
from adavipro_fast.export.fold import Plain, deployed
from adavipro_fast.export.tasks import Tasks
from adavipro_fast.files.checkpoint import checkpoint_of
from lib.subject import Subject
from lib.table import Json, publish
from lib.timing import compared, percentiles, until_steady

CLASSES = 10


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
    with tempfile.TemporaryDirectory() as folder:
        single = opened(subject, models[:1], Path(folder) / "single.onnx")
        files = {
            f"tasks_{count}": opened(subject, models[:count], Path(folder) / f"{count}.onnx")
            for count in counts
        }
        sizes = {name: artifact.path.stat().st_size for name, artifact in files.items()}
        works: dict[str, Callable[[], object]] = {"single": single.work}
        works |= {name: artifact.work for name, artifact in files.items()}
        for name, artifact in files.items():
            check(name, artifact, single)
        bases = dict.fromkeys(files, "single")
        times = until_steady(works, subject.device, seconds=config.seconds, bases=bases)
        least = single.path.stat().st_size
    rows: list[dict[str, Any]] = [{"name": "single", "tasks": 1, **percentiles(times["single"])}]
    for name, count in zip(files, counts, strict=True):
        rows.append(
            {
                "name": name,
                "tasks": count,
                **percentiles(times[name]),
                **compared(times[name], times["single"]),
                "bytes_a_task": (sizes[name] - least) / (count - 1) if count > 1 else None,
            }
        )
    title = f"{config.model}, batch {config.batch}, mixed tasks"
    return publish(rows, subject.device, config.json, title) | {
        "model": config.model, "batch": config.batch, "prompt_size": config.prompt_size
    }  # fmt: skip


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
    rows = torch.nn.functional.normalize(torch.randn(CLASSES, width), dim=-1)
    return AdaViPro(subject.model.encoder, rows, prompt).eval()


@dataclass(frozen=True)
class File:
    """An exported file, ready to classify the subject's images."""

    path: Path
    artifact: OnnxArtifact
    image: torch.Tensor
    numbers: tuple[int, ...]

    def work(self) -> dict[str, torch.Tensor]:
        """Run a batch, each image under a task of its own."""
        return self.artifact.run(self.image, self.numbers)


def opened(subject: Subject, models: list[AdaViPro], path: Path) -> File:
    """Export models and open the file; a file named `single` holds one task without a name."""
    module: Plain
    alone = path.stem == "single"
    if alone:
        module = deployed(models[0])
    else:
        module = Tasks(models, folded=True, dtype=torch.float32, uint8=False)
    stored = [checkpoint_of(model, tuple(map(str, range(CLASSES)))) for model in models]
    first = path.with_suffix(".safetensors")
    stored[0].save(first)
    about = to_onnx.describe(stored[0], to_onnx.OnnxConfig(first, path), "folded")
    if not alone:
        about["tasks"] = [
            to_onnx.describe_task(str(number), checkpoint, first)
            for number, checkpoint in enumerate(stored)
        ]
    side = subject.model.preprocess.size
    graph.write(module, path, side=side, opset=to_onnx.OPSETS["fp32"], metadata=about)
    artifact = OnnxArtifact.open(path, str(subject.device))
    image = subject.model.prompt.normalised(subject.sample).to(subject.device)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(models), (len(image),), generator=generator).tolist()
    return File(path, artifact, image, () if alone else tuple(drawn))


def check(name: str, many: File, single: File) -> None:
    """Compare the answers for the first task with its own file's.

    Raises:
        VerificationError: they differ by more than rounding.
    """
    first = many.artifact.run(many.image, [0] * len(many.image))
    own = single.work()
    error = (first["embedding"] - own["embedding"]).abs().max().item()
    same = torch.equal(first["mask"], own["mask"])
    if not error <= verify.LARGEST_ERROR_FP32 or not same:
        raise VerificationError(f"{name}: embeddings differ by {error:.1e}, masks equal: {same}")


if __name__ == "__main__":
    main()
