"""How a run is configured: optimiser, schedule, recipes."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from adavipro_fast.cli import Device, Threads
from adavipro_fast.data.sets import DataConfig
from adavipro_fast.files.checked import read
from adavipro_fast.method.config import HeadKind, Kernel, Precision, PromptConfig, TrainPrecision
from adavipro_fast.method.preprocess import WHITE, Decode

# VP warms up for 1000 steps; shorter runs give it a tenth of their steps.
WARM_UP_STEPS, WARM_UP_SHARE = 1000, 0.1
# Of rates, temperatures and counts: more is a slip of the keyboard.
LARGEST = 1e9


@dataclass(frozen=True)
class OptimiserConfig:
    """Optimiser and schedule."""

    epochs: int = 50
    """passes over the training images"""
    batch_size: int = 64
    """images per step"""
    lr_prompt: float = 40.0
    """peak learning rate of the template"""
    lr_generator: float = 1.0
    """peak learning rate of the mask generator"""
    generator_optimiser: Literal["sgd", "adam"] = "sgd"
    """optimiser of the mask generator; adam's step size does not depend on the gradient's scale"""
    generator_start: float = 0.0
    """share of the steps during which the mask generator stays frozen"""
    lr_head: float = 3e-3
    """peak learning rate of a linear head (AdamW), relative to its mean initial magnitude, where
    the head learns by gradient steps"""
    decay_head: float = 0.0
    """weight decay of a linear head"""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: all classes count the same in the training loss and in the fit of a linear probe,
    however many images they have"""
    judge: Literal["top1", "macro"] = "top1"
    """accuracy on validation images that decides which epoch is kept: of all images, or the mean of
    the classes'"""
    lr_encoder: float = 1e-5
    """peak learning rate of full_finetune (AdamW)"""
    clip_prompt: float = 0.0
    """largest gradient norm of the template; 0 disables clipping"""
    tau: float = 5.0
    """initial temperature of the mask sampling"""
    tau_decay: float = 0.98
    """factor by which the temperature falls per epoch"""
    tau_min: float = 0.5
    """smallest temperature"""
    precision: TrainPrecision = "auto"
    """precision of the encoder; prompt and masks stay in fp32 (auto: bf16 if the processor supports
    it)"""
    seed: int = 0
    """random seed"""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "tau", "tau_decay", "tau_min"):
            if not 0 < getattr(self, name) < LARGEST:
                limits = f"use a number above 0 and below {LARGEST:g}"
                raise ValueError(f"{name} is {getattr(self, name)}; {limits}")
        for name in (
            "lr_prompt",
            "lr_generator",
            "lr_head",
            "decay_head",
            "lr_encoder",
            "clip_prompt",
        ):
            if not 0 <= getattr(self, name) < LARGEST:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 to {LARGEST:g}")
        if self.tau_decay > 1:
            raise ValueError(f"tau_decay is {self.tau_decay}; use a number up to 1")
        if not 0 <= self.generator_start <= 1:
            raise ValueError(f"generator_start is {self.generator_start}; use 0 to 1")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}; use 0 to {2**31 - 1}")

    @property
    def balanced(self) -> bool:
        """Whether all classes count the same in training."""
        return self.class_weights == "balanced"

    @property
    def known_precision(self) -> Precision:
        """The precision of a run that has begun.

        Raises:
            ValueError: it was not chosen yet.
        """
        if self.precision == "auto":
            raise ValueError("precision is auto; resolve it for the device first")
        return self.precision

    def temperature(self, epoch: int) -> float:
        """Return τ of an epoch, counted from 0: tau · tau_decay^epoch, at least tau_min."""
        return max(self.tau * self.tau_decay**epoch, self.tau_min)


def lr_factor(step: int, total: int) -> float:
    """Scale the learning rate: linear warm-up, then half a cosine down to 0."""
    warm_up = min(WARM_UP_STEPS, round(WARM_UP_SHARE * total))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


@dataclass(frozen=True)
class TrainConfig:
    """Train a visual prompt for a frozen CLIP encoder; without arguments, train the demo."""

    help_first: ClassVar[tuple[str, ...]] = (
        "data",
        "model",
        "pretrained",
        "method",
        "head",
        "prompt_size",
        "epochs",
        "output",
        "resume",
        "device",
    )

    recipe: Literal["paper", "best"] = "best"
    """defaults of the other flags; explicit flags override it"""
    model: str = "demo"
    """open_clip model name, local-dir:PATH, demo, or timm:NAME with --head linear"""
    pretrained: str = ""
    """weights: a tag of open_clip or timm, or a file"""
    template: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """text with {} for the class name; repeat for an ensemble (default: This is a photo of a {})"""
    class_embeddings: Path | None = None
    """safetensors file with a tensor class_embeddings (K, E) to use instead of the text encoder"""
    head_from: Path | None = None
    """head.safetensors of a linear probe to start from and compare with (default: a new probe)"""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    data: DataConfig = field(default_factory=DataConfig)
    white_level: int = WHITE
    """white value of 16-bit grey images, such as 4095 for 12-bit cameras; stored in the
    checkpoint"""
    decode: Decode = "full"
    """full: resize with Pillow; fast: with PyTorch, in a tenth of the time and within two grey
    levels; scaled: also decode large JPEGs at 1/2, 1/4 or 1/8 of their size; stored in the
    checkpoint"""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    device: Device = "auto"
    threads: Threads = None
    kernel: Kernel = "auto"
    """fused (Triton) or plain (PyTorch); auto: fused on CUDA if it supports the settings"""
    output: Path | None = None
    """folder of the run (default: a new one under runs/)"""
    resume: Path | None = None
    """folder of a run to resume, with its own settings"""
    accept_change: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """with --resume: what may differ: a flag's name, data, encoder or embeddings; repeatable"""


def recipe(
    name: str, prompt_size: int = PromptConfig.prompt_size, head: HeadKind = "text"
) -> TrainConfig:
    """Return a recipe's defaults.

    `best`'s learning rate of the template is lower for wider frames, which cover the object, and
    for linear heads, which start from a probe that large steps would spoil.
    """
    if name == "paper":
        return TrainConfig(recipe="paper", optimiser=OptimiserConfig(batch_size=256))
    return TrainConfig(
        prompt=PromptConfig(
            prompt_size=prompt_size,
            edge="laplacian-magnitude",
            edge_padding="replicate",
            prompt_init="zero",
            generator_init="avoid-edges",
        ),
        optimiser=OptimiserConfig(
            batch_size=32,
            lr_prompt=round(
                (12 if head == "linear" else 40) * min(1.0, 30 / prompt_size) ** 1.5, 1
            ),
            clip_prompt=0.05,
            lr_generator=1e-5,
            generator_optimiser="adam",
            generator_start=0.3,
        ),
    )


def stored(config: TrainConfig) -> dict[str, Any]:
    """Return a configuration as JSON, the settings in a run's state."""
    return dict(json.loads(json.dumps(asdict(config), default=str)))


def read_stored(settings: dict[str, Any], path: Path) -> TrainConfig:
    """Rebuild a configuration from what `stored` returned.

    Raises:
        ValueError: settings are missing or of the wrong kind.
    """
    if "margin" in settings and isinstance(settings.get("prompt"), dict):
        # In older states the margin is a setting of its own.
        settings = settings | {"prompt": settings["prompt"] | {"margin": settings["margin"]}}
    try:
        config: TrainConfig = read(TrainConfig, settings)
    except ValueError as error:
        raise ValueError(f"{path} has invalid settings: {error}") from error
    return replace(config, accept_change=())


def difference(before: TrainConfig, now: TrainConfig) -> dict[str, str]:
    """Tell flags that differ: name to a line that says how."""
    old, new = (_flat(asdict(config)) for config in (before, now))
    return {k: f"--{k} {new[k]} instead of {v}" for k, v in old.items() if new[k] != v}


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value) if isinstance(value, dict) else {name.replace("_", "-"): value}
    return flat
