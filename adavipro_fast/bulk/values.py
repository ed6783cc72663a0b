"""The values of a row: shared by the output files and the column classifier."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from adavipro_fast.artifact.answers import answers
from adavipro_fast.artifact.artifact import Artifact
from adavipro_fast.data.images import pixels_of
from adavipro_fast.method.preprocess import Preprocess

BATCH = 64
Decoded = np.ndarray[Any, np.dtype[np.uint8]] | str


def decoded(picture: Any, preprocess: Preprocess, name: str = "of bytes") -> Decoded:
    """Decode a picture to (3, S, S) uint8; return the reason as text if it cannot be read."""
    try:
        return pixels_of(picture, preprocess, name)
    except (OSError, ValueError, TypeError) as error:
        return str(error)


def values_of(
    artifact: Artifact, pictures: Sequence[Decoded], reject: float | None
) -> list[dict[str, Any]]:
    """Return answer, probability, rejected and embedding of each picture, or its error."""
    results = _classified(artifact, [p for p in pictures if not isinstance(p, str)], reject)
    return [{"error": one} if isinstance(one, str) else next(results) for one in pictures]


def _classified(
    artifact: Artifact, pixels: Sequence[Any], reject: float | None
) -> Iterator[dict[str, Any]]:
    for start in range(0, len(pixels), BATCH):
        prediction = artifact(torch.from_numpy(np.stack(pixels[start : start + BATCH])))
        described = answers(artifact.about, prediction, reject, shown=1)
        for each, embedding in zip(described, prediction.embedding.tolist(), strict=True):
            yield {
                "answer": each["answer"],
                "probability": each["classes"][0]["probability"],
                "rejected": each["rejected"],
                "embedding": embedding,
            }
