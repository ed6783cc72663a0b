"""Labelled data sets: load the images and split them into train, val and test."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torchvision
from filelock import FileLock

from adavipro_fast.data import world
from adavipro_fast.data.cache import DEFAULT_DIR, decoded
from adavipro_fast.data.coop import COOP, coop_sources
from adavipro_fast.data.cut import Cut, by_class, check_readable, grey_note
from adavipro_fast.data.digits import digits_sources
from adavipro_fast.data.duplicates import Duplicates, find_duplicates
from adavipro_fast.data.folder import (
    composed,
    folder_sources,
    left_out_note,
    listed,
    source_of_test,
)
from adavipro_fast.data.source import Source, Sources, array_source
from adavipro_fast.data.split import Split, held_out, stratified
from adavipro_fast.method.preprocess import Preprocess

HOLDOUT = 0.1
# Classes with fewer training images are named in a warning.
FEW = 10
# Ratio of the largest class to the smallest from which a warning is printed.
UNBALANCED = 5


@dataclass(frozen=True)
class DataConfig:
    """Options of the labelled images."""

    data: str = "demo"
    """a folder with train/ [val/] [test/] and class folders in each, or of class folders alone; or
    demo, digits, cifar10, cifar100, dtd, eurosat, flowers102, food101, pets, sun397, ucf101"""
    data_root: Path = Path("data")
    """folder of the named data sets"""
    download: bool = False
    """download the data set with torchvision (cifar10 and cifar100)"""
    limit_train: int | None = None
    """largest number of training images, with the same share of each class (default: all)"""
    skip_unreadable: bool = False
    """skip and count images that cannot be read instead of stopping"""
    cache_dir: Path = DEFAULT_DIR
    """folder of the cache of decoded images"""
    cache_limit_gb: float = 100.0
    """size limit of the cache, 10^9 bytes; the least recently used images are removed first"""

    def __post_init__(self) -> None:
        if not 0 <= self.cache_limit_gb < math.inf:
            raise ValueError(f"cache_limit_gb is {self.cache_limit_gb}; use 0 or more")


@dataclass(frozen=True)
class Facts:
    """Facts about a data set other than its images."""

    left_out: Mapping[str, int] = field(default_factory=dict)
    """number of files that are not images, by suffix, and of unreadable images"""
    unreadable: tuple[str, ...] = ()
    """reason for each image that was skipped as unreadable"""
    held_out: tuple[str, ...] = ()
    """names of the training images held out for validation if there is no val/"""
    duplicates: Duplicates = field(default_factory=Duplicates)
    notes: tuple[str, ...] = ()
    """messages to the user about the data"""


@dataclass(frozen=True)
class Dataset:
    """A labelled data set: class names in label order and its splits."""

    class_names: tuple[str, ...]
    train: Split
    val: Split
    test: Split | None
    """None without a test split"""
    sha256: str
    """hash of class names, labels and pixels before the split"""
    facts: Facts = field(default_factory=Facts)

    @property
    def counts(self) -> dict[str, int]:
        """Number of images of each split, and of files left out."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        counts = {name: 0 if split is None else len(split) for name, split in splits.items()}
        return counts | {"left_out": sum(self.facts.left_out.values())}


def load_dataset(config: DataConfig, preprocess: Preprocess, *, seed: int = 0) -> Dataset:
    """Read, decode and split a data set.

    Args:
        config: the data set and its options.
        preprocess: the encoder's preprocessing.
        seed: for the choice of held-out validation images and of `limit_train`.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ValueError: images cannot be read, a class is empty, or the splits' classes differ.
    """
    sources = sources_of(config)
    class_names, notes = sources.class_names, list(sources.notes)
    cuts = {name: cut_of(config, name, s, preprocess) for name, s in sources.splits.items()}
    made = list(cuts.values())
    check_readable(made, skip=config.skip_unreadable)
    for name in [n for n, cut in cuts.items() if n != "train" and not cut.decoded.kept]:
        notes.append(f"no image of {name} can be read; the split is ignored")
        del cuts[name]
    digest = hashlib.sha256(json.dumps(class_names).encode())
    for name, cut in cuts.items():
        labels = tuple(cut.split.labels.tolist())
        digest.update(f"{name} {cut.decoded.key} {labels}".encode())
    splits = {name: cut.split for name, cut in cuts.items()}
    train = splits["train"]
    held_names: tuple[str, ...] = ()
    _check_classes(train, class_names)
    if "val" not in splits:
        held, kept = held_out(train.labels, HOLDOUT, seed)
        if len(held) == 0:
            raise ValueError(
                f"{config.data} has {len(train)} training images of {len(class_names)} classes: "
                "too few to hold out a validation split and keep one image of each class; add "
                "images or a val/ folder" + "".join(f" ({note})" for note in notes[:1])
            )
        splits["val"] = Split(train.images, train.labels, held)
        train = Split(train.images, train.labels, kept)
        held_names = tuple(cuts["train"].name(row) for row in held.tolist())
    if config.limit_train is not None:
        train = limited(train, config.limit_train, len(class_names), seed)
    splits["train"] = train
    if "test" not in splits:
        notes.append("there is no test split, so test results are null")
    notes += few_note(train, class_names)
    skipped = [cut.decoded.unreadable for cut in made]
    reasons = tuple(reason for part in skipped for reason in part.values())
    left_out = Counter[str]()
    for cut in made:
        left_out.update(cut.source.left_out)
    if left_out:
        notes.append(left_out_note(left_out))
    if reasons:
        notes.append(f"unreadable images are left out: {by_class(made, class_names)}")
        left_out["unreadable"] = len(reasons)
    duplicates = find_duplicates(
        (name, split, cuts[name if name in cuts else "train"]) for name, split in splits.items()
    )
    notes += duplicates.notes
    notes += grey_note(cuts["train"].decoded.peaks, preprocess)
    facts = Facts(left_out, reasons, held_names, duplicates, tuple(notes))
    return Dataset(class_names, train, splits["val"], splits.get("test"), digest.hexdigest(), facts)


def few_note(train: Split, class_names: tuple[str, ...]) -> list[str]:
    """Warn about classes with few training images, and about unbalanced classes."""
    counts = train.labels[train.rows].bincount(minlength=len(class_names)).tolist()
    few = [f"{n} ({count})" for n, count in zip(class_names, counts, strict=True) if count < FEW]
    notes = [f"few training images: {listed(few)}"] if few and max(counts) >= FEW else []
    most, least = (pick(range(len(counts)), key=counts.__getitem__) for pick in (max, min))
    if counts[most] >= UNBALANCED * max(counts[least], 1):
        notes.append(
            f"unbalanced: {class_names[most]!r} has {counts[most]} training images, "
            f"{class_names[least]!r} {counts[least]}; top-1 hides the accuracy of "
            "small classes; see `macro` and `per_class` of evaluate; --class-weights balanced "
            "counts all classes the same"
        )
    return notes


def limited(train: Split, limit: int, classes: int, seed: int) -> Split:
    """Choose at most `limit` training images, the same share of each class.

    Raises:
        ValueError: `limit` is less than the number of classes.
    """
    if limit < classes:
        raise ValueError(
            f"--limit-train {limit} is less than one image per class; use {classes} or more"
        )
    chosen, _ = stratified(train.labels[train.rows], min(limit, len(train)), seed + 1)
    return Split(train.images, train.labels, train.rows[chosen])


def load_test(
    config: DataConfig, preprocess: Preprocess, class_names: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...], Split, tuple[str, ...]]:
    """Read only the test split: class names, images and notes; see `cut_of_test`."""
    class_names, cut, notes = cut_of_test(config, preprocess, class_names)
    return class_names, cut.split, notes


def cut_of_test(
    config: DataConfig, preprocess: Preprocess, class_names: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...], Cut, tuple[str, ...]]:
    """Read only the test split, with the names of its files.

    Args:
        config: the data set and its options.
        preprocess: the encoder's preprocessing.
        class_names: names that define the label order (default: the data set's own).

    Returns:
        Class names, images, and messages to the user about them.

    Raises:
        FileNotFoundError: there is no test split.
        ValueError: a class is not among the names; also the errors of `load_dataset`.
    """
    folder = Path(config.data)
    if class_names is not None and not named(config.data) and folder.is_dir():
        source, notes = source_of_test(folder, class_names, skip_unreadable=config.skip_unreadable)
    else:
        sources = sources_of(config)
        if "test" not in sources.splits:
            raise FileNotFoundError(f"{config.data} has no test split")
        source, notes = sources.splits["test"], list(sources.notes)
        source = relabelled(source, sources.class_names, class_names or sources.class_names)
        class_names = class_names or sources.class_names
    cut = cut_of(config, "test", source, preprocess)
    check_readable([cut], skip=config.skip_unreadable)
    if not cut.decoded.kept:
        raise ValueError(f"no test image of {config.data} can be read")
    if cut.decoded.unreadable:
        notes.append(f"unreadable images are left out: {by_class([cut], class_names)}")
    return class_names, cut, tuple(notes)


def relabelled(source: Source, own: tuple[str, ...], names: tuple[str, ...]) -> Source:
    """Renumber a source's labels to the order of `names`.

    Raises:
        ValueError: a class is not among the names.
    """
    label_of = {composed(name): label for label, name in enumerate(names)}
    unknown = [name for name in own if composed(name) not in label_of]
    if unknown:
        raise ValueError(
            f"the data set has classes that the model does not have: {listed(unknown)}; its "
            f"classes are {listed(names)}; use the data set that it was trained on"
        )
    labels = tuple(label_of[composed(own[label])] for label in source.labels)
    return replace(source, labels=labels)


def cut_of(config: DataConfig, name: str, source: Source, preprocess: Preprocess) -> Cut:
    """Decode a split."""
    images = decoded(
        source,
        preprocess,
        config.cache_dir,
        label=f"{config.data} {name}",
        limit=int(1e9 * config.cache_limit_gb),
    )
    return Cut(source, images)


def _check_classes(train: Split, class_names: tuple[str, ...]) -> None:
    counts = train.labels.bincount(minlength=len(class_names)).tolist()
    empty = [name for name, count in zip(class_names, counts, strict=True) if count == 0]
    if empty:
        raise ValueError(f"no training image of class {empty[0]!r} can be read")


def named(data: str) -> bool:
    """Report whether `--data` is the name of a data set rather than a folder."""
    return data in NAMED


def sources_of(config: DataConfig) -> Sources:
    """Return class names and the images of each split; raises the errors of `load_dataset`."""
    if config.data == "demo":
        return Sources(world.CLASS_NAMES, {name: _demo_source(name) for name in world.SPLITS})
    if config.data == "digits":
        return Sources(*digits_sources())
    if config.data in TORCHVISION:
        return Sources(*_torchvision_sources(config))
    if config.data in COOP:
        return Sources(*coop_sources(COOP[config.data], config.data_root))
    root = Path(config.data)
    if not root.is_dir():
        raise FileNotFoundError(
            f"no such folder: {root}; use a folder or one of {', '.join(NAMED)}"
        )
    return folder_sources(root, skip_unreadable=config.skip_unreadable)


def _demo_source(split: str) -> Source:
    images, labels = world.task(split)
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    return array_source(pixels, labels.tolist(), f"demo {split}")


# Data sets read by torchvision.
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
            # With several processes, only one downloads.
            with _download_lock(config):
                data = TORCHVISION[config.data](
                    config.data_root, train=split == "train", download=config.download
                )
        except RuntimeError as error:
            raise FileNotFoundError(
                f"{config.data} is not complete under {config.data_root}: {error}; "
                "set --data-root to its folder, or add --download"
            ) from error
        sources[split] = array_source(data.data, data.targets, f"{config.data} {split}")
    return tuple(data.classes), sources
