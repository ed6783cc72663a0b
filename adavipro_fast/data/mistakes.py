"""A classifier's errors: the confusion matrix, and a list of wrong answers."""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor

from adavipro_fast.data.metrics import Evaluation
from adavipro_fast.files.whole import write_whole


@dataclass(frozen=True)
class Mistake:
    """An image with a wrong answer."""

    row: int
    """index in the evaluation"""
    path: str
    label: str
    answer: str
    confidence: float
    """probability of the answer"""


def confusion(evaluation: Evaluation, classes: int) -> Tensor:
    """Count images by class (rows) and answer (columns): (K, K)."""
    pairs = evaluation.labels * classes + evaluation.predicted
    return pairs.bincount(minlength=classes * classes).view(classes, classes)


def mistakes(
    evaluation: Evaluation,
    probabilities: Tensor,
    class_names: Sequence[str],
    name: Callable[[int], str],
) -> list[Mistake]:
    """List the wrong answers, the least certain first.

    Args:
        evaluation: of N images.
        probabilities: (N, K).
        class_names: in label order.
        name: returns the name of image i.
    """
    confidence = probabilities.amax(1)
    wrong = (~evaluation.right).nonzero()[:, 0]
    ordered = wrong[torch.argsort(confidence[wrong], stable=True)].tolist()
    answers, labels = evaluation.predicted.tolist(), evaluation.labels.tolist()
    return [
        Mistake(
            row,
            name(row),
            class_names[labels[row]],
            class_names[answers[row]],
            confidence[row].item(),
        )
        for row in ordered
    ]


def write_errors(path: Path, found: Sequence[Mistake]) -> None:
    """Write a CSV file with a row for each wrong answer."""
    rows = [(each.path, each.label, each.answer, f"{each.confidence:.4f}") for each in found]
    write_csv(path, [("path", "label", "answer", "confidence"), *rows])


def write_confusion(path: Path, counts: Tensor, class_names: Sequence[str]) -> None:
    """Write the confusion matrix as CSV: a row for each class, a column for each answer."""
    rows = zip(class_names, counts.tolist(), strict=True)
    write_csv(path, [("class", *class_names), *((name, *row) for name, row in rows)])


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file atomically."""
    text = StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_whole(path, text.getvalue().encode())
