"""Exact copies of an image in several splits or classes, found by the files' hashes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from adavipro_fast.data.split import Split

# Copies that a message names.
NAMED = 3
# A split: its name, its images, and hashes and names of the files that they were cut from.
Part = tuple[str, Split, Sequence[bytes], Callable[[int], str]]


@dataclass(frozen=True)
class Duplicates:
    """How many pictures are in more than one split, and in more than one class."""

    between_splits: int = 0
    between_classes: int = 0
    notes: tuple[str, ...] = ()
    """the same in words, with the names of some"""


@dataclass
class _Seen:
    """Where a picture was found."""

    splits: set[str]
    labels: set[int]
    names: list[str]


def find_duplicates(parts: Iterable[Part]) -> Duplicates:
    """Count pictures whose files are equal byte for byte."""
    seen: dict[bytes, _Seen] = {}
    for split_name, split, digests, name in parts:
        for row in split.rows.tolist():
            found = seen.setdefault(digests[row], _Seen(set(), set(), []))
            found.splits.add(split_name)
            found.labels.add(int(split.labels[row]))
            if len(found.names) < NAMED:
                found.names.append(name(row))
    splits = [found for found in seen.values() if len(found.splits) > 1]
    classes = [found for found in seen.values() if len(found.labels) > 1]
    notes = [
        f"{len(copies)} pictures are in {what}: {' = '.join(copies[0].names)}"
        for copies, what in ((splits, "more than one split"), (classes, "more than one class"))
        if copies
    ]
    return Duplicates(len(splits), len(classes), tuple(notes))
