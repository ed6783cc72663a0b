"""Heads that score each training image without having seen it.

A head that was fitted to all training images is right on nearly all of them and leaves a prompt
little to learn. Here the images are split into folds, and the prompt learns from the heads that
were fitted to the other folds (cross-fitting: Chernozhukov et al., 2018, doi:10.1111/ectj.12097).
The heads are fitted again during the run, because the prompt changes the features.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adavipro_fast.method.config import HeadInput
from adavipro_fast.method.head import HeadRows
from adavipro_fast.training.group import Group
from adavipro_fast.training.probe import STRENGTHS, Features, fitted

FOLDS = 5
# Most fits in a run: each needs a pass over the training images, and some seconds.
FITS = 8
# With more training images a head overfits less, and fitting takes long.
LARGEST = 5_000
STORED = ("folds.rows", "folds.bias", "folds.penalty", "folds.fold")


def folded(images: int, classes: int) -> bool:
    """Return whether to use fold heads: few images, on average one or more per class and fold."""
    return FOLDS * classes <= images <= LARGEST


def folds_of(labels: Tensor, seed: int) -> Tensor:
    """Spread the images of each class evenly over the folds: the fold of each image (N,).

    The only image of a class is in no fold (-1), because every head needs all classes.

    Args:
        labels: (N,).
        seed: seed of the random split.
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
        labels: (N,) labels of the training images.
        classes: K.
        reads: input of the heads.
        epochs: epochs of the run.
        seed: seed of the split.
        balanced: weight classes equally, whatever their number of images.
        device: device on which images are scored.
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
        self.balanced = balanced
        self.fold = folds_of(labels, seed).to(device)
        self.every = math.ceil(epochs / FITS)
        self.rows, self.bias = torch.zeros(0), torch.zeros(0)
        """(F, K, D) and (F, K) on the device, once they are fitted"""
        self.chosen: int | None = None
        """index of the last fit's penalty in `STRENGTHS`"""

    def due(self, epoch: int, step: int) -> bool:
        """Return whether the heads are fitted before a step of an epoch, both counted from 0."""
        return (step == 0 and epoch % self.every == 0) or not len(self.rows)

    def fit(self, train: Features) -> None:
        """Fit the heads to the features of the training images.

        The penalty with the lowest loss on the images left out is chosen. The first fit searches
        from the middle of the range; later ones move by at most one step.
        """
        known, strengths = getattr(train, self.reads), STRENGTHS[self.reads]
        first = self.chosen is None
        at = len(strengths) // 2 if self.chosen is None else self.chosen
        tried = {at: self._tried(known, strengths[at])}
        for step in (1, -1):
            while 0 <= at + step < len(strengths) and at + step not in tried:
                tried[at + step] = self._tried(known, strengths[at + step])
                if tried[at + step][0] >= tried[at][0]:
                    break
                at += step
                if not first:
                    break
        self.chosen = at
        self.rows, self.bias = (part.float().to(self.device) for part in tried[at][1:])

    def _tried(self, known: np.ndarray, strength: float) -> tuple[float, Tensor, Tensor]:
        """Fit all heads with one penalty: loss on images left out, (F, K, D) and (F, K)."""
        rows, bias = self._heads(known, strength)
        fold = self.fold.cpu()
        logits = self._scored(torch.tensor(known), rows, bias, fold)
        left_out = fold >= 0
        return F.cross_entropy(logits[left_out], self.labels[left_out]).item(), rows, bias

    def _heads(self, known: np.ndarray, strength: float) -> tuple[Tensor, Tensor]:
        """Fit all heads with one penalty: (F, K, D) and (F, K)."""
        heads = []
        for fold in range(FOLDS):
            seen, labels = (self.fold != fold).cpu().numpy(), self.labels.numpy()
            heads.append(fitted(known[seen], labels[seen], strength, balanced=self.balanced))
        rows, bias = (torch.stack(parts) for parts in zip(*heads, strict=True))
        return rows, bias

    def logits(self, embedding: Tensor, features: Tensor, images: Tensor) -> Tensor:
        """Score training images with the heads fitted without them: (B, K).

        Args:
            embedding: (B, E), unit rows.
            features: (B, F).
            images: (B,) positions in the training split.
        """
        read = features if self.reads == "features" else embedding
        fold = self.fold[images.to(self.device, non_blocking=True)]
        return self._scored(read, self.rows, self.bias, fold)

    @staticmethod
    def _scored(read: Tensor, rows: Tensor, bias: Tensor, fold: Tensor) -> Tensor:
        logits: Tensor = torch.einsum("bd,fkd->bfk", read, rows) + bias
        # -1, an image in no fold, selects the last head.
        own: Tensor = logits[torch.arange(len(read), device=read.device), fold]
        return own

    @property
    def mean(self) -> HeadRows:
        """The mean of the heads, for images outside the training split."""
        return HeadRows(self.rows.mean(0), self.bias.mean(0), self.reads)

    def share(self, group: Group, width: int) -> None:
        """Copy the leading process's heads to all processes.

        Args:
            group: the processes of the run.
            width: number of inputs of a head.
        """
        shape = (FOLDS, self.classes, width)
        if not group.leads:
            self.rows = torch.zeros(shape, device=self.device)
            self.bias = torch.zeros(shape[:2], device=self.device)
        chosen = float(self.chosen or 0) if group.leads else 0.0
        self.chosen = int(group.sum(torch.tensor(chosen, device=self.device)).item())
        self.rows, self.bias = group.sum(self.rows), group.sum(self.bias)

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors that a run's state stores."""
        if self.chosen is None:
            return {}
        chosen = torch.tensor(float(self.chosen))
        values = (self.rows.cpu(), self.bias.cpu(), chosen, self.fold.cpu().float())
        return dict(zip(STORED, values, strict=True))

    def load(self, tensors: Mapping[str, Tensor], width: int) -> None:
        """Restore the tensors that `stored` returned.

        If they are missing or belong to another split, the heads are fitted again.

        Args:
            tensors: the run's state.
            width: number of inputs of a head.
        """
        shapes = ((FOLDS, self.classes, width), (FOLDS, self.classes), (), self.fold.shape)
        values = [tensors.get(name) for name in STORED]
        if any(v is None or v.shape != s for v, s in zip(values, shapes, strict=True)):
            return
        rows, bias, chosen, fold = (value for value in values if value is not None)
        same = torch.equal(fold, self.fold.cpu().float())
        if same and 0 <= chosen < len(STRENGTHS[self.reads]):
            self.rows, self.bias = rows.to(self.device), bias.to(self.device)
            self.chosen = int(chosen)
