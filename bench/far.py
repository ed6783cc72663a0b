"""Make a task far from an encoder's pretraining out of real images.

    python bench/far.py my_images far_images --look thermal

Copies a labelled folder with its classes and splits; the images keep their content and change their
appearance. Pictures are written as PNG.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from matplotlib import colormaps
from PIL import Image, ImageFilter, ImageOps
from tqdm import tqdm

from adavipro_fast import cli
from adavipro_fast.data.folder import folder_sources
from adavipro_fast.data.images import to_rgb

Look = Literal["thermal", "negative", "permuted", "blurred"]


def thermal(image: Image.Image) -> Image.Image:
    """Colour brightness like a thermal camera, with dark as hot."""
    heat = colormaps["inferno"](255 - np.asarray(image.convert("L")), bytes=True)
    return Image.fromarray(heat[..., :3])


def permuted(image: Image.Image) -> Image.Image:
    """Permute the channels red, green, blue to blue, red, green."""
    red, green, blue = image.split()
    return Image.merge("RGB", (blue, red, green))


LOOKS: dict[Look, Callable[[Image.Image], Image.Image]] = {
    "thermal": thermal,
    "negative": ImageOps.invert,
    "permuted": permuted,
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(max(image.size) / 24)),
}


@dataclass(frozen=True)
class FarConfig:
    """Copy a labelled folder with images that look otherwise."""

    source: Annotated[Path, tyro.conf.Positional]
    """folder with train/ [val/] test/<class name>/*"""
    output: Annotated[Path, tyro.conf.Positional]
    """folder to make"""
    look: Look = "thermal"
    """thermal (a palette over inverted brightness), negative, permuted (channels) or blurred"""
    most: int | None = None
    """images a class and split, the first ones by name (default: all)"""


def command(config: FarConfig) -> dict[str, Any]:
    """Copy the images.

    Raises:
        ValueError: the output already exists.
    """
    if config.output.exists():
        raise ValueError(f"{config.output} is there already; name a new folder")
    found = folder_sources(config.source)
    names, sources = found.class_names, found.splits
    counts = {}
    for split, source in sources.items():
        taken: dict[int, int] = dict.fromkeys(range(len(names)), 0)
        for index, label in enumerate(tqdm(source.labels, split, leave=False, disable=None)):
            if config.most is not None and taken[label] == config.most:
                continue
            path = Path(source.name(index))
            target = config.output / split / names[label] / f"{taken[label]:05d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(path) as image:
                LOOKS[config.look](to_rgb(image)).save(target)
            taken[label] += 1
        counts[split] = sum(taken.values())
    return {"path": str(config.output), "look": config.look, **counts}


def main() -> None:
    """Parse, copy, print."""
    cli.main(FarConfig, command)


if __name__ == "__main__":
    main()
