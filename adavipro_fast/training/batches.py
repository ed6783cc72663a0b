"""The batches of an epoch, gathered ahead; their order depends only on seed and epoch."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adavipro_fast.data.split import Split
from adavipro_fast.training.group import Group


class Batch(NamedTuple):
    """A process's share of a batch."""

    images: Tensor
    """(B, 3, S, S) uint8"""
    labels: Tensor
    """(B,)"""
    positions: Tensor
    """(B,) in the split, on the CPU"""
    total: int
    """images of the batch in all processes"""


def shuffled(count: int, *, seed: int, epoch: int) -> Tensor:
    """Return the epoch's order of `count` images."""
    # NumPy's generator, because torch's would use only 32 bits of a seed.
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(count))


def gathered(
    split: Split, order: Tensor, size: int, *, device: torch.device, group: Group
) -> Iterator[Batch]:
    """Yield an order's batches, gathered one step ahead."""
    chunks = order.split(size)

    def batch(chunk: Tensor) -> Batch:
        mine = chunk[group.share(len(chunk))]
        return Batch(*split.batch(mine, device), mine, len(chunk))

    if not len(order):
        return
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(batch, chunks[0])
        for following in chunks[1:]:
            current, ahead = ahead.result(), pool.submit(batch, following)
            yield current
        yield ahead.result()
