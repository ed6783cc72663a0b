"""What every runner of a file offers."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from adavipro_fast.files.about import Description, Tasks
from adavipro_fast.method.model import Prediction

# What runs an .onnx file.
Runtime = Literal["auto", "onnxruntime", "openvino"]


class Artifact(Protocol):
    """A classifier ready to run.

    Threads may share one: ONNX Runtime and PyTorch run their calls side by side, OpenVINO and an
    engine one after the other.
    """

    @property
    def about(self) -> Description:
        """What it says about itself."""

    @property
    def backend(self) -> str:
        """Which runtime: torch, onnxruntime, openvino, tensorrt or tensorrt-rtx."""

    @property
    def provider(self) -> str:
        """Which device or execution provider it really uses."""

    def __call__(self, pixels: Tensor, task: Tasks | None = None) -> Prediction:
        """Classify (B, 3, S, S) uint8 RGB pixels; the prediction lies on the CPU.

        Args:
            pixels: the images.
            task: of all images, or of each, where the file holds several.
        """

    def classify(
        self,
        images: Any,
        task: Tasks | None = None,
        reject: float | None = None,
        top: int = 5,
    ) -> list[Any]:
        """Classify pictures; see `classify.Classifies`."""


class Graph(Artifact, Protocol):
    """A file with a graph that can be run on inputs of the caller's."""

    @property
    def device(self) -> torch.device:
        """Where inputs lie."""

    @property
    def inputs(self) -> Mapping[str, Sequence[Any]]:
        """Shapes of the inputs by name; dynamic axes are strings or -1."""

    def run_on(self, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run on inputs that lie on the device; outputs lie on the CPU.

        Args:
            feeds: all inputs of the graph, by name.
        """


class NotRunnableError(ValueError):
    """This machine cannot run a file that is otherwise in order."""
