"""Decode untrusted image files to RGB pixels."""

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
# EXIF orientation to the operation that makes the image upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Offset of the bit depth in a PNG file.
PNG_DEPTH = 24
TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA")
# Tags of TIFF.
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
# Pixels of an image after resizing and before cropping: its longer side overhangs the square.
LARGEST_RESIZED = 20_000_000


def images_in(folder: Path) -> list[Path]:
    """List the image files under a folder, by their content, in the order of their names."""
    return walk(folder).images


def decode_image(
    content: bytes, name: str, preprocess: Preprocess, most: int = LARGEST_IMAGE
) -> Image.Image:
    """Decode a JPEG, PNG, ... completely to upright 8-bit RGB.

    With the first version of the decoding, images are not turned upright, and transparent pixels
    keep their hidden colour.

    Args:
        content: the file's bytes.
        name: name of the image in messages.
        preprocess: the encoder's preprocessing.
        most: largest number of pixels.

    Raises:
        ValueError: the file is damaged or unreadable, the image is too large before or after
            resizing, or the range of its pixels is not known.
    """
    with read_errors(content, name):
        return loaded(opened(content, name, preprocess, most), content, preprocess)


def decode(
    content: bytes, name: str, preprocess: Preprocess, most: int = LARGEST_IMAGE
) -> Image.Image | Tensor:
    """Decode like `decode_image`, but maybe to (3, H, W) uint8, which `Preprocess.pixels` accepts.

    Unless decoding is `full`, plain JPEGs are decoded by simplejpeg where it is installed. Its
    pixels equal Pillow's and come as an array; converting Pillow's image to one takes as long as
    decoding. Files that simplejpeg rejects are decoded by Pillow.
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
    """Turn any exception of a decoder into a ValueError with a one-line message."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError(
            f"cannot read image {name}: {described(content, name)}; replace or remove it"
        ) from error
    # A hostile file can make decoders raise anything: struct.error, IndexError, KeyError, ...
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"cannot read image {name}: {reason}; replace or remove it") from error


def opened(content: bytes, name: str, preprocess: Preprocess, most: int) -> Image.Image:
    """Read an image's header and check its size before and after resizing.

    Raises the errors of `decode_image`.
    """
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
    """Decode an opened image."""
    if part := scaled_part(image, preprocess):
        image.draft(image.mode, (image.width // part, image.height // part))
    scale_key(image, content)
    image.load()
    return converted(image, preprocess)


def converted(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """Convert an image that Pillow opened to upright 8-bit RGB, by the decoding's version.

    Raises:
        ValueError: the range of the pixels is not known.
    """
    flatten = preprocess.decoding != FIRST_DECODING
    rgb = to_rgb(image, white_level=preprocess.white_level, flatten=flatten)
    turn = TURNS.get(orientation_of(image, preprocess))
    return rgb if turn is None else rgb.transpose(turn)


def scaled_part(image: Image.Image, preprocess: Preprocess) -> int:
    """Return the factor by which a JPEG is reduced while it is decoded: 8, 4 or 2; 0 for none.

    The reduced image is at least twice as large as its resized version. The factor divides both
    sides, as it does for photos of most cameras, so the resized image shows the same section.
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
    """Convert a PNG's transparent value to the 8-bit range of Pillow's pixels."""
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None:
        return
    depth = content[PNG_DEPTH]
    if image.mode == "L" and depth < 8:
        image.info["transparency"] = key * 255 // (2**depth - 1)
    if image.mode == "RGB" and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def orientation_of(image: Image.Image, preprocess: Preprocess) -> int:
    """Return an image's EXIF orientation; 1 (upright) if it is missing or ignored."""
    if preprocess.decoding == FIRST_DECODING:
        return 1
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    # Some cameras and editors write invalid EXIF beside valid pixels.
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
    """Convert to 8-bit RGB. Convert before resizing, since palette indices cannot be interpolated.

    Args:
        image: as Pillow opened it.
        white_level: value of white in 16-bit grey images. Their largest value is kept in the
            result's `info` as `peak`.
        flatten: composite transparent images over white.

    Raises:
        ValueError: the grey pixels have neither 8 nor 16 bits, so their range is not known.
    """
    # Pillow opens 16-bit files of some formats with 32 bits.
    grey16 = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not grey16:
        raise ValueError("its pixels have 32 bits and an unknown range; save it with 8 or 16 bits")
    if grey16:
        tags = getattr(image, "tag_v2", {})
        if tags.get(BITS_PER_SAMPLE, (16,)) != (16,) or tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
            raise ValueError(
                "its grey values do not run from 0 (black) to 65535 (white); save it as PNG"
            )
        pixels = np.asarray(image)
        narrow = np.empty(pixels.shape, np.uint8)
        # In parts, so that the uint32 copies need little memory.
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
        # Return it directly: convert() would copy it.
        return image
    # Via RGBA, because Pillow warns about partly transparent palettes.
    return (image.convert("RGBA") if transparent else image).convert("RGB")


def unresized(image: Image.Image) -> Tensor:
    """Return an RGB image as (1, 3, H, W) uint8, the input of a graph that resizes."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def read_pixels(paths: tuple[Path, ...], preprocess: Preprocess) -> Tensor:
    """Decode image files to the encoder's input: (N, 3, S, S) uint8.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is not a readable image.
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
    """Decode a picture to the encoder's input: (3, S, S) uint8.

    Args:
        picture: a path, encoded bytes, a Pillow image, or (H, W, 3) uint8 RGB.
        preprocess: the encoder's.
        name: name of encoded bytes in messages.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the picture cannot be read.
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
