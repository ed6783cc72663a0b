"""Models without a prompt: an image tower with a linear head, or in front of class embeddings.

Their files are `head.safetensors` and `encoder.safetensors`.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adavipro_fast.checkpoint import EncoderIdentity, parse
from adavipro_fast.clip import FrozenEncoder, Preprocess
from adavipro_fast.functional import check_region, normalise
from adavipro_fast.prompt import Prediction, PromptConfig

BASELINE_FORMAT = "adavipro-fast-baseline/1"


class Baseline(nn.Module):
    """An image tower with a linear head, or in front of class embeddings.

    Args:
        encoder: the image tower; a fine-tuned one may train.
        classes: (K, E) unit rows; the head's rows (K, F) for a linear probe.
        bias: (K,) of the head; none for class embeddings.
        region_size: of the closed mask that stands in a prediction.
    """

    bias: Tensor | None

    def __init__(
        self, encoder: FrozenEncoder, classes: Tensor, bias: Tensor | None, region_size: int
    ) -> None:
        super().__init__()
        self.encoder, self.region_size = encoder, region_size
        self.register_buffer("classes", classes)
        self.register_buffer("bias", bias)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(encoder.preprocess, name)))

    def forward(self, images: Tensor) -> Prediction:
        """Classify uint8 images (B, 3, S, S)."""
        x = normalise(images, self.get_buffer("mean"), self.get_buffer("std"))
        embedding = self.encoder(x)
        classes = self.get_buffer("classes")
        if self.bias is None:
            logits = self.encoder.logit_scale * embedding @ classes.t()
        else:
            logits = F.linear(features(self.encoder, x), classes, self.bias)
        grid = images.shape[-1] // self.region_size
        return Prediction(logits, x.new_zeros(len(images), grid, grid), embedding)


@contextlib.contextmanager
def without_projection(encoder: FrozenEncoder) -> Iterator[None]:
    """Leave out the last projection of a vision transformer; other towers have none to leave."""
    visual: Any = encoder.visual
    projection = getattr(visual, "proj", None)
    if projection is not None:
        visual.proj = None
    try:
        yield
    finally:
        if projection is not None:
            visual.proj = projection


def features(encoder: FrozenEncoder, images: Tensor) -> Tensor:
    """Return what the tower gives before its projection: normalised (B, 3, S, S) to (B, F)."""
    with without_projection(encoder):
        return encoder.tower(images)


def is_baseline(metadata: dict[str, Any]) -> bool:
    """Tell whether a file's metadata is that of `run_baseline`."""
    return metadata.get("format") == BASELINE_FORMAT


def load_baseline(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any], encoder: FrozenEncoder
) -> tuple[Baseline, tuple[str, ...], PromptConfig]:
    """Check what `head.safetensors` or `encoder.safetensors` holds, and build its model.

    Returns:
        The model in evaluation mode, class names and configuration.

    Raises:
        ValueError: not ours, of another encoder, or not whole.
    """
    try:
        names = tuple(str(name) for name in metadata["class_names"])
        config: PromptConfig = parse(PromptConfig, metadata["config"])
        identity: EncoderIdentity = parse(EncoderIdentity, metadata["encoder"])
        preprocess: Preprocess = parse(Preprocess, metadata["preprocess"])
        if encoder.sha256 != identity.sha256:
            raise ValueError(
                f"it was made with the encoder {identity.name!r} ({identity.sha256[:12]}), this is "
                f"{encoder.name!r} ({encoder.sha256[:12]}); name that one with --model"
            )
        encoder.prepare_by(preprocess)
        check_region(preprocess.size, config.region_size)
        if config.method == "linear_probe":
            weight, bias = tensors["head.weight"], tensors["head.bias"]
            with torch.no_grad():
                side = encoder.preprocess.size
                width = features(encoder, torch.zeros(1, 3, side, side)).shape[1]
            if weight.shape != (len(names), width) or bias.shape != (len(names),):
                raise ValueError(f"the head has shape {tuple(weight.shape)}")
            if weight.dtype != torch.float32 or bias.dtype != torch.float32:
                raise ValueError(f"the head is {weight.dtype}; fp32 is needed")
            return Baseline(encoder, weight, bias, config.region_size).eval(), names, config
        state = {k.removeprefix("visual."): v for k, v in tensors.items() if k.startswith("vis")}
        encoder.visual.load_state_dict(state)
        encoder.logit_scale = tensors["logit_scale"].item()
        classes = tensors["class_embeddings"].float()
        if classes.ndim != 2 or len(classes) != len(names):
            raise ValueError(f"class_embeddings has shape {tuple(classes.shape)}")
        return Baseline(encoder, classes, None, config.region_size).eval(), names, config
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
