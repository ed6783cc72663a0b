"""One split of decoded images, and how it is gathered into batches."""

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
        """Yield images in order, in batches of at most `size`; of these every `of`-th one."""
        for positions in torch.arange(len(self)).split(size)[part::of]:
            yield self.batch(positions, device)

    def resident(self, device: torch.device) -> "Split":
        """Keep the images on a CUDA device where they take at most half of its free memory."""
        if device.type != "cuda":
            return self
        free, _ = torch.cuda.mem_get_info(device)
        if self.images[:1].numel() * len(self) > free // 2:
            return self
        images = self.images[self.rows].to(device)
        return Split(images, self.labels[self.rows], torch.arange(len(self)))


def stratified(
    labels: Tensor, count: int, seed: int, *, spare_last: bool = False
) -> tuple[Tensor, Tensor]:
    """Choose `count` positions, the same share of each class; return (chosen, others), sorted.

    Args:
        labels: (N,).
        count: how many to choose; with as many as there are classes, each has one.
        seed: of the choice.
        spare_last: choose a class's last image only when nothing else is left.
    """
    rank, order = _ranks(labels, seed)
    sizes = labels.bincount()[labels[order]]
    share = rank / sizes
    if spare_last:
        share[rank == sizes - 1] += 1
    return _cut(order[torch.argsort(share, stable=True)], count)


def even(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose `count` positions, the same number of each class; return (chosen, others), sorted."""
    rank, order = _ranks(labels, seed)
    return _cut(order[torch.argsort(rank, stable=True)], count)


def _cut(order: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return order[:count].sort().values, order[count:].sort().values


def _ranks(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Shuffle positions; return each one's number within its class, and the positions."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    # Number each image within its class, then take the images with the lowest numbers.
    rank = torch.zeros_like(shuffled)
    for label in labels.unique():
        members = labels[shuffled] == label
        rank[members] = torch.arange(int(members.sum()))
    return rank, shuffled
