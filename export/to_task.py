"""Write a checkpoint as a task file: `python export/to_task.py CHECKPOINT --output F.task`.

It can be added to a running artifact that was exported with `--tasks open`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from adavipro_fast import cli
from adavipro_fast.artifact.torch import encoder_of
from adavipro_fast.export.open_tasks import folded_task
from adavipro_fast.files.checkpoint import load_checkpoint


@dataclass(frozen=True)
class TaskConfig:
    """Write a checkpoint as a .task file for a file exported with --tasks open."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """checkpoint.safetensors"""
    output: Path
    """output file, F.task"""
    task: str | None = None
    """name of the task (default: F)"""
    model: cli.Model = None
    pretrained: cli.Pretrained = None


def main() -> None:
    """Parse, fold, print."""
    cli.main(TaskConfig, command, summary)


def command(config: TaskConfig) -> dict[str, Any]:
    """Fold the checkpoint into tables and write them.

    Raises:
        ValueError: the checkpoint cannot be folded, or the output does not end in .task.
    """
    if config.output.suffix != ".task":
        raise ValueError(f"output {config.output} must end in .task")
    checkpoint = load_checkpoint(config.checkpoint)
    model = checkpoint.model(encoder_of(checkpoint, config.model, config.pretrained))
    task = folded_task(config.task or config.output.stem, checkpoint, model)
    task.save(config.output)
    return {
        "path": str(config.output),
        "task": task.name,
        "classes": len(task.class_names),
        "encoder": task.encoder.sha256,
        "bytes": config.output.stat().st_size,
    }


def summary(result: dict[str, Any]) -> str:
    """Format the file's task and size."""
    return (
        f"{result['path']}: task {result['task']}, {result['classes']} classes, "
        f"{result['bytes'] / 1e3:.0f} kB; add it with open_artifact(FILE).add(...)"
    )


if __name__ == "__main__":
    main()
