"""Task files (`F.task`): the tables of a prompt and a head for a shared encoder."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adavipro_fast.files.checked import read
from adavipro_fast.files.checkpoint import read_settings
from adavipro_fast.files.whole import (
    check_tensors,
    read_safetensors,
    safetensors_bytes,
    write_whole,
)
from adavipro_fast.method.calibration import UNCALIBRATED, Calibration
from adavipro_fast.method.config import EncoderIdentity, PromptConfig
from adavipro_fast.method.preprocess import Preprocess

FORMAT = "adavipro-fast-task/1"
# The tables of a task, in the order of the graph's inputs.
TABLES = ("kernels", "constants", "rows", "classes", "biases")
# The bias of a class that a task does not have.
ABSENT = -1e30


@dataclass(frozen=True)
class TaskFile:
    """The tables of a task, fp32.

    kernels (3, R + 2, R + 2): the collapsed generator; constants (G²,): its bias, or the sign of a
    constant mask; rows (parts, N, W): what open regions add to the N tokens; classes (K, E + F) and
    biases (K,): the head, on embedding and features concatenated.
    """

    name: str
    tables: dict[str, Tensor]
    class_names: tuple[str, ...]
    config: PromptConfig
    encoder: EncoderIdentity
    preprocess: Preprocess
    calibration: Calibration = UNCALIBRATED

    @property
    def bytes(self) -> int:
        """Size of the tables in bytes."""
        return sum(table.nbytes for table in self.tables.values())

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        metadata = {
            "format": FORMAT,
            "name": self.name,
            "class_names": self.class_names,
            "config": self.config.stored(),
            "encoder": self.encoder.stored(),
            "preprocess": self.preprocess.stored(),
            "calibration": asdict(self.calibration),
        }
        write_whole(path, safetensors_bytes(self.tables, metadata))


def load_task(path: Path) -> TaskFile:
    """Read and check a task.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated or not ours, or a table is missing or has the wrong shape.
    """
    tables, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} has format {metadata.get('format')!r}; expected {FORMAT!r}")
    try:
        config, preprocess = read_settings(metadata)
        names = tuple(str(name) for name in metadata["class_names"])
        task = TaskFile(
            str(metadata["name"]),
            tables,
            names,
            config,
            read(EncoderIdentity, metadata["encoder"]),
            preprocess,
            read(Calibration, metadata.get("calibration", {})),
        )
        _check(tables, len(names), config.region_size, preprocess.size // config.region_size)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a valid task file: {error}") from error
    return task


def _check(tables: Mapping[str, Tensor], classes: int, region: int, grid: int) -> None:
    """Raise ValueError unless the tables are fp32 and their shapes fit together."""
    shapes: dict[str, tuple[int | None, ...]] = {
        "kernels": (3, region + 2, region + 2),
        "constants": (grid * grid,),
        "rows": (None, None, None),
        "classes": (classes, None),
        "biases": (classes,),
    }
    if set(tables) != set(shapes):
        raise ValueError(f"its tables are {sorted(tables)}; expected {sorted(shapes)}")
    check_tensors(tables, shapes)


def stacked(tasks: list[TaskFile], dtype: torch.dtype) -> dict[str, Tensor]:
    """Stack the tables of tasks; pad to the largest number of classes.

    Args:
        tasks: T tasks.
        dtype: dtype of the token rows.
    """
    most = max(len(task.class_names) for task in tasks)
    tables: dict[str, Any] = {}
    for name in TABLES:
        parts = [task.tables[name] for task in tasks]
        if name in ("classes", "biases"):
            filled = ABSENT if name == "biases" else 0.0
            padded = [part.new_full((most, *part.shape[1:]), filled) for part in parts]
            for larger, part in zip(padded, parts, strict=True):
                larger[: len(part)] = part
            parts = padded
        tables[name] = torch.stack(parts)
    return tables | {"rows": tables["rows"].to(dtype)}
