"""Load any image encoder of timm (DINO, ConvNeXt, ResNet, ...), which has no text tower."""

from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_model_data_config
from timm.models import load_state_dict
from torch import nn

from adavipro_fast.method.encoder import FrozenEncoder
from adavipro_fast.method.preprocess import Preprocess

PREFIX = "timm:"
# Factor of the cosine: CLIP's largest. A linear head learns its own scale.
LOGIT_SCALE = 100.0
RESIZE_MODES = {"center": "shortest", "squash": "squash"}


def load_timm(model: str, pretrained: str = "") -> FrozenEncoder:
    """Load a timm model without its classifier, on the CPU in fp32.

    Args:
        model: `timm:NAME`.
        pretrained: one of timm's tags, a file of weights, or empty for random weights.

    Raises:
        ValueError: timm does not know the model or cannot load it, or its images are not square, or
            its preprocessing is not supported.
    """
    name = model.removeprefix(PREFIX)
    if not timm.is_model(name.split(".")[0]):
        raise ValueError(f"timm {timm.__version__} has no model {model!r}; see timm.list_models()")
    name, _, tag = name.partition(".")
    file = Path(pretrained) if pretrained and Path(pretrained).is_file() else None
    tag = tag if file is not None or not pretrained else pretrained
    tagged = f"{name}.{tag}" if tag else name
    try:
        options = {} if file is None else _options(file, tagged)
        visual: Any = timm.create_model(tagged, pretrained=bool(tag or file), **options).eval()
    except Exception as error:  # timm, its hub and torch share no base exception.
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"model {model!r} with pretrained {pretrained!r} cannot be loaded: {reason}"
        ) from error
    if not isinstance(getattr(visual, "get_classifier", nn.Identity)(), nn.Identity):
        visual.reset_classifier(0)
    settings = resolve_model_data_config(visual)
    _, height, width = settings["input_size"]
    if height != width:
        raise ValueError(
            f"model {model!r} needs {height}x{width} images; only square images are supported"
        )
    if settings["crop_mode"] not in RESIZE_MODES:
        raise ValueError(
            f"model {model!r} uses crop mode {settings['crop_mode']!r}, which is not supported"
        )
    if settings["crop_mode"] == "squash" and settings["crop_pct"] != 1:
        raise ValueError(
            f"model {model!r} crops images after squashing them, which is not supported"
        )
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


def _options(file: Path, name: str) -> dict[str, Any]:
    """Return `create_model`'s options for a file: with the file's classes, or no classifier."""
    overlay: dict[str, Any] = {"file": str(file), "hf_hub_id": None, "url": None}
    settings = timm.get_pretrained_cfg(name, allow_unregistered=True)
    # JAX archives have a separate loader, which does not support another number of classes.
    state = {} if file.suffix == ".npz" else load_state_dict(str(file))
    rows = state.get(f"{settings.classifier}.weight") if settings is not None else None
    if rows is None:
        return {"num_classes": 0, "pretrained_cfg_overlay": overlay}
    # timm would drop the classifier if the number of classes differed from the configuration's.
    overlay["num_classes"] = len(rows)
    return {"num_classes": len(rows), "pretrained_cfg_overlay": overlay}
