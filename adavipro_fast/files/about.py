"""What a file says about itself: one description, written into and read from every kind of file.

ONNX files hold it as metadata, engines in their sidecar, Triton's models in `about.json`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adavipro_fast.files.checked import read
from adavipro_fast.files.checkpoint import FORMAT, Checkpoint, read_settings
from adavipro_fast.method.calibration import UNCALIBRATED, Calibration
from adavipro_fast.method.config import PROMPTED, ExportPrecision, Input, PromptConfig
from adavipro_fast.method.encoder import EncoderIdentity
from adavipro_fast.method.functional import Edge, EdgePadding, normalise
from adavipro_fast.method.model import Prediction
from adavipro_fast.method.preprocess import Preprocess

# A task for all images, or one for each.
Tasks = str | Sequence[str]


@dataclass(frozen=True)
class Task:
    """One task of a file that holds several."""

    name: str
    class_names: tuple[str, ...]
    config: PromptConfig
    calibration: Calibration = UNCALIBRATED
    checkpoint_sha256: str = ""
    """of the file that it was exported from; empty in older files"""
    bytes: int = 0
    """of its tables; 0 in older files"""

    @classmethod
    def of(cls, name: str, checkpoint: Checkpoint, sha256: str = "", size: int = 0) -> "Task":
        """Describe a checkpoint as a task of a file."""
        names, config = checkpoint.class_names, checkpoint.config
        return cls(name, names, config, checkpoint.calibration, sha256, size)

    def stored(self) -> dict[str, Any]:
        """Return what files keep."""
        return asdict(self) | {"config": self.config.stored()}


@dataclass(frozen=True)
class OpenFor:
    """Which tasks a file takes whose tables are inputs."""

    encoder_sha256: str
    edge: Edge | None
    """that the graph forms; none where it takes prompts without a mask path only"""
    edge_padding: EdgePadding


@dataclass(frozen=True)
class Description:
    """What an artifact says about itself."""

    class_names: tuple[str, ...]
    """raw names in label order"""
    preprocess: Preprocess
    """how images become its pixels"""
    config: PromptConfig
    """what the prompt is made of"""
    precision: ExportPrecision
    """of the encoder; what is not quantised with int8 and fp8 is fp32"""
    input: Input
    """float32 (normalised), uint8 (RGB 0-255), or any: uint8 of any height and width"""
    baseline: bool
    """the encoder alone, without a prompt"""
    calibration: Calibration = UNCALIBRATED
    """from logits to probabilities"""
    tasks: tuple[Task, ...] = ()
    """where there are several; class names, configuration and calibration are then theirs"""
    open_for: OpenFor | None = None
    """where tasks are added while it runs"""
    encoder: EncoderIdentity | None = None
    """that is in the file; None in older files"""
    templates: tuple[str, ...] = ()
    """texts that class names were embedded in"""
    graph: str = ""
    """folded or pixel; empty where PyTorch runs a checkpoint"""
    checkpoint_sha256: str = ""
    """of the file that it was exported from"""

    @classmethod
    def of_checkpoint(
        cls,
        checkpoint: Checkpoint,
        precision: ExportPrecision,
        input: Input = "uint8",
        *,
        baseline: bool = False,
        several: bool = False,
    ) -> "Description":
        """Describe what runs a checkpoint.

        Args:
            checkpoint: the first of a file.
            precision: of the encoder.
            input: of the graph.
            baseline: the prompt is left out.
            several: the file takes the task of each image.
        """
        preprocess, calibration = checkpoint.preprocess, checkpoint.calibration
        if baseline:
            # A margin is the prompt's, and so is a calibration, whose logits a baseline lacks.
            preprocess, calibration = replace(preprocess, margin=0), calibration.without
        unprompted = not several and checkpoint.config.method not in PROMPTED
        return cls(
            checkpoint.class_names,
            preprocess,
            checkpoint.config,
            precision,
            input,
            baseline or unprompted,
            calibration,
            encoder=checkpoint.encoder,
            templates=checkpoint.templates,
        )

    def stored(self) -> dict[str, Any]:
        """Return what files keep; `of` reads it."""
        kept = {
            "format": FORMAT,
            **asdict(self),
            "preprocess": self.preprocess.stored(),
            "config": self.config.stored(),
            "encoder": None if self.encoder is None else self.encoder.stored(),
            "tasks": [task.stored() for task in self.tasks],
        }
        return {name: value for name, value in kept.items() if value is not None and value != []}

    @classmethod
    def of(cls, values: dict[str, Any], path: Path) -> "Description":
        """Read and check the metadata of an exported file.

        Raises:
            ValueError: not one of ours.
        """
        if values.get("format") != FORMAT:
            raise ValueError(
                f"{path} was not exported by adavipro_fast (format {values.get('format')!r}, "
                f"expected {FORMAT!r}); export a checkpoint with adavipro-to-onnx"
            )
        try:
            about: Description = read(cls, values)
            config, preprocess = read_settings(values)
            tasks = (
                replace(task, config=replace(task.config, margin=preprocess.margin))
                for task in about.tasks
            )
            return replace(about, config=config, preprocess=preprocess, tasks=tuple(tasks))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} has invalid metadata: {error}") from error

    def facts(self) -> dict[str, Any]:
        """Return what Triton's Python models need; lists have an entry a task."""
        tasks = self.tasks or (self,)
        facts = {
            "preprocess": self.preprocess.stored(),
            "tasks": [task.name for task in self.tasks],
            "class_names": [task.class_names for task in tasks],
            "temperatures": [task.calibration.temperature for task in tasks],
            "links": [task.calibration.link for task in tasks],
        }
        # As it is read back: tuples are lists.
        return dict(json.loads(json.dumps(facts)))

    def check_shapes(self, shapes: dict[str, Sequence[Any]], path: Path) -> None:
        """Check the shapes of a graph's input and outputs, batch first, against this description.

        Raises:
            ValueError: it describes another graph.
        """
        side, grid = self.preprocess.size, self.preprocess.size // self.config.region_size
        needed: dict[str, list[Any]] = {"image": [3, side, side]}
        if self.input == "any":
            needed["image"] = [3, None, None]
        if self.open_for is None:
            needed["logits"] = [self.most_classes]
        if not self.baseline:
            needed["mask"] = [grid, grid]
        for name, shape in needed.items():
            sizes = list(shapes.get(name, ()))[1:]
            # Dynamic axes have a name in ONNX, and are -1 in engines.
            got = [size if isinstance(size, int) and size >= 0 else None for size in sizes]
            if got != shape:
                raise ValueError(
                    f"the metadata of {path} gives {name} the shape {shape}, but the graph "
                    f"has {got}; export "
                    "it again"
                )

    @property
    def most_classes(self) -> int:
        """Classes of the task that has the most."""
        return max(map(len, [self.class_names, *(task.class_names for task in self.tasks)]))

    def numbers(self, task: Tasks | None, count: int) -> list[int]:
        """Return the number of the task of each of `count` images; none where there is one task.

        Raises:
            ValueError: no task is named, or one that the file does not hold.
        """
        names = [known.name for known in self.tasks]
        if task is None and not names:
            return []
        each = [task] * count if isinstance(task, str) else list(task or ())
        unknown = next((name for name in each if name not in names), None)
        if unknown is not None or len(each) != count:
            asked = "names no task" if task is None else f"requests {unknown or len(each)!r}"
            raise ValueError(
                f"the call {asked}; the file holds {', '.join(names) or 'one task'}: give one, or "
                f"one for each of {count} images"
            )
        return [names.index(name) for name in each]

    def check_one_task(self, path: Path) -> None:
        """Raise ValueError where a file waits for the name of a task."""
        if self.tasks:
            names = ", ".join(task.name for task in self.tasks)
            raise ValueError(f"{path} holds the tasks {names}; choose one with --task")
        if self.open_for is not None:
            raise ValueError(f"{path} needs a task; add --task F.task")

    def of_task(self, name: str) -> "Description":
        """Describe one of the tasks as a file of its own would.

        Raises:
            ValueError: no such task.
        """
        task = self.tasks[self.numbers(name, 1)[0]] if self.tasks else None
        if task is None:
            what = "one task without a name" if self.open_for is None else "no task yet"
            raise ValueError(f"the file holds {what}, not {name!r}")
        return replace(
            self,
            class_names=task.class_names,
            config=task.config,
            calibration=task.calibration,
            tasks=(),
            open_for=None,
        )

    def image(self, pixels: Tensor) -> Tensor:
        """Turn (B, 3, S, S) uint8 RGB pixels into the graph's input."""
        if self.input == "uint8":
            return pixels
        if self.input == "any":
            # Of the size that the graph's resize leaves as it is; it crops, and adds the margin.
            margin, side = self.preprocess.margin, self.preprocess.size
            inner = pixels[..., margin : side - margin, margin : side - margin]
            begin, end = self.preprocess.cropped(self.preprocess.shorter)
            return torch.nn.functional.pad(inner, (begin, end, begin, end))
        mean, std = (
            torch.tensor(v, device=pixels.device)
            for v in (self.preprocess.mean, self.preprocess.std)
        )
        return normalise(pixels, mean, std)

    def prediction(self, outputs: dict[str, Tensor]) -> Prediction:
        """Name the graph's outputs; a baseline's mask is closed everywhere."""
        logits, embedding = outputs["logits"], outputs["embedding"]
        grid = self.preprocess.size // self.config.region_size
        closed = torch.zeros(len(logits), grid, grid, dtype=torch.int32)
        return Prediction(logits, outputs.get("mask", closed), embedding)
