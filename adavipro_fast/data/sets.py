"""Labelled data sets: which images, cut into which splits."""

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

from adavipro_fast.data import world
from adavipro_fast.data.cache import DEFAULT_DIR, decoded
from adavipro_fast.data.coop import COOP, coop_sources
from adavipro_fast.data.digits import digits_sources
from adavipro_fast.data.folder import folder_sources
from adavipro_fast.data.source import Source, array_source
from adavipro_fast.data.split import Split, stratified
from adavipro_fast.method.preprocess import Preprocess

HOLDOUT = 0.1


@dataclass(frozen=True)
class DataConfig:
    """Which labelled images are used."""

    data: str = "demo"
    """a folder with train/ [val/] test/<class name>/*, demo, digits, cifar10, cifar100, dtd,
    eurosat, flowers102, food101, pets, sun397 or ucf101"""
    data_root: Path = Path("data")
    """where named data sets lie"""
    download: bool = False
    """fetch a named data set where torchvision can"""
    limit_train: int | None = None
    """use at most this many training images, the same share of each class"""
    cache_dir: Path = DEFAULT_DIR
    """where decoded images are kept"""
    cache_limit_gb: float = 100.0
    """most that is kept there, 10^9 bytes; images used longest ago go first"""

    def __post_init__(self) -> None:
        if not 0 <= self.cache_limit_gb < math.inf:
            raise ValueError(f"cache_limit_gb is {self.cache_limit_gb}; a number from 0 is needed")


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
    class_names, sources = sources_of(config)
    splits, digest = {}, hashlib.sha256(json.dumps(class_names).encode())
    for name, source in sources.items():
        splits[name], key = _decoded(config, name, source, preprocess)
        digest.update(f"{name} {key} {source.labels}".encode())
    train = splits["train"]
    if "val" not in splits:
        held, kept = stratified(train.labels, round(HOLDOUT * len(train)), seed, spare_last=True)
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
        chosen, _ = stratified(train.labels[train.rows], limit, seed + 1)
        train = Split(train.images, train.labels, train.rows[chosen])
    return Dataset(class_names, train, splits["val"], splits["test"], digest.hexdigest())


def load_test(config: DataConfig, preprocess: Preprocess) -> tuple[tuple[str, ...], Split]:
    """Read the test split alone: class names and images; errors are `load_dataset`'s."""
    class_names, sources = sources_of(config)
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


def sources_of(config: DataConfig) -> tuple[tuple[str, ...], dict[str, Source]]:
    """Find class names and the images of each split; errors are `load_dataset`'s."""
    if config.data == "demo":
        return world.CLASS_NAMES, {name: _demo_source(name) for name in world.SPLITS}
    if config.data == "digits":
        return digits_sources()
    if config.data in TORCHVISION:
        return _torchvision_sources(config)
    if config.data in COOP:
        return coop_sources(COOP[config.data], config.data_root)
    root = Path(config.data)
    if not root.is_dir():
        raise FileNotFoundError(f"no data folder {root}; --data takes a folder, {', '.join(NAMED)}")
    return folder_sources(root)


def _demo_source(split: str) -> Source:
    images, labels = world.task(split)
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    return array_source(pixels, labels.tolist(), f"demo {split}")


# Data sets that torchvision reads.
TORCHVISION: dict[str, Any] = {
    "cifar10": torchvision.datasets.CIFAR10,
    "cifar100": torchvision.datasets.CIFAR100,
}
NAMED = ("demo", "digits", *sorted([*TORCHVISION, *COOP]))


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
        sources[split] = array_source(data.data, data.targets, f"{config.data} {split}")
    return tuple(data.classes), sources
