"""Accuracy and calibration of a classifier, and figures that describe its masks."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class MaskFigures(NamedTuple):
    """Figures that describe a set of masks, each 0-1; see `mask_figures`."""

    density: float
    adaptivity: float
    placement: float


def mask_figures(masks: Tensor, inside: Tensor) -> MaskFigures:
    """Summarise argmax masks over the regions that overlap the prompt's frame.

    density: share of open regions. adaptivity: standard deviation over images of each region's
    decision; 0 if every image gets the same mask. placement: the same after subtracting each
    image's mean over regions; 0 if each image's regions are all open or all closed.

    Args:
        masks: (N, G, G) of 0 and 1.
        inside: (G, G) bool, from `frame_regions`.
    """
    decisions = masks[:, inside].double()  # (N, regions)
    placed = decisions - decisions.mean(1, keepdim=True)
    return MaskFigures(
        density=decisions.mean().item(),
        adaptivity=decisions.std(0, correction=0).mean().item(),
        placement=placed.std(0, correction=0).mean().item(),
    )


def standard_error(top1: float, count: int) -> float:
    """Return the standard error of a top-1 over `count` images, both in percent."""
    share = top1 / 100
    return 100 * math.sqrt(share * (1 - share) / count)


@dataclass(frozen=True)
class Evaluation:
    """Predictions for a labelled set: logits (N, K), labels (N,), masks (N, G, G)."""

    logits: Tensor
    labels: Tensor
    masks: Tensor

    @property
    def predicted(self) -> Tensor:
        """The likeliest classes (N,)."""
        return self.logits.argmax(1)

    @property
    def right(self) -> Tensor:
        """Which predictions are right (N,) bool."""
        return self.predicted == self.labels

    @property
    def top1(self) -> float:
        """Share of right predictions, percent."""
        return 100 * self.right.double().mean().item()

    def per_class(self, class_names: tuple[str, ...]) -> dict[str, float | None]:
        """Return each class's share of right predictions, percent; None without images."""
        shares: dict[str, float | None] = {}
        for label, name in enumerate(class_names):
            right = (self.predicted[self.labels == label] == label).double()
            shares[name] = 100 * right.mean().item() if len(right) else None
        return shares


def macro_of(per_class: Mapping[str, float | None]) -> float:
    """Return the mean over classes of the share of right predictions, percent.

    Classes without images are ignored.
    """
    known = [share for share in per_class.values() if share is not None]
    return sum(known) / len(known)


def balanced(labels: Tensor, classes: int) -> Tensor:
    """Return class weights (K,) that make all classes count the same; the mean per image is 1.

    Args:
        labels: (N,) labels of the images.
        classes: K.
    """
    counts = labels.bincount(minlength=classes).clamp(min=1)
    return len(labels) / (classes * counts.float())


def negative_log_likelihoods(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return each image's -log p of the right class (N,), given (N, K) and (N,)."""
    right = probabilities.double().gather(1, labels[:, None])[:, 0]
    return -right.clamp_min(1e-45).log()


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> float:
    """Return the mean of -log p of the right class, given (N, K) and (N,)."""
    return negative_log_likelihoods(probabilities, labels).mean().item()


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Return the mean distance of confidence and accuracy, 0-1 (Naeini et al., 2015).

    Args:
        probabilities: (N, K).
        labels: (N,).
        bins: number of bins of equal width over the confidence of the likeliest class.
    """
    confidence, predicted = probabilities.double().max(1)
    right = (predicted == labels).double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.double).index_add(0, index, confidence - right)
    return gaps.abs().sum().item() / len(labels)


@torch.no_grad()
def evaluate(
    predict: Callable[[Tensor], tuple[Tensor, Tensor]], batches: Iterable[tuple[Tensor, Tensor]]
) -> Evaluation:
    """Run a classifier over labelled batches.

    Args:
        predict: images (B, 3, S, S) uint8 to logits (B, K) and mask (B, G, G).
        batches: images and labels (B,).
    """
    rows = []
    for images, labels in batches:
        logits, mask = predict(images)
        rows.append((logits.float().cpu(), labels.cpu(), mask.to(torch.uint8).cpu()))
    logits, labels, masks = (torch.cat(column) for column in zip(*rows, strict=True))
    return Evaluation(logits, labels, masks)
