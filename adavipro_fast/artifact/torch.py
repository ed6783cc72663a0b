"""Run what training keeps with PyTorch: a checkpoint in front of its encoder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adavipro_fast.artifact.description import Description
from adavipro_fast.device import full_fp32, torch_device
from adavipro_fast.files.checkpoint import load_checkpoint
from adavipro_fast.method.clip import load_encoder
from adavipro_fast.method.config import PROMPTED, Precision
from adavipro_fast.method.model import AdaViPro, Prediction


@dataclass(frozen=True)
class TorchArtifact:
    """A model run by PyTorch."""

    model: AdaViPro
    about: Description
    provider: str
    backend: str = "torch"

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        model: str | None = None,
        pretrained: str | None = None,
        precision: Precision = "fp32",
        device: str = "auto",
    ) -> "TorchArtifact":
        """Load a checkpoint and its encoder; arguments and errors are `open_artifact`'s."""
        place = torch_device(device)
        checkpoint = load_checkpoint(path)
        encoder = load_encoder(
            model or checkpoint.encoder.name,
            checkpoint.encoder.pretrained if pretrained is None else pretrained,
        )
        prompted = checkpoint.model(encoder)
        prompted.encoder = prompted.encoder.with_(precision=precision)
        about = Description(
            checkpoint.class_names,
            checkpoint.preprocess,
            checkpoint.config,
            precision,
            "uint8",
            checkpoint.config.method not in PROMPTED,
            checkpoint.calibration,
        )
        return cls(prompted.to(place), about, provider=str(place))

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Prediction:
        """Classify (B, 3, S, S) uint8 RGB pixels."""
        with full_fp32():
            return Prediction(*(part.cpu() for part in self.model(pixels.to(self.provider))))
