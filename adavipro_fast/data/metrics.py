"""Accuracy of a classifier and what its masks look like."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class MaskFigures(NamedTuple):
    """What a set of masks looks like, each figure 0-1."""

    density: float
    adaptivity: float
    placement: float


def mask_figures(masks: Tensor, inside: Tensor) -> MaskFigures:
    """Summarise argmax masks over the regions that the frame touches.

    density: share of open regions. adaptivity: standard deviation over images of each region's
    decision; 0 where every image gets the same mask. placement: the same after subtracting each
    image's mean over regions; 0 where each image is all or nothing.

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


@dataclass(frozen=True)
class Evaluation:
    """Predictions for a labelled set: predicted (N,), labels (N,), masks (N, G, G)."""

    predicted: Tensor
    labels: Tensor
    masks: Tensor

    @property
    def top1(self) -> float:
        """Share of right predictions, percent."""
        return 100 * (self.predicted == self.labels).double().mean().item()

    def per_class(self, class_names: tuple[str, ...]) -> dict[str, float]:
        """Return the share of right predictions of each class, percent."""
        return {
            name: 100 * (self.predicted[self.labels == i] == i).double().mean().item()
            for i, name in enumerate(class_names)
        }


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
        rows.append((logits.argmax(1).cpu(), labels.cpu(), mask.to(torch.uint8).cpu()))
    predicted, labels, masks = (torch.cat(column) for column in zip(*rows, strict=True))
    return Evaluation(predicted, labels, masks)
