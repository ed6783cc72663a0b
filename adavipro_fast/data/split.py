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


def stratified(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose `count` positions spread evenly over the classes; return (chosen, others), sorted."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    # Number each image within its class, then take the images with the lowest numbers.
    rank = torch.zeros_like(shuffled)
    for label in labels.unique():
        members = labels[shuffled] == label
        rank[members] = torch.arange(int(members.sum()))
    order = shuffled[torch.argsort(rank, stable=True)]
    return order[:count].sort().values, order[count:].sort().values
