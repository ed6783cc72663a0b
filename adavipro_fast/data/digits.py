"""The handwritten digits included in scikit-learn: a task far from photographs, no download."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from adavipro_fast.data.source import Source, array_source
from adavipro_fast.data.split import even

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Out of 1,797 images; the others are the test split.
TRAIN, VAL = 600, 400
# Grey values are 0 to 16.
STEP = 255 / 16


def digits_sources() -> tuple[tuple[str, ...], dict[str, Source]]:
    """Split the digits (UCI, 8 x 8 pixels) deterministically."""
    data = load_digits()
    grey = np.rint(data.images * STEP).astype(np.uint8)
    pixels, labels = grey[..., None].repeat(3, -1), torch.tensor(data.target)
    train, rest = even(labels, TRAIN, 0)
    val, test = even(labels[rest], VAL, 0)
    rows = {"train": train, "val": rest[val], "test": rest[test]}
    return CLASS_NAMES, {
        split: array_source(pixels[chosen], labels[chosen].tolist(), f"digits {split}")
        for split, chosen in rows.items()
    }
