"""Images of one split before they are decoded."""

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
    """Images of one split before decoding, with labels."""

    labels: tuple[int, ...]
    read: Callable[[int], bytes]
    """encoded bytes of image i, or raw RGB bytes where `shape` is set"""
    name: Callable[[int], str]
    """what to call image i in a message"""
    shape: tuple[int, int, int] | None = None
    """(height, width, 3) of raw images"""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """files in class folders that are no images: how many of each suffix"""

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
    """train, and val and test where there are any"""
    notes: tuple[str, ...] = ()
    """what a user should know about the data"""


def file_source(
    paths: list[Path], labels: list[int], left_out: Mapping[str, int] | None = None
) -> Source:
    """Take image files with their labels as the images of a split."""
    return Source(
        tuple(labels),
        read=lambda i: paths[i].read_bytes(),
        name=lambda i: str(paths[i]),
        left_out=Counter(left_out or {}),
    )


def array_source(pixels: Pixels, labels: list[int], title: str) -> Source:
    """Take raw RGB images (N, H, W, 3) with their labels as the images of a split."""
    _, height, width, _ = pixels.shape
    return Source(
        tuple(labels),
        read=lambda i: pixels[i].tobytes(),
        name=lambda i: f"{title} image {i}",
        shape=(height, width, 3),
    )
