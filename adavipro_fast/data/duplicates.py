"""Exact copies of an image in several splits or classes, found by the files' hashes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adavipro_fast.data.cut import Cut
from adavipro_fast.data.split import Split

# Copies that a message names.
NAMED = 3
# A split's name and images, and what they were cut from.
Part = tuple[str, Split, Cut]
# Where a picture was found: the first file in each split, or in each class.
Places = dict[str, str] | dict[int, str]


@dataclass(frozen=True)
class Duplicates:
    """How many pictures are in more than one split, and in more than one class."""

    between_splits: int = 0
    between_classes: int = 0
    notes: tuple[str, ...] = ()
    """the same in words, with the names of some"""

    def stored(self) -> dict[str, int]:
        """Return the counts."""
        return {"between_splits": self.between_splits, "between_classes": self.between_classes}


def find_duplicates(parts: Iterable[Part]) -> Duplicates:
    """Count pictures whose files are equal byte for byte."""
    splits: dict[bytes, dict[str, str]] = {}
    classes: dict[bytes, dict[int, str]] = {}
    for split_name, split, cut in parts:
        for row in split.rows.tolist():
            digest, name = cut.decoded.digests[row], cut.name(row)
            splits.setdefault(digest, {}).setdefault(split_name, name)
            classes.setdefault(digest, {}).setdefault(int(split.labels[row]), name)
    between_splits = [places for places in splits.values() if len(places) > 1]
    between_classes = [places for places in classes.values() if len(places) > 1]
    notes = note(between_splits, "more than one split") + note(
        between_classes, "more than one class"
    )
    return Duplicates(len(between_splits), len(between_classes), tuple(notes))


def note(copies: Sequence[Places], what: str) -> list[str]:
    """Say how many pictures are in several places, and name the files of the first."""
    if not copies:
        return []
    count = "1 picture is" if len(copies) == 1 else f"{len(copies)} images are"
    names = list(copies[0].values())[:NAMED]
    return [f"{count} in {what}: {' = '.join(names)}"]
