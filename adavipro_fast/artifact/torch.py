"""Run what training keeps with PyTorch: a checkpoint in front of its encoder."""

from dataclasses import dataclass, replace
from pathlib import Path

import open_clip
import torch
from torch import Tensor

from adavipro_fast.artifact.artifact import Artifact
from adavipro_fast.device import full_fp32, torch_device
from adavipro_fast.files.about import Description, Tasks
from adavipro_fast.files.checkpoint import Checkpoint, load_checkpoint
from adavipro_fast.method.clip import NoText, TextTower, load_clip
from adavipro_fast.method.config import EncoderIdentity, Precision
from adavipro_fast.method.encoder import FrozenEncoder
from adavipro_fast.method.model import AdaViPro, Prediction


@dataclass(frozen=True)
class TorchArtifact(Artifact):
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
        encoder = encoder_of(checkpoint, model, pretrained)
        prompted = checkpoint.model(encoder)
        prompted.encoder = prompted.encoder.with_(precision=precision)
        return cls.of(checkpoint, prompted, place)

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: AdaViPro, place: torch.device) -> "TorchArtifact":
        """Run a checkpoint's model on a device."""
        about = Description.of_checkpoint(checkpoint, model.encoder.precision)
        return cls(model.to(place), about, provider=str(place))

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, task: Tasks | None = None) -> Prediction:
        """Classify (B, 3, S, S) uint8 RGB pixels."""
        self.about.numbers(task, len(pixels))
        with full_fp32():
            return Prediction(*(part.cpu() for part in self.model(pixels.to(self.provider))))

    @torch.inference_mode()
    def prompted(self, pixels: Tensor) -> Tensor:
        """Return what the encoder sees of (B, 3, S, S) uint8 RGB pixels, as such pixels.

        A prompt may leave the range of a byte; what does is cut off.
        """
        prompt = self.model.prompt
        images = prompt(pixels.to(self.provider)).images
        mean, std = (values.view(3, 1, 1) for values in (prompt.mean, prompt.std))
        seen: Tensor = (255 * (images * std + mean)).round().clamp(0, 255)
        return seen.to(torch.uint8).cpu()

    def unprompted(self) -> "TorchArtifact":
        """Return the same encoder and head without the prompt, as a baseline of its own.

        A margin is the prompt's, and so is the calibration.
        """
        model = self.model
        config = replace(
            model.config,
            method="linear_probe" if model.head.learns else "zero_shot",
            margin=0,
        )
        alone = AdaViPro(
            model.encoder,
            model.head.rows,
            config,
            class_bias=model.head.bias,
            logit_scale=model.head.scale,
        )
        about = replace(
            self.about,
            config=config,
            preprocess=replace(self.about.preprocess, margin=0),
            baseline=True,
            calibration=self.about.calibration.without,
        )
        return TorchArtifact(alone.eval().to(self.provider), about, self.provider)


def encoder_of(
    checkpoint: Checkpoint, model: str | None = None, pretrained: str | None = None
) -> FrozenEncoder:
    """Load the encoder of a checkpoint; arguments are `clip_of`'s."""
    return clip_of(checkpoint, model, pretrained)[0]


def clip_of(
    checkpoint: Checkpoint, model: str | None = None, pretrained: str | None = None
) -> tuple[FrozenEncoder, TextTower | NoText]:
    """Load the encoder of a checkpoint and its text tower.

    Args:
        checkpoint: names it.
        model: where it now lies instead.
        pretrained: tag or path of its weights instead.
    """
    known = checkpoint.encoder
    return load_clip(
        model or known.name,
        known.pretrained if pretrained is None else pretrained,
        quick_gelu=activation_of(known),
    )


def activation_of(encoder: EncoderIdentity) -> bool:
    """Return whether an encoder ran with QuickGELU, which weights and their hash do not say.

    Older checkpoints had what open_clip's tag says, and GELU with weights of a file.
    """
    if encoder.quick_gelu is not None:
        return encoder.quick_gelu
    cfg = open_clip.get_pretrained_cfg(encoder.name, encoder.pretrained)
    return bool(cfg.get("quick_gelu", False))
