"""A decoded split: its images, and the files that could not be read."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from adavipro_fast.data.cache import Decoded, joined_reasons
from adavipro_fast.data.source import Source
from adavipro_fast.data.split import Split
from adavipro_fast.method.preprocess import WHITE, Preprocess

# White level of cameras with 10, 12 and 14 bits, which save 16-bit files.
CAMERA_LEVELS = (1023, 4095, 16383)


@dataclass(frozen=True)
class Cut:
    """A decoded split: the result of `decoded`, and its source."""

    source: Source
    decoded: Decoded

    @property
    def split(self) -> Split:
        """The images with their labels."""
        labels = torch.tensor([self.source.labels[i] for i in self.decoded.kept])
        return Split(torch.from_numpy(self.decoded.images), labels, torch.arange(len(labels)))

    def name(self, row: int) -> str:
        """Return the name of an image's file."""
        return self.source.name(self.decoded.kept[row])


def check_readable(cuts: Iterable[Cut], *, skip: bool) -> None:
    """Raise ValueError naming all files that cannot be read, unless they are skipped."""
    reasons = [reason for cut in cuts for reason in cut.decoded.unreadable.values()]
    if not reasons or skip:
        return
    named = joined_reasons(
        [
            r.removeprefix("cannot read image ").removesuffix("; replace or remove it")
            for r in reasons
        ]
    )
    what, them = ("image", "it") if len(reasons) == 1 else (f"{len(reasons)} images:", "them")
    raise ValueError(
        f"cannot read {what} {named}; replace or remove {them}, or skip {them} with "
        "--skip-unreadable"
    )


def by_class(cuts: Iterable[Cut], class_names: tuple[str, ...]) -> str:
    """Count unreadable images by class."""
    counts = Counter(
        class_names[cut.source.labels[index]] for cut in cuts for index in cut.decoded.unreadable
    )
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def grey_note(peaks: np.ndarray[Any, np.dtype[np.uint16]], preprocess: Preprocess) -> list[str]:
    """Warn if 16-bit grey images use only the range of a camera with fewer bits."""
    if not peaks.any() or preprocess.white_level != WHITE:
        return []
    peak = int(peaks.max())
    level = next((level for level in CAMERA_LEVELS if peak <= level), None)
    if level is None:
        return []
    return [
        f"the largest value of the 16-bit grey training images is {peak} of {WHITE}, so they are "
        f"decoded nearly black; if {level} is white, add --white-level {level}"
    ]
