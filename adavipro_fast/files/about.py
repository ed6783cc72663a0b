"""The description of an artifact, stored in every kind of file.

ONNX files store it as metadata, engines in their sidecar, Triton models in `about.json`.
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
from adavipro_fast.method.config import (
    PROMPTED,
    EncoderIdentity,
    ExportPrecision,
    Input,
    PromptConfig,
)
from adavipro_fast.method.functional import Edge, EdgePadding, normalise
from adavipro_fast.method.model import Prediction
from adavipro_fast.method.preprocess import Preprocess

# One task for all images, or one per image.
Tasks = str | Sequence[str]


@dataclass(frozen=True)
class Task:
    """One task of a file that holds several."""

    name: str
    class_names: tuple[str, ...]
    config: PromptConfig
    calibration: Calibration = UNCALIBRATED
    checkpoint_sha256: str = ""
    """hash of the checkpoint it was exported from; empty in older files"""
    bytes: int = 0
    """size of its tables; 0 in older files"""

    @classmethod
    def of(cls, name: str, checkpoint: Checkpoint, sha256: str = "", size: int = 0) -> "Task":
        """Describe a checkpoint as a task of a file."""
        names, config = checkpoint.class_names, checkpoint.config
        return cls(name, names, config, checkpoint.calibration, sha256, size)

    def stored(self) -> dict[str, Any]:
        """Return the values that files store."""
        return asdict(self) | {"config": self.config.stored()}


@dataclass(frozen=True)
class OpenFor:
    """The tasks that a file accepts if its tables are inputs."""

    encoder_sha256: str
    edge: Edge | None
    """edge detector in the graph; None if it accepts only prompts without a mask"""
    edge_padding: EdgePadding


@dataclass(frozen=True)
class Description:
    """The description of an artifact."""

    class_names: tuple[str, ...]
    """raw names in label order"""
    preprocess: Preprocess
    """how images become its input pixels"""
    config: PromptConfig
    """settings of prompt and head"""
    precision: ExportPrecision
    """precision of the encoder; with int8 and fp8, layers that are not quantised are fp32"""
    input: Input
    """float32 (normalised), uint8 (RGB 0-255), or any: uint8 of any height and width"""
    baseline: bool
    """whether it is the encoder without a prompt"""
    calibration: Calibration = UNCALIBRATED
    """turns logits into probabilities"""
    tasks: tuple[Task, ...] = ()
    """the tasks of a file with several, which have their own class names, configuration and
    calibration"""
    open_for: OpenFor | None = None
    """set if tasks can be added while the file runs"""
    encoder: EncoderIdentity | None = None
    """the encoder in the file; None in older files"""
    templates: tuple[str, ...] = ()
    """text templates that class names were embedded with"""
    graph: str = ""
    """folded or pixel; empty if PyTorch runs a checkpoint"""
    checkpoint_sha256: str = ""
    """hash of the checkpoint it was exported from"""

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
        """Describe an artifact made from a checkpoint.

        Args:
            checkpoint: the file's first checkpoint.
            precision: of the encoder.
            input: of the graph.
            baseline: whether the prompt is left out.
            several: whether the file has several tasks.
        """
        preprocess, calibration = checkpoint.preprocess, checkpoint.calibration
        if baseline:
            # Margin and calibration belong to the prompt, and do not apply without it.
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
        """Return the values that files store; `of` reads them."""
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
            ValueError: the file was not exported by us, or its metadata is invalid.
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
        """Return what Triton's Python models need; lists have one entry per task."""
        tasks = self.tasks or (self,)
        facts = {
            "preprocess": self.preprocess.stored(),
            "tasks": [task.name for task in self.tasks],
            "class_names": [task.class_names for task in tasks],
            "temperatures": [task.calibration.temperature for task in tasks],
            "links": [task.calibration.link for task in tasks],
        }
        # In the form in which it is read back: tuples become lists.
        return dict(json.loads(json.dumps(facts)))

    def check_shapes(self, shapes: dict[str, Sequence[Any]], path: Path) -> None:
        """Check the shapes of a graph's input and outputs, batch first, against this description.

        Raises:
            ValueError: the shapes differ.
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
            # Dynamic axes are names in ONNX and -1 in engines.
            got = [size if isinstance(size, int) and size >= 0 else None for size in sizes]
            if got != shape:
                raise ValueError(
                    f"the metadata of {path} gives {name} the shape {shape}, but the graph has "
                    f"{got}; export it again"
                )

    @property
    def most_classes(self) -> int:
        """The largest number of classes of any task."""
        return max(map(len, [self.class_names, *(task.class_names for task in self.tasks)]))

    def numbers(self, task: Tasks | None, count: int) -> list[int]:
        """Return each image's task number; an empty list for a file of one task.

        Args:
            task: name for all images, or one name per image.
            count: number of images.

        Raises:
            ValueError: a name is missing, or the file has no task of that name.
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
        """Raise ValueError if a task must be chosen first."""
        if self.tasks:
            names = ", ".join(task.name for task in self.tasks)
            raise ValueError(f"{path} holds the tasks {names}; choose one with --task")
        if self.open_for is not None:
            raise ValueError(f"{path} needs a task; add --task F.task")

    def of_task(self, name: str) -> "Description":
        """Describe one of the tasks as if it were the file's only one.

        Raises:
            ValueError: there is no task of that name.
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
            # Pad to the size that the graph does not resize; it then crops and adds the margin.
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
        """Build a Prediction from the graph's outputs; a baseline's mask is closed everywhere."""
        logits, embedding = outputs["logits"], outputs["embedding"]
        grid = self.preprocess.size // self.config.region_size
        closed = torch.zeros(len(logits), grid, grid, dtype=torch.int32)
        return Prediction(logits, outputs.get("mask", closed), embedding)
