"""Pictures in, names out: one call for every artifact, whatever a picture comes as."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from adavipro_fast.artifact.answers import SHOWN_CLASSES, answers_of_tasks
from adavipro_fast.artifact.artifact import Artifact
from adavipro_fast.data.ahead import decoded_ahead
from adavipro_fast.data.images import converted, decode, read_pixels
from adavipro_fast.files.about import Tasks
from adavipro_fast.method.preprocess import Preprocess

# A path, an encoded file's bytes, a Pillow image, or (H, W, 3) uint8 RGB pixels.
Picture = str | Path | bytes | Image.Image | np.ndarray[Any, Any]
KINDS = (str, Path, bytes, Image.Image, np.ndarray)
BATCH = 64


@dataclass(frozen=True)
class Answer:
    """What a picture was classified as."""

    name: str
    """of the likeliest class, or `unknown` where it is rejected"""
    probability: float
    """of the likeliest class"""
    rejected: bool
    """the confidence is below what `reject` asks for"""
    classes: tuple[tuple[str, float], ...]
    """names and probabilities, the likeliest first"""
    mask: tuple[tuple[int, ...], ...]
    """(G, G): 1 where the prompt is added"""

    @classmethod
    def of(cls, described: dict[str, Any]) -> "Answer":
        """Take what `answers` describes."""
        classes = tuple((row["name"], row["probability"]) for row in described["classes"])
        mask = tuple(map(tuple, described["mask"]))
        return cls(described["answer"], classes[0][1], described["rejected"], classes, mask)


class Classifies:
    """Gives an artifact `classify`."""

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
        artifact = cast(Artifact, self)
        pictures = [images] if isinstance(images, KINDS) else list(images)
        tasks = [task] * len(pictures) if isinstance(task, str) else task
        decode = partial(pixels_of, preprocess=artifact.about.preprocess)
        if top < 1:
            raise ValueError(f"top is {top}; use 1 or more")
        if tasks is not None and len(tasks) != len(pictures):
            raise ValueError(
                f"got {len(tasks)} tasks for {len(pictures)} images; give one task, or one "
                "per image"
            )
        found: list[Answer] = []
        for _, decoded in decoded_ahead(pictures, decode, BATCH):
            own = None if tasks is None else tasks[len(found) : len(found) + len(decoded)]
            prediction = artifact(torch.from_numpy(np.stack(decoded)), own)
            described = answers_of_tasks(artifact.about, prediction, own, reject, top)
            found += map(Answer.of, described)
        return found


def pixels_of(
    picture: Picture, preprocess: Preprocess, name: str = "(bytes)"
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decode a picture as the encoder wants it: (3, S, S) uint8.

    Args:
        picture: of any kind.
        preprocess: the encoder's.
        name: what to call bytes in a message.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read.
    """
    if isinstance(picture, str | Path):
        return read_pixels((Path(picture),), preprocess)[0].numpy()
    transform = preprocess.pixels()
    if isinstance(picture, bytes):
        return transform(decode(picture, name, preprocess))
    if isinstance(picture, Image.Image):
        return transform(converted(picture, preprocess))
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(
            f"array has dtype {picture.dtype} and shape {picture.shape}; use (H, W, 3) uint8 RGB"
        )
    return transform(Image.fromarray(np.ascontiguousarray(picture)))
