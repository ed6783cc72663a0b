"""What a page shows of a picture: answers with and without the prompt, and where it acts."""

import time
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from adavipro_fast.artifact.answers import answers
from adavipro_fast.artifact.description import Artifact, Description
from adavipro_fast.artifact.open import OneTask
from adavipro_fast.artifact.torch import TorchArtifact
from adavipro_fast.data.images import decode_image
from adavipro_fast.method.config import PromptConfig
from adavipro_fast.training import pictures

DOTS_PER_INCH = 220


@dataclass(frozen=True)
class View:
    """What is shown of one picture."""

    answer: dict[str, Any]
    """as `predict` gives it"""
    latency_ms: float
    """of the call, without decoding and drawing"""
    mask: Image.Image
    """what the prompt does to the picture; the picture alone without a prompt"""
    prompted: Image.Image | None
    """what the encoder sees; none where the file holds no template"""
    beside: dict[str, Any] | None
    """the answer of the artifact beside it"""


class Viewer:
    """A classifier and, where there is one, another beside it.

    Args:
        artifact: with its tasks.
        beside: of one task (default: the checkpoint's encoder without the prompt).
        reject: share of known images that may be answered `unknown`.

    Raises:
        ValueError: the file holds no calibration to reject by.
    """

    def __init__(
        self, artifact: Artifact, beside: Artifact | None = None, reject: float | None = None
    ) -> None:
        self.artifact, self.reject = artifact, reject
        self.holds_template = isinstance(artifact, TorchArtifact) and not artifact.about.baseline
        if beside is None and isinstance(artifact, TorchArtifact) and self.holds_template:
            beside = artifact.unprompted()
        self.beside = beside
        self.tasks = [task.name for task in artifact.about.tasks]
        # The first call is a slow one, and tells what no call can do.
        for one in map(self.of, self.tasks) if self.tasks else [artifact]:
            self._warm(one)
        if beside is not None:
            self._warm(beside)

    def of(self, task: str | None) -> Artifact:
        """Return the artifact of a task; of none where the file is of one."""
        return self.artifact if task is None else OneTask(self.artifact, task)

    def view(self, content: bytes, name: str, task: str | None = None) -> View:
        """Classify the picture in a file.

        Args:
            content: the file's bytes.
            name: what to call it in a message.
            task: one of `tasks`, where there are some.

        Raises:
            ValueError: no image, or no such task.
        """
        artifact = self.of(task)
        about = artifact.about
        pixels = decoded(content, name, about)
        began = time.perf_counter()
        prediction = artifact(pixels)
        latency_ms = 1e3 * (time.perf_counter() - began)
        config = None if about.baseline else about.config
        prompted = beside = None
        if self.holds_template:
            assert isinstance(artifact, TorchArtifact)
            prompted = picture(artifact.prompted(pixels)[0])
        if self.beside is not None:
            other = self.beside.about
            again = (
                pixels if other.preprocess == about.preprocess else decoded(content, name, other)
            )
            beside = answers(other, self.beside(again))[0]
        return View(
            answers(about, prediction, self.reject)[0],
            latency_ms,
            drawn(pixels[0], prediction.mask[0], config),
            prompted,
            beside,
        )

    def _warm(self, artifact: Artifact) -> None:
        side = artifact.about.preprocess.size
        prediction = artifact(torch.zeros(1, 3, side, side, dtype=torch.uint8))
        answers(artifact.about, prediction, None if artifact is self.beside else self.reject)


def decoded(content: bytes, name: str, about: Description) -> Tensor:
    """Decode a picture as an artifact wants it: (1, 3, S, S) uint8.

    Raises:
        ValueError: not an image.
    """
    image = decode_image(content, name, about.preprocess)
    return torch.from_numpy(about.preprocess.pixels()(image).copy())[None]


def picture(pixels: Tensor) -> Image.Image:
    """Turn (3, S, S) uint8 pixels into an image, as large as the one that is drawn on."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return image.resize((round(DOTS_PER_INCH * pictures.PANEL),) * 2, Image.Resampling.NEAREST)


def drawn(pixels: Tensor, mask: Tensor, config: PromptConfig | None) -> Image.Image:
    """Draw what the prompt does to (3, S, S) pixels."""
    content = BytesIO()
    pictures.masked(pixels, mask, config).savefig(content, format="png", dpi=DOTS_PER_INCH)
    return Image.open(content)
