"""One runner for what training and the exporters write: images in, predictions out.

artifact = open_artifact("runs/demo-adavipro-1/checkpoint.safetensors")
logits, mask, embedding = artifact(pixels)            # (B, 3, S, S) uint8 RGB
print(artifact.class_names[logits[0].argmax()])
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from adavipro_fast.checkpoint import load_checkpoint
from adavipro_fast.clip import Precision, Preprocess, load_encoder
from adavipro_fast.prompt import AdaViPro, Prediction, PromptConfig


def torch_device(name: str) -> torch.device:
    """Turn `auto` or a device name into a device that is there.

    Raises:
        ValueError: unknown or absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch sees no CUDA device; use cpu")
    return device


class Artifact(Protocol):
    """A classifier ready to run."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Raw names in label order."""

    @property
    def preprocess(self) -> Preprocess:
        """How images become its pixels."""

    @property
    def config(self) -> PromptConfig:
        """What the prompt is made of."""

    @property
    def backend(self) -> str:
        """Which runtime."""

    @property
    def provider(self) -> str:
        """Which device or execution provider it really uses."""

    def __call__(self, pixels: Tensor) -> Prediction:
        """Classify (B, 3, S, S) uint8 RGB pixels."""


@dataclass(frozen=True)
class TorchArtifact:
    """A checkpoint run by PyTorch."""

    model: AdaViPro
    class_names: tuple[str, ...]
    preprocess: Preprocess
    config: PromptConfig
    provider: str
    backend: str = "torch"

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Prediction:
        """Classify (B, 3, S, S) uint8 RGB pixels."""
        return Prediction(*(part.cpu() for part in self.model(pixels.to(self.provider))))


def open_artifact(
    path: str | Path,
    *,
    model: str | None = None,
    pretrained: str | None = None,
    precision: Precision = "fp32",
    device: str = "auto",
) -> Artifact:
    """Open a trained prompt for inference.

    Args:
        path: `checkpoint.safetensors`.
        model: where a checkpoint's encoder now lies; its hash must match.
        pretrained: open_clip tag or path of the encoder's weights.
        precision: of a checkpoint's encoder.
        device: auto, cpu, cuda, ...

    Raises:
        FileNotFoundError: no such file.
        ValueError: not one of ours, damaged, or of another encoder.
    """
    checkpoint = load_checkpoint(Path(path))
    place = torch_device(device)
    encoder = load_encoder(
        model or checkpoint.encoder.name,
        checkpoint.encoder.pretrained if pretrained is None else pretrained,
    )
    prompted = checkpoint.model(encoder)
    prompted.run_in(encoder.in_precision(precision))
    return TorchArtifact(
        prompted.to(place),
        checkpoint.class_names,
        checkpoint.preprocess,
        checkpoint.config,
        provider=str(place),
    )
