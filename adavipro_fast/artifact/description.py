"""What every file that can be run says about itself, and what every runner offers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from adavipro_fast.files.checked import read
from adavipro_fast.files.checkpoint import FORMAT, read_settings
from adavipro_fast.method.calibration import UNCALIBRATED, Calibration
from adavipro_fast.method.config import Input, Precision, PromptConfig
from adavipro_fast.method.functional import normalise
from adavipro_fast.method.model import Prediction
from adavipro_fast.method.preprocess import Preprocess


@dataclass(frozen=True)
class Description:
    """What an artifact says about itself."""

    class_names: tuple[str, ...]
    """raw names in label order"""
    preprocess: Preprocess
    """how images become its pixels"""
    config: PromptConfig
    """what the prompt is made of"""
    precision: Precision
    """of the encoder"""
    input: Input
    """float32 (normalised) or uint8 (RGB 0-255)"""
    baseline: bool
    """the encoder alone, without a prompt"""
    calibration: Calibration = UNCALIBRATED
    """from logits to probabilities"""

    @classmethod
    def of(cls, values: dict[str, Any], path: Path) -> "Description":
        """Read and check the metadata of an exported file.

        Raises:
            ValueError: not one of ours.
        """
        if values.get("format") != FORMAT:
            raise ValueError(
                f"{path} was not exported by adavipro_fast (format {values.get('format')!r}, "
                f"{FORMAT!r} is needed); export a checkpoint with export/to_onnx.py"
            )
        try:
            about: Description = read(cls, values)
            config, _ = read_settings(values)
            return replace(about, config=config)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} has metadata that cannot be used: {error}") from error

    def check_shapes(self, shapes: dict[str, Sequence[Any]], path: Path) -> None:
        """Check the shapes of a graph's input and outputs, batch first, against this description.

        Raises:
            ValueError: it describes another graph.
        """
        side, grid = self.preprocess.size, self.preprocess.size // self.config.region_size
        wanted = {"image": [3, side, side], "logits": [len(self.class_names)]}
        if not self.baseline:
            wanted["mask"] = [grid, grid]
        for name, shape in wanted.items():
            got = list(shapes.get(name, ()))[1:]
            if got != shape:
                raise ValueError(
                    f"{path} says of its {name} {shape}, the graph has {got}; export it again"
                )

    def image(self, pixels: Tensor) -> Tensor:
        """Turn (B, 3, S, S) uint8 RGB pixels into the graph's input."""
        if self.input == "uint8":
            return pixels
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


class Artifact(Protocol):
    """A classifier ready to run.

    Threads may share one: ONNX Runtime and PyTorch run their calls side by side, an engine one
    after the other.
    """

    @property
    def about(self) -> Description:
        """What it says about itself."""

    @property
    def backend(self) -> str:
        """Which runtime: torch, onnxruntime, tensorrt or tensorrt-rtx."""

    @property
    def provider(self) -> str:
        """Which device or execution provider it really uses."""

    def __call__(self, pixels: Tensor) -> Prediction:
        """Classify (B, 3, S, S) uint8 RGB pixels; the prediction lies on the CPU."""


class NotRunnableError(ValueError):
    """This machine cannot run a file that is otherwise in order."""
