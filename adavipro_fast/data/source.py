"""The encoded images of a split."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from adavipro_fast.data.images import decode
from adavipro_fast.method.preprocess import Pixels, Preprocess


@dataclass(frozen=True)
class Source:
    """The images of a split before decoding, with labels."""

    labels: tuple[int, ...]
    read: Callable[[int], bytes]
    """encoded bytes of image i, or raw RGB bytes where `shape` is set"""
    name: Callable[[int], str]
    """name of image i in messages"""
    shape: tuple[int, int, int] | None = None
    """(height, width, 3) of raw images"""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """number of files in class folders that are not images, by suffix"""

    def open(self, index: int, preprocess: Preprocess) -> Image.Image | Tensor:
        """Decode image i, for `Preprocess.pixels`."""
        content = self.read(index)
        if self.shape is not None:
            return Image.fromarray(np.frombuffer(content, np.uint8).reshape(self.shape))
        return decode(content, self.name(index), preprocess)


@dataclass(frozen=True)
class Sources:
    """A labelled data set before decoding: class names in label order, and its splits."""

    class_names: tuple[str, ...]
    splits: dict[str, Source]
    """train, and val and test if they exist"""
    notes: tuple[str, ...] = ()
    """messages to the user about the data"""


def file_source(
    paths: list[Path], labels: list[int], left_out: Mapping[str, int] | None = None
) -> Source:
    """Make a source of image files and their labels."""
    return Source(
        tuple(labels),
        read=lambda i: paths[i].read_bytes(),
        name=lambda i: str(paths[i]),
        left_out=Counter(left_out or {}),
    )


def array_source(pixels: Pixels, labels: list[int], title: str) -> Source:
    """Make a source of raw RGB images (N, H, W, 3) and their labels."""
    _, height, width, _ = pixels.shape
    return Source(
        tuple(labels),
        read=lambda i: pixels[i].tobytes(),
        name=lambda i: f"{title} image {i}",
        shape=(height, width, 3),
    )
