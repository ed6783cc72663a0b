"""Data sets in CoOp's format: a folder of images and a json of its splits."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adavipro_fast.data.source import Source, file_source

LARGEST_LIST = 512 * 2**20


@dataclass(frozen=True)
class Coop:
    """Where CoOp keeps a data set: a folder of images and a json of its splits."""

    folder: str
    images: str
    split: str
    origin: str
    """official source of the images"""


COOP = {
    "dtd": Coop(
        "dtd",
        "images",
        "split_zhou_DescribableTextures.json",
        "robots.ox.ac.uk/~vgg/data/dtd",
    ),
    "eurosat": Coop("eurosat", "2750", "split_zhou_EuroSAT.json", "github.com/phelber/EuroSAT"),
    "flowers102": Coop(
        "oxford_flowers",
        "jpg",
        "split_zhou_OxfordFlowers.json",
        "robots.ox.ac.uk/~vgg/data/flowers/102",
    ),
    "food101": Coop(
        "food-101",
        "images",
        "split_zhou_Food101.json",
        "data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
    ),
    "pets": Coop(
        "oxford_pets", "images", "split_zhou_OxfordPets.json", "robots.ox.ac.uk/~vgg/data/pets"
    ),
    "sun397": Coop(
        "sun397", "SUN397", "split_zhou_SUN397.json", "vision.princeton.edu/projects/2010/SUN"
    ),
    "ucf101": Coop(
        "ucf101",
        "UCF-101-midframes",
        "split_zhou_UCF101.json",
        "crcv.ucf.edu/data/UCF101.php (CoOp's middle frames)",
    ),
}
# CoOp's names for EuroSAT's classes, whose folder names are not readable English.
EUROSAT = {
    "AnnualCrop": "Annual Crop Land",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "SeaLake": "Sea or Lake",
}


def coop_sources(layout: Coop, root: Path) -> tuple[tuple[str, ...], dict[str, Source]]:
    """Read a data set in CoOp's format.

    Args:
        layout: paths of its parts under the root.
        root: folder of all data sets.

    Returns:
        Class names in label order, and the three splits.

    Raises:
        FileNotFoundError: the json, the folder or an image is missing.
        ValueError: the json is invalid.
    """
    folder = root / layout.folder
    expected = (
        f"expected {folder / layout.images}/... from {layout.origin} and {folder / layout.split} "
        "from CoOp (github.com/KaiyangZhou/CoOp); set --data-root to the parent folder"
    )
    for path in (folder / layout.split, folder / layout.images):
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing; {expected}")
    splits = read_split(folder / layout.split)
    names: dict[int, str] = {}
    for label, name in (entry[1:] for entries in splits.values() for entry in entries):
        if names.setdefault(label, name) != name:
            raise ValueError(
                f"{folder / layout.split} names class {label} both {names[label]!r} and {name!r}"
            )
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{folder / layout.split} has labels that are not 0 to {len(names) - 1}")
    sources = {}
    for split, entries in splits.items():
        paths = [folder / layout.images / entry[0] for entry in entries]
        missing = next((path for path in paths if not path.is_file()), None)
        if missing is not None:
            raise FileNotFoundError(f"{missing} is missing; {expected}")
        sources[split] = file_source(paths, [entry[1] for entry in entries])
    class_names = tuple(EUROSAT.get(names[i], names[i]) for i in range(len(names)))
    return class_names, sources


def read_split(path: Path) -> dict[str, list[tuple[str, int, str]]]:
    """Read a split_zhou_*.json: train, val and test lists of (path, label, class name).

    Raises:
        ValueError: the file is not of this form, or a path points outside the folder.
    """
    try:
        if path.stat().st_size > LARGEST_LIST:
            raise ValueError(f"it is larger than {LARGEST_LIST} bytes")
        content = json.loads(path.read_bytes())
        splits = {name: [_entry(row) for row in content[name]] for name in ("train", "val", "test")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a split file of CoOp: {error!r}") from error
    if not all(splits.values()):
        raise ValueError(f"{path} has an empty split")
    return splits


def _entry(row: Any) -> tuple[str, int, str]:
    path, label, name = row
    if not (type(path) is str and type(label) is int and type(name) is str):
        raise ValueError(f"{row!r} is not [path, label, class name]")
    if Path(path).is_absolute() or ".." in Path(path).parts or "\0" in path:
        raise ValueError(f"path {path!r} points outside the folder")
    return path, label, name
