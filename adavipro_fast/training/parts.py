"""What learns in a run, each part with its own optimiser and rate."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from adavipro_fast.method.model import AdaViPro
from adavipro_fast.training.config import OptimiserConfig

MOMENTUM = 0.9
FITTED = ("zero_shot", "linear_probe")


@dataclass(frozen=True)
class Part:
    """Parameters that learn together."""

    flag: str
    """that sets the rate"""
    rate: float
    """peak learning rate"""
    parameters: dict[str, nn.Parameter]
    optimiser: torch.optim.Optimizer
    clip: float = 0.0
    """longest gradient, as a Euclidean norm; 0 leaves gradients as they are"""
    start: float = 0.0
    """share of the run's steps for which it waits"""


def parts_of(model: AdaViPro, config: OptimiserConfig, *, head_steps: bool = True) -> list[Part]:
    """List what of a model learns: template, mask generator, linear head, the tower's weights.

    Zero-shot has nothing to learn, and a linear probe is fitted before.

    Args:
        model: all of it.
        config: rates and optimisers.
        head_steps: a linear head learns by gradient steps, too.
    """
    return [] if model.config.method in FITTED else list(_parts(model, config, head_steps))


def _parts(model: AdaViPro, config: OptimiserConfig, head_steps: bool) -> Iterator[Part]:
    if model.prompt.template is not None:
        named = _named(model.prompt.template, "template")
        yield Part("--lr-prompt", config.lr_prompt, named, _sgd(named), clip=config.clip_prompt)
    if model.prompt.generator is not None:
        named = _named(model.prompt.generator, "generator")
        adam = config.generator_optimiser == "adam"
        optimiser = torch.optim.Adam(named.values(), lr=0.0) if adam else _sgd(named)
        yield Part(
            "--lr-generator", config.lr_generator, named, optimiser, start=config.generator_start
        )
    if head_steps and model.head.learns:
        size = model.head.rows.detach().square().mean().sqrt().item()
        named = model.head.trained()
        adam_w = torch.optim.AdamW(named.values(), lr=0.0, weight_decay=config.decay_head)
        yield Part("--lr-head", config.lr_head * size, named, adam_w)
    if model.config.method == "full_finetune":
        named = {k: p for k, p in model.encoder.named_parameters() if p.requires_grad}
        optimiser = torch.optim.AdamW(named.values(), lr=0.0, weight_decay=0.0)
        yield Part("--lr-encoder", config.lr_encoder, named, optimiser)


def _named(module: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    return {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}


def _sgd(named: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(named.values(), lr=0.0, momentum=MOMENTUM)
