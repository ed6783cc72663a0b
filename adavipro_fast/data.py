"""Data sets, splits and the decoded-image cache.

Images are decoded and resized once, by the encoder's own preprocessing, into a memory-mapped
uint8 file. Its name is a hash of the images' bytes and of the preprocessing, so a changed image or
another encoder makes a new file and a moved folder does not.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from filelock import FileLock
from numpy.lib.format import open_memmap
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from adavipro_fast import demo
from adavipro_fast.clip import Preprocess

HOLDOUT = 0.1
DECODERS = 8


@dataclass(frozen=True)
class DataConfig:
    """Which labelled images are used."""

    data: str = "demo"
    """cifar10, cifar100, demo, or a folder with train/ [val/] test/<class name>/*"""
    data_root: Path = Path("data")
    """where named data sets lie"""
    download: bool = False
    """fetch a named data set where torchvision can"""
    limit_train: int | None = None
    """use this many training images, the same number of each class"""
    cache_dir: Path = field(default_factory=lambda: Path.home() / ".cache" / "adavipro_fast")
    """where decoded images are kept"""


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

    def open(self, index: int) -> Image.Image:
        """Decode image i."""
        content = self.read(index)
        if self.shape is not None:
            return Image.fromarray(np.frombuffer(content, np.uint8).reshape(self.shape))
        return decode_image(content, self.name(index))


def decode_image(content: bytes, name: str) -> Image.Image:
    """Decode a JPEG, PNG, ... completely.

    Raises:
        ValueError: broken, unreadable, or of an absurd size.
    """
    try:
        image = Image.open(BytesIO(content))
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read image {name}: {error}; replace or remove it") from error
    return image


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

    def batches(self, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images in order, in batches of at most `size`."""
        for start in range(0, len(self), size):
            yield self.batch(torch.arange(start, min(start + size, len(self))), device)

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
    splits = {
        name: _decoded(source, preprocess, config.cache_dir, label=f"{config.data} {name}")
        for name, source in sources.items()
    }
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
        if not len(class_names) <= config.limit_train <= len(train):
            raise ValueError(
                f"--limit-train {config.limit_train} is out of range; use {len(class_names)} "
                f"(one image a class) to {len(train)} (all of them)"
            )
        chosen, _ = _stratified(train.labels[train.rows], config.limit_train, seed + 1)
        train = Split(train.images, train.labels, train.rows[chosen])
    return Dataset(class_names, train, splits["val"], splits["test"])


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
        return demo.CLASS_NAMES, {name: _demo_source(name) for name in demo.SPLITS}
    if config.data in TORCHVISION:
        return _torchvision_sources(config)
    return _folder_sources(Path(config.data))


def _demo_source(split: str) -> Source:
    images, labels = demo.task(split)
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    return Source(
        tuple(labels.tolist()),
        read=lambda i: pixels[i].tobytes(),
        name=lambda i: f"demo {split} image {i}",
        shape=pixels.shape[1:],
    )


# Data sets that torchvision reads. The ones in CoOp's format (a folder of images and a
# split_zhou_*.json) belong beside this table.
TORCHVISION: dict[str, Any] = {
    "cifar10": torchvision.datasets.CIFAR10,
    "cifar100": torchvision.datasets.CIFAR100,
}


def _torchvision_sources(config: DataConfig) -> tuple[tuple[str, ...], dict[str, Source]]:
    sources = {}
    for split in ("train", "test"):
        try:
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


def _folder_sources(root: Path) -> tuple[tuple[str, ...], dict[str, Source]]:
    if not root.is_dir():
        raise FileNotFoundError(
            f"no data folder {root}; --data takes a folder, demo, {', '.join(TORCHVISION)}"
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
    if not names:
        raise ValueError(f"{folder} has no class folders; put images in {folder}/<class name>/")
    return names


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
    return Source(tuple(labels), read=lambda i: files[i].read_bytes(), name=lambda i: str(files[i]))


def _decoded(source: Source, preprocess: Preprocess, cache_dir: Path, *, label: str) -> Split:
    """Open the split's cache file, making it first where it is not there."""
    path = cache_dir / f"{_key(source, preprocess)}.npy"
    count = len(source.labels)
    shape = (count, 3, preprocess.size, preprocess.size)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                _fill(path, shape, source, preprocess, label)
        # Copy-on-write: torch wants writable memory, the file stays as it is.
        images = np.load(path, mmap_mode="c")
    except OSError as error:
        raise OSError(f"cannot keep decoded images in {cache_dir}: {error}") from error
    if images.shape != shape or images.dtype != np.uint8:
        raise ValueError(f"{path} is not the cache file it should be; remove it")
    return Split(torch.from_numpy(images), torch.tensor(source.labels), torch.arange(count))


def _key(source: Source, preprocess: Preprocess) -> str:
    digest = hashlib.sha256(json.dumps(asdict(preprocess), sort_keys=True).encode())
    with ThreadPoolExecutor(DECODERS) as pool:
        indices = range(len(source.labels))
        for content in pool.map(lambda i: hashlib.sha256(source.read(i)).digest(), indices):
            digest.update(content)
    return digest.hexdigest()[:32]


def _fill(
    path: Path, shape: tuple[int, ...], source: Source, preprocess: Preprocess, label: str
) -> None:
    partial = path.with_suffix(".partial")
    pixels = open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
    transform = preprocess.pixels()

    def decode(index: int) -> None:
        pixels[index] = transform(source.open(index))

    try:
        with ThreadPoolExecutor(DECODERS) as pool:
            done = pool.map(decode, range(shape[0]))
            for _ in tqdm(done, f"decode {label}", shape[0], unit="image", leave=False):
                pass
        pixels.flush()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
