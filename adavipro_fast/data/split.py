"""A split of decoded images and its batches; choosing and holding out images by class."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Decoded images of one split.

    images: (N, 3, S, S) uint8, memory-mapped or on the device; rows: (n,) indices in use.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Gather images (B, 3, S, S) uint8 and labels (B,) at positions (B,) onto the device."""
        rows = self.rows[positions]
        images = self.images[rows.to(self.images.device)]
        return images.to(device, non_blocking=True), self.labels[rows].to(device)

    def batches(
        self, size: int, device: torch.device, *, part: int = 0, of: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every `of`-th batch of at most `size` images in order, beginning with `part`."""
        for positions in torch.arange(len(self)).split(size)[part::of]:
            yield self.batch(positions, device)

    def resident(self, device: torch.device) -> "Split":
        """Move the images to a CUDA device if they need at most half of its free memory."""
        if device.type != "cuda":
            return self
        free, _ = torch.cuda.mem_get_info(device)
        if self.images[:1].numel() * len(self) > free // 2:
            return self
        images = self.images[self.rows].to(device)
        return Split(images, self.labels[self.rows], torch.arange(len(self)))


def stratified(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose `count` positions: the same share of each class, at least one.

    Args:
        labels: (N,).
        count: how many to choose, at least the number of classes.
        seed: of the choice.

    Returns:
        (chosen, others), sorted.
    """
    share, rank, _, order = _shares(labels, seed)
    share[rank == 0] = -1
    return _cut(order[torch.argsort(share, stable=True)], count)


def held_out(labels: Tensor, share_held: float, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out a share of each class, but never all its images; return (held out, kept), sorted.

    Args:
        labels: (N,).
        share_held: share of all images to hold out; the number is rounded up.
        seed: of the choice.
    """
    share, rank, sizes, order = _shares(labels, seed)
    last = rank == sizes - 1
    share[last] = 2
    count = min(math.ceil(round(share_held * len(labels), 6)), int((~last).sum()))
    return _cut(order[torch.argsort(share, stable=True)], count)


def _shares(labels: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shuffle positions and rank each within its class.

    Returns:
        (share, rank, size of the class, position), where share is the rank scaled to 0-1.
    """
    rank, order = _ranks(labels, seed)
    sizes = labels.bincount()[labels[order]]
    return (rank + 0.5) / sizes, rank, sizes, order


def even(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose `count` positions, the same number of each class; return (chosen, others), sorted."""
    rank, order = _ranks(labels, seed)
    return _cut(order[torch.argsort(rank, stable=True)], count)


def _cut(order: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return order[:count].sort().values, order[count:].sort().values


def _ranks(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Shuffle positions; return each one's rank within its class, and the positions."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    rank = torch.zeros_like(shuffled)
    for label in labels.unique():
        members = labels[shuffled] == label
        rank[members] = torch.arange(int(members.sum()))
    return rank, shuffled
