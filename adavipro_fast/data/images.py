"""Decode image files, which may come from anyone, to RGB pixels."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from adavipro_fast.method.preprocess import Preprocess

# What torchvision calls an image, without formats that start other programs or hold scripts.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
LARGEST_IMAGE = 100_000_000
# TIFF's tags.
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
# Of an image whose longer side overhangs the square until it is cropped.
LARGEST_RESIZED = 20_000_000


def images_in(folder: Path) -> list[Path]:
    """List the image files under a folder, in the order of their names."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)


def decode_image(
    content: bytes, name: str, preprocess: Preprocess, most: int = LARGEST_IMAGE
) -> Image.Image:
    """Decode a JPEG, PNG, ... completely, as RGB with 8 bits.

    Args:
        content: the file's bytes.
        name: what to call it in a message.
        preprocess: the encoder's preprocessing.
        most: pixels that it may have.

    Raises:
        ValueError: broken, unreadable, of an absurd size now or once it is resized, or of pixels
            whose range is not known.
    """
    try:
        image = Image.open(BytesIO(content), formats=FORMATS)
        # Both sizes are told by the header.
        if image.width * image.height > most:
            raise ValueError(f"{image.width}x{image.height} is more than {most} pixels")
        width, height = preprocess.resized(image.width, image.height)
        if not 0 < width * height <= LARGEST_RESIZED:
            raise ValueError(
                f"{image.width}x{image.height} would be resized to {width}x{height}; up to "
                f"{LARGEST_RESIZED} pixels work"
            )
        image.load()
        return to_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError(
            f"cannot read image {name}: it is none of {', '.join(FORMATS)}; replace or remove it"
        ) from error
    # Decoders raise whatever a hostile file leads them to: struct.error, IndexError, KeyError, ...
    except Exception as error:
        raise ValueError(f"cannot read image {name}: {error}; replace or remove it") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB with 8 bits, before anything is resized: palettes do not mix.

    Raises:
        ValueError: grey pixels of neither 8 nor 16 bits, whose range is not known.
    """
    # Pillow gives 16-bit files of some formats 32 bits.
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not wide:
        raise ValueError("its pixels have 32 bits and no known range; save it with 8 or 16")
    if wide:
        tags = getattr(image, "tag_v2", {})
        if tags.get(BITS_PER_SAMPLE, (16,)) != (16,) or tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
            raise ValueError("its grey pixels are not 0 to 65535, black to white; save it as PNG")
        pixels = np.asarray(image)
        narrow = np.empty(pixels.shape, np.uint8)
        # In parts, whose wider numbers take little room.
        for part, row in zip(
            *(np.array_split(a.ravel(), 100) for a in (narrow, pixels)), strict=True
        ):
            part[:] = (row.astype(np.uint32) + 128) // 257
        return Image.fromarray(narrow).convert("RGB")
    # Without this, Pillow warns of palettes that are transparent in part.
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def unresized(image: Image.Image) -> Tensor:
    """Return an RGB image as a graph takes it that resizes by itself: (1, 3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def read_pixels(paths: tuple[Path, ...], preprocess: Preprocess) -> Tensor:
    """Decode image files as the encoder wants them: (N, 3, S, S) uint8.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image.
    """
    transform = preprocess.pixels()
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no image file {path}")
    return torch.from_numpy(
        np.stack(
            [transform(decode_image(path.read_bytes(), str(path), preprocess)) for path in paths]
        )
    )
