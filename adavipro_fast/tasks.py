"""List the tasks of an exported file: `python -m adavipro_fast.tasks FILE`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from adavipro_fast import cli
from adavipro_fast.files.sealed import describe


@dataclass(frozen=True)
class TasksConfig:
    """List the tasks of an exported file."""

    artifact: Annotated[Path, tyro.conf.Positional]
    """.onnx or .engine"""


def command(config: TasksConfig) -> dict[str, Any]:
    """Return the settings and size of each task."""
    path = config.artifact
    about = describe(path)
    tasks = [
        {
            "name": task.name,
            "method": task.config.method,
            "head": task.config.head,
            "prompt_size": task.config.prompt_size,
            "classes": len(task.class_names),
            "class_names": task.class_names,
            "bytes": task.bytes,
        }
        for task in about.tasks
    ]
    return {"path": str(path), "tasks": tasks, "open": about.open_for is not None}


def summary(result: dict[str, Any]) -> str:
    """Format the tasks, one per line."""
    if not result["tasks"]:
        if result["open"]:
            return f"{result['path']} contains no task; they are .task files (adavipro-to-task)"
        return f"{result['path']} contains one unnamed task"
    return "\n".join(
        f"{task['name']}: {task['classes']} classes, {task['method']}, {task['head']} head, prompt "
        f"size {task['prompt_size']}, {task['bytes'] / 1e3:.0f} kB"
        for task in result["tasks"]
    )


def main() -> None:
    """Parse, list, print."""
    cli.main(TasksConfig, command, summary)


if __name__ == "__main__":
    main()
