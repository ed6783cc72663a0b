"""Preprocessing: turn an image into the encoder's input."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from adavipro_fast.method.config import LARGEST_SIDE

INTERPOLATIONS = ("bicubic", "bilinear", "random")
RESIZE_MODES = ("shortest", "longest", "squash")
Decode = Literal["full", "fast", "scaled"]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
# Versions of the decoding to RGB pixels. 3 applies the EXIF orientation and composites transparent
# images over white; 2 ignores orientation and transparency, and applies to files without a version.
DECODING, FIRST_DECODING = 3, 2
# Largest value of 16-bit grey images.
WHITE = 65535
# Settings that files leave out if they have these values.
UNSET: dict[str, Any] = {
    "margin": 0,
    "crop": 1,
    "decoding": FIRST_DECODING,
    "decode": "full",
    "white_level": WHITE,
}


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the encoder's input; stored in the checkpoint."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    resize_mode: str
    margin: int = 0
    """pixels on each side filled with the mean colour; the image is shrunk to fit inside"""
    crop: float = 1.0
    """share of the resized image's shorter side that the centre crop keeps (timm's crop_pct)"""
    decoding: int = DECODING
    """version of the decoding to RGB pixels, 2 or 3"""
    decode: Decode = "full"
    """full resizes with Pillow; fast resizes with PyTorch, in a tenth of the time and within two
    grey levels; scaled also decodes large JPEGs at a half, a quarter or an eighth of their size"""
    white_level: int = WHITE
    """value of white in 16-bit grey images; 4095 for 12-bit cameras"""

    def __post_init__(self) -> None:
        if not 1 <= self.size <= LARGEST_SIDE:
            raise ValueError(f"image side is {self.size}; use 1 to {LARGEST_SIDE}")
        if not 0 <= self.margin < self.size / 2:
            raise ValueError(
                f"margin {self.margin} leaves no image of side {self.size}; "
                f"use 0 to {(self.size - 1) // 2}"
            )
        if not (len(self.mean) == len(self.std) == 3):
            raise ValueError("mean and std must have three values")
        if not all(map(math.isfinite, self.mean + self.std)) or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} or std {self.std} cannot normalise an image")
        if not 0.1 <= self.crop <= 1 or (self.crop != 1 and self.resize_mode != "shortest"):
            raise ValueError(
                f"crop {self.crop} with resize mode {self.resize_mode!r} is not supported"
            )
        if self.decoding not in (FIRST_DECODING, DECODING):
            raise ValueError(
                f"decoding version {self.decoding} is unknown; this release supports "
                f"{FIRST_DECODING} and {DECODING}"
            )
        if not 255 <= self.white_level <= WHITE:
            raise ValueError(f"white_level is {self.white_level}; use 255 to {WHITE}")
        if self.interpolation not in INTERPOLATIONS or self.resize_mode not in RESIZE_MODES:
            raise ValueError(
                f"interpolation {self.interpolation!r} with resize mode {self.resize_mode!r} is "
                f"unknown; use {', '.join(INTERPOLATIONS)} and {', '.join(RESIZE_MODES)}"
            )

    def stored(self) -> dict[str, Any]:
        """Return the values that files store: open_clip's settings, and others if not default."""
        values = asdict(self)
        for name, unset in UNSET.items():
            if values[name] == unset:
                del values[name]
        return values

    @property
    def inner(self) -> int:
        """Side of the image inside the margin."""
        return self.size - 2 * self.margin

    @property
    def shorter(self) -> int:
        """The shorter side after resizing and before the crop, rounded as in timm."""
        return math.floor(self.inner / self.crop)

    def cropped(self, resized: Any) -> tuple[Any, Any]:
        """Return how many pixels the centre crop removes at either end of a resized side."""
        over = resized - self.inner
        # Halves round to the even number, as in torchvision's crop.
        begin = over // 2 + (over % 2) * ((over // 2) % 2)
        return begin, over - begin

    @property
    def colour(self) -> Tensor:
        """Colour of the margin: the mean, (3,) uint8."""
        return (255 * torch.tensor(self.mean).double().clamp(0, 1)).round().to(torch.uint8)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return an image's (width, height) after resizing and before the crop."""
        side = self.shorter
        if self.resize_mode == "squash":
            return side, side
        if self.resize_mode == "longest":
            ratio = max(width / side, height / side)
            return round(width / ratio), round(height / ratio)
        by = min(width, height)
        return side * width // by, side * height // by

    def pixels(self) -> Callable[[Image.Image | Tensor], Pixels]:
        """Return a function that applies open_clip's preprocessing and adds the margin.

        Its argument is an RGB image, from Pillow or (3, H, W) uint8; it returns (3, S, S) uint8.
        """
        return _transform(self)

    def scaled(self, image: Image.Image | Tensor, width: int, height: int) -> Image.Image:
        """Resize an RGB image, antialiased."""
        bilinear = self.interpolation == "bilinear"
        if self.decode != "full":
            if isinstance(image, Image.Image):
                image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            mode = "bilinear" if bilinear else "bicubic"
            resized = F.interpolate(image[None], size=(height, width), mode=mode, antialias=True)[0]
            return Image.fromarray(resized.permute(1, 2, 0).numpy())
        if isinstance(image, Tensor):
            image = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        kernel = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
        # Resize each axis in its own step. Otherwise Pillow 13 resizes columns first where that is
        # less work and rounds in between, so its pixels differ from Pillow 12's and our graphs'.
        return image.resize((width, image.height), kernel).resize((width, height), kernel)

    def fitted(self, resized: Image.Image) -> Image.Image:
        """Crop a resized image around its centre, or pad it with black."""
        left, top = (
            -((self.inner - side) // 2) if side < self.inner else self.cropped(side)[0]
            for side in resized.size
        )
        # Pillow fills what lies outside the image with black.
        return resized.crop((left, top, left + self.inner, top + self.inner))


@cache
def _transform(preprocess: Preprocess) -> Callable[[Image.Image | Tensor], Pixels]:
    colour = tuple(preprocess.colour.tolist())

    def apply(image: Image.Image | Tensor) -> Pixels:
        size = (image.shape[2], image.shape[1]) if isinstance(image, Tensor) else image.size
        resized = preprocess.scaled(image, *preprocess.resized(*size))
        resized = ImageOps.expand(preprocess.fitted(resized), preprocess.margin, colour)
        return np.asarray(resized, dtype=np.uint8).transpose(2, 0, 1)

    return apply


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add the defaults that `Preprocess.stored` left out, for older files too."""
    return UNSET | dict(values)
