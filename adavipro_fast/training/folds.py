"""Heads that score each training image without having seen it.

A head that was fitted to all training images is right on nearly all of them and leaves a prompt
little to learn. Here the images are split into folds, and the prompt learns from the heads that
were fitted to the other folds (cross-fitting: Chernozhukov et al., 2018, doi:10.1111/ectj.12097).
The heads are fitted again as the prompt changes what the encoder makes of the images.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from adavipro_fast.method.config import HeadInput
from adavipro_fast.method.head import HeadRows
from adavipro_fast.training.group import Group
from adavipro_fast.training.probe import HEAD_STEPS, STRENGTHS, Features, rows_of

FOLDS = 5
# Fits of a run at most: each takes a pass over the training images, and some seconds.
FITS = 8
# A head knows little of more images by heart, and fitting it takes long.
LARGEST = 5_000
STORED = ("folds.rows", "folds.bias", "folds.penalty", "folds.fold")


def folded(images: int, classes: int) -> bool:
    """Return whether a run has fold heads: few images, but on the mean one of a class in a fold."""
    return FOLDS * classes <= images <= LARGEST


def folds_of(labels: Tensor, seed: int) -> Tensor:
    """Deal the images of each class out to the folds: the fold of each image (N,).

    The only image of a class is in no fold (-1): every head needs all classes.

    Args:
        labels: (N,).
        seed: chooses among equal splits.
    """
    fold = torch.full((len(labels),), -1)
    random = np.random.default_rng(seed)
    dealt = 0
    for label in labels.unique():
        images = np.flatnonzero(labels.numpy() == int(label))
        if len(images) > 1:
            order = torch.from_numpy(random.permutation(images))
            fold[order] = (dealt + torch.arange(len(images))) % FOLDS
            dealt += len(images)
    return fold


class FoldHeads:
    """One head for each fold, fitted to the images of the others.

    Args:
        labels: (N,) of the training images.
        classes: K.
        reads: what the heads read.
        epochs: of the run.
        seed: of the folds.
        balanced: all classes count the same, however many images they have.
        device: where images are scored.
    """

    def __init__(
        self,
        labels: Tensor,
        classes: int,
        reads: HeadInput,
        *,
        epochs: int,
        seed: int,
        balanced: bool,
        device: torch.device,
    ) -> None:
        self.labels, self.classes, self.reads, self.device = labels, classes, reads, device
        self.class_weight = "balanced" if balanced else None
        self.fold = folds_of(labels, seed)
        self._fold = self.fold.to(device)
        self.every = math.ceil(epochs / FITS)
        self.rows, self.bias = torch.zeros(0), torch.zeros(0)
        """(F, K, D) and (F, K) on the device, once they are fitted"""
        self.penalty: float | None = None
        """inverse strength of the last fit"""

    def due(self, epoch: int, step: int) -> bool:
        """Return whether the heads are fitted before a step of an epoch, both counted from 0."""
        return (step == 0 and epoch % self.every == 0) or not len(self.rows)

    def fit(self, train: Features) -> None:
        """Fit the heads to the training images as they are now.

        The penalty is that of the least loss on the images left out. The first fit climbs from the
        middle of the range; later ones move by one step at most.
        """
        known, strengths = getattr(train, self.reads), STRENGTHS[self.reads]
        first = self.penalty is None
        at = len(strengths) // 2 if self.penalty is None else strengths.index(self.penalty)
        tried = {at: self._tried(known, strengths[at])}
        for step in (1, -1):
            while 0 <= at + step < len(strengths) and at + step not in tried:
                tried[at + step] = self._tried(known, strengths[at + step])
                if tried[at + step][0] >= tried[at][0]:
                    break
                at += step
                if not first:
                    break
        self.penalty = strengths[at]
        self.rows, self.bias = (part.float().to(self.device) for part in tried[at][1:])

    def _tried(self, known: np.ndarray, strength: float) -> tuple[float, Tensor, Tensor]:
        """Fit all heads with one penalty: loss on images left out, (F, K, D) and (F, K)."""
        rows, bias = self._heads(known, strength)
        logits = self._scored(torch.tensor(known), rows, bias, self.fold)
        left_out = self.fold >= 0
        return F.cross_entropy(logits[left_out], self.labels[left_out]).item(), rows, bias

    def _heads(self, known: np.ndarray, strength: float) -> tuple[Tensor, Tensor]:
        """Fit all heads with one penalty: (F, K, D) and (F, K)."""
        heads = []
        for fold in range(FOLDS):
            seen = (self.fold != fold).numpy()
            head = LogisticRegression(
                C=strength, max_iter=HEAD_STEPS, class_weight=self.class_weight
            )
            heads.append(rows_of(head.fit(known[seen], self.labels.numpy()[seen])))
        rows, bias = (torch.stack(parts) for parts in zip(*heads, strict=True))
        return rows, bias

    def logits(self, embedding: Tensor, features: Tensor, images: Tensor) -> Tensor:
        """Score images by the heads that have not seen them: (B, K).

        Args:
            embedding: (B, E), unit rows.
            features: (B, F).
            images: (B,) numbers of the training images.
        """
        read = features if self.reads == "features" else embedding
        fold = self._fold[images.to(self.device, non_blocking=True)]
        return self._scored(read, self.rows, self.bias, fold)

    @staticmethod
    def _scored(read: Tensor, rows: Tensor, bias: Tensor, fold: Tensor) -> Tensor:
        logits: Tensor = torch.einsum("bd,fkd->bfk", read, rows) + bias
        # An image of no fold is scored by the last head.
        own: Tensor = logits[torch.arange(len(read), device=read.device), fold]
        return own

    @property
    def mean(self) -> HeadRows:
        """The mean of the heads, which scores images that none of them has seen."""
        return HeadRows(self.rows.mean(0), self.bias.mean(0), self.reads)

    def share(self, group: Group, width: int) -> None:
        """Give all processes the leading one's heads, of so many inputs."""
        shape = (FOLDS, self.classes, width)
        if not group.leads:
            self.rows = torch.zeros(shape, device=self.device)
            self.bias = torch.zeros(shape[:2], device=self.device)
        number = 0 if self.penalty is None else STRENGTHS[self.reads].index(self.penalty)
        penalty = group.sum(torch.tensor(float(number if group.leads else 0), device=self.device))
        self.penalty = STRENGTHS[self.reads][int(penalty.item())]
        self.rows, self.bias = group.sum(self.rows), group.sum(self.bias)

    def stored(self) -> dict[str, Tensor]:
        """Return what a run's state keeps."""
        if self.penalty is None:
            return {}
        penalty = torch.tensor(STRENGTHS[self.reads].index(self.penalty)).float()
        values = (self.rows.cpu(), self.bias.cpu(), penalty, self.fold.float())
        return dict(zip(STORED, values, strict=True))

    def load(self, tensors: Mapping[str, Tensor], width: int) -> None:
        """Take what `stored` returned, unless it belongs to other folds or is missing.

        Then the heads are fitted anew.

        Args:
            tensors: of the run's state.
            width: how many inputs the heads have.
        """
        shapes = ((FOLDS, self.classes, width), (FOLDS, self.classes), (), self.fold.shape)
        values = [tensors.get(name) for name in STORED]
        if any(v is None or v.shape != s for v, s in zip(values, shapes, strict=True)):
            return
        rows, bias, penalty, fold = (value for value in values if value is not None)
        if torch.equal(fold, self.fold.float()) and 0 <= penalty < len(STRENGTHS[self.reads]):
            self.rows, self.bias = rows.to(self.device), bias.to(self.device)
            self.penalty = STRENGTHS[self.reads][int(penalty)]
