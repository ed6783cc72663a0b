"""Find exact copies of an image in several splits or classes by the files' hashes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adavipro_fast.data.cut import Cut
from adavipro_fast.data.split import Split

# Largest number of copies named in a message.
NAMED = 3
# A split's name, its images, and the decoded split they belong to.
Part = tuple[str, Split, Cut]
# The files of one picture: the first in each split, or in each class.
Places = dict[str, str] | dict[int, str]


@dataclass(frozen=True)
class Duplicates:
    """Number of pictures in more than one split, and in more than one class."""

    between_splits: int = 0
    between_classes: int = 0
    notes: tuple[str, ...] = ()
    """the same as messages, with the names of some files"""

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
    """Report how many pictures are in several splits or classes, with the first one's files."""
    if not copies:
        return []
    count = "1 image is" if len(copies) == 1 else f"{len(copies)} images are"
    names = list(copies[0].values())[:NAMED]
    return [f"{count} in {what}: {' = '.join(names)}"]
