"""Load any image encoder of timm: DINO's, ConvNeXt, ResNet, ... It has no text tower."""

from pathlib import Path

import timm
from timm.data.config import resolve_model_data_config
from torch import nn

from adavipro_fast.method.encoder import FrozenEncoder
from adavipro_fast.method.preprocess import Preprocess

PREFIX = "timm:"
# Of cosines, as CLIP's at most; a linear head carries any scale itself.
LOGIT_SCALE = 100.0
RESIZE_MODES = {"center": "shortest", "squash": "squash"}


def load_timm(model: str, pretrained: str = "") -> FrozenEncoder:
    """Load a timm model's features, on the CPU in fp32.

    Args:
        model: `timm:NAME`.
        pretrained: a tag of timm's, a file with its weights, or empty for random ones.

    Raises:
        ValueError: timm does not know the model or cannot load it, or its images are not square or
            are prepared in a way that is not known.
    """
    name = model.removeprefix(PREFIX)
    if not timm.is_model(name.split(".")[0]):
        raise ValueError(
            f"model {model!r} is unknown to timm {timm.__version__}; timm.list_models()"
        )
    name, _, tag = name.partition(".")
    file = Path(pretrained) if pretrained and Path(pretrained).is_file() else None
    tag = tag if file is not None or not pretrained else pretrained
    tagged = f"{name}.{tag}" if tag else name
    overlay = {"file": str(file), "hf_hub_id": None, "url": None} if file else None
    try:
        visual: nn.Module = timm.create_model(
            tagged, pretrained=bool(tag or file), num_classes=0, pretrained_cfg_overlay=overlay
        )
    except Exception as error:  # What timm, its hub and torch raise has no common base.
        reason = str(error).split("\n")[0][:300]
        raise ValueError(
            f"model {model!r} with pretrained {pretrained!r} cannot be loaded: {reason}"
        ) from error
    settings = resolve_model_data_config(visual)
    _, height, width = settings["input_size"]
    if height != width:
        raise ValueError(f"model {model!r} takes {height}x{width} images; square ones are needed")
    if settings["crop_mode"] not in RESIZE_MODES:
        raise ValueError(f"model {model!r} crops images by {settings['crop_mode']!r}; not known")
    if settings["crop_mode"] == "squash" and settings["crop_pct"] != 1:
        raise ValueError(f"model {model!r} crops what it squashed, which is not known")
    preprocess = Preprocess(
        size=height,
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        interpolation=settings["interpolation"],
        resize_mode=RESIZE_MODES[settings["crop_mode"]],
        crop=settings["crop_pct"],
    )
    return FrozenEncoder(
        visual, preprocess, name=model, pretrained=pretrained, logit_scale=LOGIT_SCALE
    )
