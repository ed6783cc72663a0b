"""What every opened file offers: pixels to a prediction, pictures to answers."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adavipro_fast.artifact.answers import SHOWN_CLASSES, Answer, answers_of_tasks
from adavipro_fast.data.ahead import decoded_ahead
from adavipro_fast.data.images import PICTURES, Picture, pixels_of
from adavipro_fast.files.about import Description, Tasks
from adavipro_fast.method.model import Prediction

BATCH = 64


class NotRunnableError(ValueError):
    """This machine cannot run a file that is otherwise in order."""


class Artifact:
    """A classifier ready to run.

    Threads may share one: ONNX Runtime and PyTorch run their calls side by side, OpenVINO and an
    engine one after the other.
    """

    about: Description
    """the description that its file holds"""
    backend: str
    """runtime: torch, onnxruntime, openvino, tensorrt or tensorrt-rtx"""
    provider: str
    """device or execution provider that is really used"""

    def __call__(self, pixels: Tensor, task: Tasks | None = None) -> Prediction:
        """Classify (B, 3, S, S) uint8 RGB pixels; the prediction lies on the CPU.

        Args:
            pixels: the images.
            task: of all images, or of each, where the file holds several.
        """
        raise NotImplementedError

    def prompted(self, pixels: Tensor) -> Tensor | None:
        """Return what the encoder sees of (B, 3, S, S) uint8 RGB pixels, as such pixels.

        None for exported files, which have the prompt folded in.
        """
        return None

    def unprompted(self) -> "Artifact | None":
        """Return the same encoder and head without the prompt; None for exported files."""
        return None

    def classify(
        self,
        images: Picture | Sequence[Picture],
        task: Tasks | None = None,
        reject: float | None = None,
        top: int = SHOWN_CLASSES,
    ) -> list[Answer]:
        """Decode and classify pictures of any size.

        Args:
            images: one or several paths, encoded files, Pillow images or (H, W, 3) uint8 RGB
                arrays.
            task: of all pictures, or of each, where the artifact holds several.
            reject: share of known images that may be answered `unknown`, such as 0.05 (default:
                every picture is given a class).
            top: how many classes an answer lists.

        Returns:
            An answer for each picture, also of a single one.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a picture cannot be read, no task is named, or `reject` or `top` cannot be
                used.
        """
        pictures = [images] if isinstance(images, PICTURES) else list(images)
        tasks = [task] * len(pictures) if isinstance(task, str) else task
        decode = partial(pixels_of, preprocess=self.about.preprocess)
        if top < 1:
            raise ValueError(f"top is {top}; use 1 or more")
        if tasks is not None and len(tasks) != len(pictures):
            raise ValueError(
                f"got {len(tasks)} tasks for {len(pictures)} images; give one task, or one "
                "per image"
            )
        answers: list[Answer] = []
        for _, decoded in decoded_ahead(pictures, decode, BATCH):
            own = None if tasks is None else tasks[len(answers) : len(answers) + len(decoded)]
            prediction = self(torch.from_numpy(np.stack(decoded)), own)
            described = answers_of_tasks(self.about, prediction, own, reject, top)
            answers += map(Answer.of, described)
        return answers


class GraphArtifact(Artifact):
    """An exported graph, which can also be run on its inputs as they are."""

    device: torch.device
    """where inputs lie"""

    @property
    def inputs(self) -> Mapping[str, Sequence[Any]]:
        """Shapes of the inputs by name; dynamic axes are strings or -1."""
        raise NotImplementedError

    def run_on(self, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run on inputs that lie on the device; outputs lie on the CPU.

        Args:
            feeds: all inputs of the graph, by name.
        """
        raise NotImplementedError

    def run(self, image: Tensor, tasks: Sequence[int] = ()) -> dict[str, Tensor]:
        """Run a graph whose tasks, if there are several, are constants.

        Args:
            image: its input (B, 3, S, S), on the device.
            tasks: the number of each image's task, where there are several.
        """
        feeds = {"image": image}
        if tasks:
            feeds["task"] = torch.tensor(tasks, device=image.device)
        return self.run_on(feeds)

    def __call__(self, pixels: Tensor, task: Tasks | None = None) -> Prediction:
        """Classify (B, 3, S, S) uint8 RGB pixels."""
        numbers = self.about.numbers(task, len(pixels))
        return self.about.prediction(self.run(self.about.image(pixels.to(self.device)), numbers))
