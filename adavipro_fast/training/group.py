"""The processes of a run: those started by torchrun, or a single one.

The global batch, the noise and the order of images do not depend on the number of processes: each
process computes its share of every batch, and gradients and figures are summed in one message per
step.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from adavipro_fast.device import torch_device

LONGEST_TEXT = 4096
FOLDER = "adavipro_fast folder"


@dataclass(frozen=True)
class Group:
    """The processes of a run, and this one's rank."""

    rank: int = 0
    size: int = 1
    store: Any = None
    """torchrun's store, which survives a restart of the processes"""

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and prints."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Return this process's slice of a batch of `count` images."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, value: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place."""
        if self.size > 1:
            try:
                dist.all_reduce(value)
            except RuntimeError as error:
                raise ConnectionError(f"another process of this run has ended: {error}") from error
        return value

    def sum_gradients(self, parameters: Iterable[nn.Parameter], figures: Tensor) -> Tensor:
        """Sum all gradients in place, and figures (n,), in one message; return the figures."""
        if self.size == 1:
            return figures
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self.sum(torch.cat([*(g.flatten() for g in gradients), figures]))
        total: Tensor
        *parts, total = flat.split([*(g.numel() for g in gradients), figures.numel()])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return total

    def agreed(self, text: str, device: torch.device) -> str:
        """Return the leading process's text, such as a path, of at most 4096 bytes."""
        if self.size == 1:
            return text
        message = torch.zeros(LONGEST_TEXT, dtype=torch.uint8, device=device)
        if self.leads:
            content = torch.frombuffer(bytearray(os.fsencode(text)), dtype=torch.uint8)
            message[: len(content)] = content
        try:
            dist.broadcast(message, 0)
        except RuntimeError as error:
            raise ConnectionError(f"another process of this run has ended: {error}") from error
        return os.fsdecode(bytes(message.tolist()).rstrip(b"\0"))

    def keep_folder(self, folder: Path) -> None:
        """Store the run's folder for a restart."""
        if self.store is not None:
            self.store.set(FOLDER, os.fsencode(folder))

    def kept_folder(self) -> Path | None:
        """Return the folder stored before a restart, if any."""
        if self.store is None or not restarts() or not self.store.check([FOLDER]):
            return None
        return Path(os.fsdecode(self.store.get(FOLDER)))

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


def join(device: str) -> tuple[Group, torch.device]:
    """Join the processes that torchrun started; without it, return a group of one.

    Args:
        device: auto or a device; with several GPUs, each process uses its own.

    Returns:
        The group and this process's device.
    """
    own_device = torch_device(device)
    if not launched():
        return Group(), own_device
    if own_device.type == "cuda":
        own_device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own_device)
    store, rank, size = meeting()
    if not dist.is_initialized():
        # A new prefix, since torchrun's store keeps the dead processes' entries over a restart.
        own = PrefixStore(f"restart {restarts()}", store)
        backend = "nccl" if own_device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=own, rank=rank, world_size=size)
    return Group(rank, size, store), own_device


@cache
def meeting() -> tuple[Any, int, int]:
    """Return torchrun's store, this process's rank, and the number of processes."""
    store, rank, size = next(rendezvous("env://"))
    return store, rank, size


def leave() -> None:
    """Leave the group, if there is one."""
    if launched() and dist.is_initialized():
        dist.destroy_process_group()


def launched() -> bool:
    """Report whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def leading() -> bool:
    """Report whether this process prints: the first one, or the only one."""
    return not launched() or os.environ["RANK"] == "0"


def restarts() -> int:
    """Return how often torchrun has restarted this process after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
