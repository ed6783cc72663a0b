"""Data sets and their splits: folders, torchvision's, and those in CoOp's format."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from filelock import FileLock
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from adavipro_fast import world
from adavipro_fast.cache import DEFAULT_DIR, Source, decoded
from adavipro_fast.clip import Preprocess

HOLDOUT = 0.1
LARGEST_LIST = 512 * 2**20


@dataclass(frozen=True)
class DataConfig:
    """Which labelled images are used."""

    data: str = "demo"
    """a folder with train/ [val/] test/<class name>/*, demo, cifar10, cifar100, dtd, eurosat,
    flowers102, food101, pets, sun397 or ucf101"""
    data_root: Path = Path("data")
    """where named data sets lie"""
    download: bool = False
    """fetch a named data set where torchvision can"""
    limit_train: int | None = None
    """use at most this many training images, the same number of each class"""
    cache_dir: Path = DEFAULT_DIR
    """where decoded images are kept"""
    cache_limit_gb: float = 100.0
    """most that is kept there, 10^9 bytes; images used longest ago go first"""

    def __post_init__(self) -> None:
        if not 0 <= self.cache_limit_gb < math.inf:
            raise ValueError(f"cache_limit_gb is {self.cache_limit_gb}; a number from 0 is needed")


@dataclass(frozen=True)
class Split:
    """Decoded images of one split.

    images: (N, 3, S, S) uint8, memory-mapped or on the device; rows: (n,) indices in use.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Gather images (B, 3, S, S) uint8 and labels (B,) at positions (B,) onto the device."""
        rows = self.rows[positions]
        images = self.images[rows.to(self.images.device)]
        return images.to(device, non_blocking=True), self.labels[rows].to(device)

    def batches(
        self, size: int, device: torch.device, *, part: int = 0, of: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images in order, in batches of at most `size`; of these every `of`-th one."""
        for positions in torch.arange(len(self)).split(size)[part::of]:
            yield self.batch(positions, device)

    def resident(self, device: torch.device) -> "Split":
        """Keep the images on a CUDA device where they take at most half of its free memory."""
        if device.type != "cuda":
            return self
        free, _ = torch.cuda.mem_get_info(device)
        if self.images[:1].numel() * len(self) > free // 2:
            return self
        images = self.images[self.rows].to(device)
        return Split(images, self.labels[self.rows], torch.arange(len(self)))


@dataclass(frozen=True)
class Dataset:
    """A labelled data set: class names in label order and its three splits."""

    class_names: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    sha256: str
    """of names, labels and pixels before the splits are cut"""


def load_dataset(config: DataConfig, preprocess: Preprocess, *, seed: int = 0) -> Dataset:
    """Read, decode and split a data set.

    Args:
        config: which one.
        preprocess: the encoder's preprocessing.
        seed: of the held-out validation images and of `limit_train`.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ValueError: an image cannot be read, a class is empty, or splits disagree on the classes.
    """
    class_names, sources = _sources(config)
    splits, digest = {}, hashlib.sha256(json.dumps(class_names).encode())
    for name, source in sources.items():
        splits[name], key = _decoded(config, name, source, preprocess)
        digest.update(f"{name} {key} {source.labels}".encode())
    train = splits["train"]
    if "val" not in splits:
        held, kept = _stratified(train.labels, round(HOLDOUT * len(train)), seed)
        if len(held) == 0 or len(kept) == 0:
            raise ValueError(
                f"{config.data} has {len(train)} training images: too few to hold a validation "
                "split out; add images or a val/ folder"
            )
        splits["val"] = Split(train.images, train.labels, held)
        train = Split(train.images, train.labels, kept)
    if config.limit_train is not None:
        if config.limit_train < len(class_names):
            raise ValueError(
                f"--limit-train {config.limit_train} is less than one image a class; "
                f"use {len(class_names)} or more"
            )
        limit = min(config.limit_train, len(train))
        chosen, _ = _stratified(train.labels[train.rows], limit, seed + 1)
        train = Split(train.images, train.labels, train.rows[chosen])
    return Dataset(class_names, train, splits["val"], splits["test"], digest.hexdigest())


def load_test(config: DataConfig, preprocess: Preprocess) -> tuple[tuple[str, ...], Split]:
    """Read the test split alone: class names and images; errors are `load_dataset`'s."""
    class_names, sources = _sources(config)
    return class_names, _decoded(config, "test", sources["test"], preprocess)[0]


def _decoded(
    config: DataConfig, name: str, source: Source, preprocess: Preprocess
) -> tuple[Split, str]:
    images, key = decoded(
        source,
        preprocess,
        config.cache_dir,
        label=f"{config.data} {name}",
        limit=int(1e9 * config.cache_limit_gb),
    )
    labels = torch.tensor(source.labels)
    return Split(torch.from_numpy(images), labels, torch.arange(len(labels))), key


def _stratified(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose `count` positions spread evenly over the classes; return (chosen, others), sorted."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    # Number each image within its class, then take the images with the lowest numbers.
    rank = torch.zeros_like(shuffled)
    for label in labels.unique():
        members = labels[shuffled] == label
        rank[members] = torch.arange(int(members.sum()))
    order = shuffled[torch.argsort(rank, stable=True)]
    return order[:count].sort().values, order[count:].sort().values


def _sources(config: DataConfig) -> tuple[tuple[str, ...], dict[str, Source]]:
    if config.data == "demo":
        return world.CLASS_NAMES, {name: _demo_source(name) for name in world.SPLITS}
    if config.data in TORCHVISION:
        return _torchvision_sources(config)
    if config.data in COOP:
        return coop_sources(COOP[config.data], config.data_root)
    return _folder_sources(Path(config.data))


def _demo_source(split: str) -> Source:
    images, labels = world.task(split)
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    return Source(
        tuple(labels.tolist()),
        read=lambda i: pixels[i].tobytes(),
        name=lambda i: f"demo {split} image {i}",
        shape=pixels.shape[1:],
    )


# Data sets that torchvision reads.
TORCHVISION: dict[str, Any] = {
    "cifar10": torchvision.datasets.CIFAR10,
    "cifar100": torchvision.datasets.CIFAR100,
}


@contextmanager
def _download_lock(config: DataConfig) -> Iterator[None]:
    if not config.download:
        yield
        return
    config.data_root.mkdir(parents=True, exist_ok=True)
    with FileLock(config.data_root / f".{config.data}.lock"):
        yield


def _torchvision_sources(config: DataConfig) -> tuple[tuple[str, ...], dict[str, Source]]:
    sources = {}
    for split in ("train", "test"):
        try:
            # Of several processes one downloads.
            with _download_lock(config):
                data = TORCHVISION[config.data](
                    config.data_root, train=split == "train", download=config.download
                )
        except RuntimeError as error:
            raise FileNotFoundError(
                f"{config.data} is not complete under {config.data_root}: {error} "
                "Name its folder with --data-root, or add --download"
            ) from error
        sources[split] = _array_source(data, f"{config.data} {split}")
    return tuple(data.classes), sources


def _array_source(data: Any, title: str) -> Source:
    return Source(
        tuple(data.targets),
        read=lambda i: bytes(data.data[i].tobytes()),
        name=lambda i: f"{title} image {i}",
        shape=data.data.shape[1:],
    )


@dataclass(frozen=True)
class Coop:
    """Where CoOp keeps a data set: a folder of images and a json of its splits."""

    folder: str
    images: str
    split: str
    origin: str
    """where the images officially come from"""


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
# What CoOp calls EuroSAT's classes, whose folder names are no English.
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
        layout: where its parts lie under the root.
        root: folder of all data sets.

    Returns:
        Class names in label order, and the three splits.

    Raises:
        FileNotFoundError: json, folder or an image is missing.
        ValueError: the json is not what it should be.
    """
    folder = root / layout.folder
    wanted = (
        f"expected {folder / layout.images}/... from {layout.origin} and {folder / layout.split} "
        "from CoOp (github.com/KaiyangZhou/CoOp); name the folder above with --data-root"
    )
    for path in (folder / layout.split, folder / layout.images):
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing; {wanted}")
    splits = read_split(folder / layout.split)
    names: dict[int, str] = {}
    for label, name in (entry[1:] for entries in splits.values() for entry in entries):
        if names.setdefault(label, name) != name:
            raise ValueError(
                f"{folder / layout.split} calls class {label} both {names[label]!r} and {name!r}"
            )
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{folder / layout.split} has labels that are not 0 to {len(names) - 1}")
    sources = {}
    for split, entries in splits.items():
        paths = [folder / layout.images / entry[0] for entry in entries]
        missing = next((path for path in paths if not path.is_file()), None)
        if missing is not None:
            raise FileNotFoundError(f"{missing} is missing; {wanted}")
        sources[split] = _file_source(paths, [entry[1] for entry in entries])
    class_names = tuple(EUROSAT.get(names[i], names[i]) for i in range(len(names)))
    return class_names, sources


def read_split(path: Path) -> dict[str, list[tuple[str, int, str]]]:
    """Read a split_zhou_*.json: train, val and test lists of (path, label, class name).

    Raises:
        ValueError: it is not of this form, or a path leads out of the folder.
    """
    try:
        if path.stat().st_size > LARGEST_LIST:
            raise ValueError(f"it is larger than {LARGEST_LIST} bytes")
        content = json.loads(path.read_bytes())
        splits = {name: [_entry(row) for row in content[name]] for name in ("train", "val", "test")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a split of CoOp's form: {error!r}") from error
    if not all(splits.values()):
        raise ValueError(f"{path} has an empty split")
    return splits


def _entry(row: Any) -> tuple[str, int, str]:
    path, label, name = row
    if not (type(path) is str and type(label) is int and type(name) is str):
        raise ValueError(f"{row!r} is not [path, label, class name]")
    if Path(path).is_absolute() or ".." in Path(path).parts or "\0" in path:
        raise ValueError(f"path {path!r} leads out of the folder")
    return path, label, name


def _file_source(paths: list[Path], labels: list[int]) -> Source:
    return Source(tuple(labels), read=lambda i: paths[i].read_bytes(), name=lambda i: str(paths[i]))


def _folder_sources(root: Path) -> tuple[tuple[str, ...], dict[str, Source]]:
    if not root.is_dir():
        raise FileNotFoundError(
            f"no data folder {root}; --data takes a folder, demo, "
            f"{', '.join(sorted([*TORCHVISION, *COOP]))}"
        )
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise FileNotFoundError(f"{root} has no folder {split}/; its classes belong there")
    names = [name for name in ("train", "val", "test") if (root / name).is_dir()]
    classes = {name: _class_folders(root / name) for name in names}
    for split, found in classes.items():
        odd = sorted(set(found) ^ set(classes["train"]))
        if odd:
            raise ValueError(
                f"class {odd[0]!r} is in only one of {root / 'train'} and {root / split}; "
                "every split needs the same classes"
            )
    class_names = tuple(classes["train"])
    return class_names, {name: _folder_source(root / name, class_names) for name in names}


def _class_folders(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    for name in names:
        # The file system's bytes are no text: they could not be stored or shown.
        if not name.isprintable() and not _is_text(name):
            raise ValueError(f"class folder {name!r} in {folder} is not UTF-8; rename it")
    if not names:
        raise ValueError(f"{folder} has no class folders; put images in {folder}/<class name>/")
    return names


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _folder_source(folder: Path, class_names: tuple[str, ...]) -> Source:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = sorted(
            path
            for path in (folder / name).rglob("*")
            if path.suffix.lower() in IMG_EXTENSIONS and path.is_file()
        )
        if not found:
            raise ValueError(f"{folder / name} holds no image; remove the class or add images")
        files += found
        labels += [label] * len(found)
    return _file_source(files, labels)
