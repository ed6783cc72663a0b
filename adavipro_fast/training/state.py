"""What `last.safetensors` holds: all that a resumed run needs.

All randomness is a function of (seed, epoch, step), so that weights, the optimisers' tensors and a
few counters are enough.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adavipro_fast.files.checked import read
from adavipro_fast.files.checkpoint import load_trained, trained_tensors
from adavipro_fast.files.whole import read_safetensors, safetensors_bytes, write_whole
from adavipro_fast.method.model import AdaViPro
from adavipro_fast.training.parts import Part

UNTRAINED = -1
# What torch's optimisers keep of a parameter; `step` is a number, the others are of its shape.
OPTIMISER_STATE: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.Adam: ("exp_avg", "exp_avg_sq", "step"),
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq", "step"),
}


@dataclass
class Progress:
    """Where a run stands; all of it is saved in `last.safetensors`."""

    epoch: int = 0
    step: int = 0
    """steps done within the epoch"""
    loss_sum: float = 0.0
    correct: int = 0
    seconds: float = 0.0
    best_val: float = -1.0
    """validation top-1 of the model that is kept, percent"""
    best_score: float = -1.0
    """what it was chosen by: top-1 or the mean of the classes; -1 in older files"""
    least_val: float = 0.0
    """what an epoch must exceed, whatever came before"""
    untrained_right: str = ""
    """0 or 1 for each validation image: whether the untrained model was right"""
    untrained_loss: list[float] = field(default_factory=list)
    """cross-entropy of each validation image under the untrained model, calibrated"""
    best_epoch: int = UNTRAINED
    scaler: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    """of each split; empty in older files"""

    @property
    def score(self) -> float:
        """What the kept model was chosen by, percent; top-1 in older files."""
        return self.best_val if self.best_score < 0 else self.best_score


@dataclass(frozen=True)
class State:
    """What `last.safetensors` says beside its tensors."""

    settings: dict[str, Any]
    """resolved configuration of the whole run"""
    identity: dict[str, str]
    """hashes of what the run depends on"""
    progress: Progress


def read_state(path: Path) -> tuple[dict[str, Tensor], State]:
    """Read `last.safetensors`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a state of ours.
    """
    tensors, metadata = read_safetensors(path)
    try:
        return tensors, read(State, metadata)
    except ValueError as error:
        raise ValueError(f"{path} is not a valid run state: {error}; start a new run") from error


def write_state(
    path: Path,
    state: State,
    model: AdaViPro,
    parts: Sequence[Part],
    more: Mapping[str, Tensor] | None = None,
) -> None:
    """Write all that `restore` needs, and more tensors."""
    tensors = trained_tensors(model) | dict(more or {})
    for part in parts:
        for name, parameter in part.parameters.items():
            kept = part.optimiser.state[parameter]
            tensors |= {f"{key}.{name}": value.cpu() for key, value in kept.items()}
    write_whole(path, safetensors_bytes(tensors, asdict(state)))


def check_identity(before: Mapping[str, str], now: Mapping[str, str], but: Sequence[str]) -> None:
    """Raise ValueError where data or encoder are not those that the run began with."""
    for name, value in before.items():
        if name not in but and now.get(name) != value:
            raise ValueError(
                f"{name} changed since the run started: {value[:12]} then, "
                f"{now.get(name, 'unknown')[:12]} now; restore it, or accept the change with "
                f"--accept-change {name}"
            )


def restore(
    path: Path, tensors: Mapping[str, Tensor], model: AdaViPro, parts: Sequence[Part]
) -> None:
    """Give model and optimisers the tensors of a state.

    Raises:
        ValueError: one is missing, or of the wrong shape or type.
    """
    shapes = {name: value.shape for name, value in trained_tensors(model).items()}
    kept = []
    for part in parts:
        keys = OPTIMISER_STATE[type(part.optimiser)]
        for name, parameter in part.parameters.items():
            # A part that has not begun has no state.
            if any(f"{key}.{name}" in tensors for key in keys):
                kept += [(part.optimiser, parameter, key, f"{key}.{name}") for key in keys]
    for _, parameter, key, name in kept:
        shapes[name] = parameter.shape if key != "step" else torch.Size()
    for name, shape in shapes.items():
        value = tensors.get(name)
        if value is None or value.shape != shape or value.dtype != torch.float32:
            raise ValueError(f"{path} has no fp32 tensor {name!r} of shape {tuple(shape)}")
    load_trained(model, tensors)
    for optimiser, parameter, key, name in kept:
        # Adam counts its steps on the CPU.
        value = tensors[name] if key == "step" else tensors[name].to(parameter.device)
        optimiser.state[parameter][key] = value
