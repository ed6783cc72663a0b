"""Decode image files, which may come from anyone, to RGB pixels."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from adavipro_fast.data.walk import FORMATS, described, is_raw, walk
from adavipro_fast.method.preprocess import FIRST_DECODING, WHITE, Preprocess

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# A path, an encoded file's bytes, a Pillow image, or (H, W, 3) uint8 RGB pixels.
Picture = str | Path | bytes | Image.Image | np.ndarray[Any, Any]
PICTURES = (str, Path, bytes, Image.Image, np.ndarray)
LARGEST_IMAGE = 100_000_000
# EXIF orientation to what makes an image upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where a PNG says how many bits a value has.
PNG_DEPTH = 24
TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA")
# TIFF's tags.
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
# Of an image whose longer side overhangs the square until it is cropped.
LARGEST_RESIZED = 20_000_000


def images_in(folder: Path) -> list[Path]:
    """List the image files under a folder, by their content, in the order of their names."""
    return walk(folder).images


def decode_image(
    content: bytes, name: str, preprocess: Preprocess, most: int = LARGEST_IMAGE
) -> Image.Image:
    """Decode a JPEG, PNG, ... completely, upright, as RGB with 8 bits.

    Files of an older decoding stay as they lie, and transparent pixels keep their hidden colour.

    Args:
        content: the file's bytes.
        name: what to call it in a message.
        preprocess: the encoder's preprocessing.
        most: pixels that it may have.

    Raises:
        ValueError: broken, unreadable, of an absurd size now or once it is resized, or of pixels
            whose range is not known.
    """
    with read_errors(content, name):
        return loaded(opened(content, name, preprocess, most), content, preprocess)


def decode(
    content: bytes, name: str, preprocess: Preprocess, most: int = LARGEST_IMAGE
) -> Image.Image | Tensor:
    """Decode likewise for `Preprocess.pixels`, which also takes (3, H, W) uint8.

    Unless decoding is `full`, plain JPEGs are decoded by simplejpeg where it is installed: its
    pixels are Pillow's, and lie as an array, which takes Pillow as long again. What it complains of
    is left to Pillow to judge.
    """
    with read_errors(content, name):
        image = opened(content, name, preprocess, most)
        plain = image.format == "JPEG" and image.mode == "RGB" and "transparency" not in image.info
        fast = simplejpeg is not None and preprocess.decode != "full"
        if fast and plain and not scaled_part(image, preprocess):
            with suppress(ValueError):
                pixels = torch.from_numpy(simplejpeg.decode_jpeg(content, "RGB"))
                return turned(pixels.permute(2, 0, 1), orientation_of(image, preprocess))
        return loaded(image, content, preprocess)


@contextmanager
def read_errors(content: bytes, name: str) -> Iterator[None]:
    """Raise ValueError, in one line, for whatever a decoder raises."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError(
            f"cannot read image {name}: {described(content, name)}; replace or remove it"
        ) from error
    # Decoders raise whatever a hostile file leads them to: struct.error, IndexError, KeyError, ...
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"cannot read image {name}: {reason}; replace or remove it") from error


def opened(content: bytes, name: str, preprocess: Preprocess, most: int) -> Image.Image:
    """Read an image's header, and check both sizes that it tells; errors are `decode_image`'s."""
    if is_raw(name):
        raise UnidentifiedImageError
    image = Image.open(BytesIO(content), formats=FORMATS)
    if image.width * image.height > most:
        raise ValueError(f"{image.width}x{image.height} is more than {most} pixels")
    width, height = preprocess.resized(image.width, image.height)
    if not 0 < width * height <= LARGEST_RESIZED:
        raise ValueError(
            f"{image.width}x{image.height} would be resized to {width}x{height}; the limit is "
            f"{LARGEST_RESIZED} pixels"
        )
    return image


def loaded(image: Image.Image, content: bytes, preprocess: Preprocess) -> Image.Image:
    """Decode an image that is opened."""
    if part := scaled_part(image, preprocess):
        image.draft(image.mode, (image.width // part, image.height // part))
    scale_key(image, content)
    image.load()
    return converted(image, preprocess)


def converted(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """Turn an image that Pillow opened upright and into RGB with 8 bits, as the decoding says.

    Raises:
        ValueError: pixels whose range is not known.
    """
    flatten = preprocess.decoding != FIRST_DECODING
    rgb = to_rgb(image, white_level=preprocess.white_level, flatten=flatten)
    turn = TURNS.get(orientation_of(image, preprocess))
    return rgb if turn is None else rgb.transpose(turn)


def scaled_part(image: Image.Image, preprocess: Preprocess) -> int:
    """Return by how much a JPEG is scaled while it is decoded: 8, 4 or 2, or 0 for not at all.

    What is left is at least twice as large as it will be resized to; and the scale divides both
    sides, as it does those of cameras, so that the resized image shows exactly the same.
    """
    if preprocess.decode != "scaled" or image.format not in ("JPEG", "MPO"):
        return 0
    width, height = preprocess.resized(image.width, image.height)
    for part in (8, 4, 2):
        divides = image.width % part == image.height % part == 0
        if divides and image.width >= 2 * width * part and image.height >= 2 * height * part:
            return part
    return 0


def scale_key(image: Image.Image, content: bytes) -> None:
    """Turn a PNG's transparent value into that of the pixels that Pillow gives, of 8 bits."""
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None:
        return
    depth = content[PNG_DEPTH]
    if image.mode == "L" and depth < 8:
        image.info["transparency"] = key * 255 // (2**depth - 1)
    if image.mode == "RGB" and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def orientation_of(image: Image.Image, preprocess: Preprocess) -> int:
    """Return an image's EXIF orientation; 1, upright, where it has none or it is ignored."""
    if preprocess.decoding == FIRST_DECODING:
        return 1
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    # Cameras and editors write EXIF that cannot be read; the pixels can.
    except Exception:
        return 1


def turned(pixels: Tensor, orientation: int) -> Tensor:
    """Turn (C, H, W) upright."""
    turn, names = TURNS.get(orientation), Image.Transpose
    if turn in (names.ROTATE_90, names.ROTATE_180, names.ROTATE_270):
        return pixels.rot90({names.ROTATE_90: 1, names.ROTATE_180: 2}.get(turn, 3), (1, 2))
    if turn in (names.TRANSPOSE, names.TRANSVERSE):
        pixels = pixels.transpose(1, 2)
    flipped = {names.FLIP_LEFT_RIGHT: [2], names.FLIP_TOP_BOTTOM: [1], names.TRANSVERSE: [1, 2]}
    return pixels.flip(flipped[turn]) if turn in flipped else pixels


def to_rgb(image: Image.Image, *, white_level: int = WHITE, flatten: bool = True) -> Image.Image:
    """Convert to RGB with 8 bits, before anything is resized: palettes do not mix.

    Args:
        image: as Pillow opened it.
        white_level: value of white in 16-bit grey images. Their largest value is kept in the
            result's `info` as `peak`.
        flatten: put transparent images on white.

    Raises:
        ValueError: grey pixels of neither 8 nor 16 bits, whose range is not known.
    """
    # Pillow gives 16-bit files of some formats 32 bits.
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not wide:
        raise ValueError("its pixels have 32 bits and an unknown range; save it with 8 or 16 bits")
    if wide:
        tags = getattr(image, "tag_v2", {})
        if tags.get(BITS_PER_SAMPLE, (16,)) != (16,) or tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
            raise ValueError(
                "its grey values do not run from 0 (black) to 65535 (white); save it as PNG"
            )
        pixels = np.asarray(image)
        narrow = np.empty(pixels.shape, np.uint8)
        # In parts, whose wider numbers take little room.
        for part, row in zip(
            *(np.array_split(a.ravel(), 100) for a in (narrow, pixels)), strict=True
        ):
            wider = np.minimum(row, white_level).astype(np.uint32)
            part[:] = (wider * 255 + white_level // 2) // white_level
        if flatten and isinstance(image.info.get("transparency"), int):
            narrow[pixels == image.info["transparency"]] = 255
        converted = Image.fromarray(narrow).convert("RGB")
        converted.info["peak"] = int(pixels.max())
        return converted
    transparent = "transparency" in image.info
    if flatten and (transparent or image.mode in TRANSPARENT):
        straight = image.convert("LA") if image.mode == "La" else image
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, straight.convert("RGBA")).convert("RGB")
    if image.mode == "RGB" and not transparent:
        # Converted, it would be copied.
        return image
    # Without this, Pillow warns of palettes that are transparent in part.
    return (image.convert("RGBA") if transparent else image).convert("RGB")


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
            raise FileNotFoundError(f"no such image file: {path}")
    return torch.from_numpy(
        np.stack([transform(decode(path.read_bytes(), str(path), preprocess)) for path in paths])
    )


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
