"""Load a CLIP with open_clip: its frozen image tower and its text tower."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from adavipro_fast.method.encoder import FrozenEncoder
from adavipro_fast.method.preprocess import Preprocess
from adavipro_fast.method.timm_encoder import PREFIX, load_timm
from adavipro_fast.method.transformers_clip import is_transformers_clip, load_transformers_clip
from adavipro_fast.method.weights import (
    SETTINGS,
    one_line_errors,
    resolved_name,
    settings_of_file,
)

DEFAULT_TEMPLATE = "This is a photo of a {}"
DEMO_MODEL = Path(__file__).parents[1] / "demo_model"


def check_templates(templates: Sequence[str]) -> None:
    """Raise ValueError if a template has no `{}` for the class name."""
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"template {template!r} has no {{}} for the class name")


def readable(class_name: str) -> str:
    """Format a raw class name for the text tower: lower case, with spaces for `_` and `-`."""
    return class_name.replace("_", " ").replace("-", " ").lower()


@dataclass(frozen=True)
class TextTower:
    """The text tower of a CLIP, which embeds the class names."""

    model: Any
    tokenizer: Any

    @torch.no_grad()
    def class_embeddings(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Embed each class as the mean over templates of its text embeddings.

        Args:
            class_names: K raw names, formatted by `readable`.
            templates: texts with `{}` where the class name goes.

        Returns:
            (K, E) fp32 unit rows.

        """
        rows = []
        for name in class_names:
            tokens = self.tokenizer([t.replace("{}", readable(name)) for t in templates])
            rows.append(self.model.encode_text(tokens, normalize=True).float().mean(0))
        return F.normalize(torch.stack(rows), dim=-1)

    def cut(self, class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
        """Return the names that the tokenizer truncates when they are put into a template."""
        return [
            name
            for name in class_names
            if any(self._is_cut(t.replace("{}", readable(name))) for t in templates)
        ]

    def _is_cut(self, text: str) -> bool:
        """Report whether a text without its last letter or digit has the same tokens."""
        # Tokenizers drop trailing blanks and some punctuation.
        stripped = re.sub(r"\W+$", "", text)
        tokens = self.tokenizer([stripped, stripped[:-1]])
        return bool(torch.equal(tokens[0], tokens[1]))


def alike(class_names: Sequence[str], rows: Tensor) -> tuple[str, str] | None:
    """Return two classes with equal embeddings (K, E), which no image can distinguish."""
    first: dict[bytes, str] = {}
    for name, row in zip(class_names, rows.contiguous().numpy(), strict=True):
        other = first.setdefault(row.tobytes(), name)
        if other != name:
            return other, name
    return None


@dataclass(frozen=True)
class NoText:
    """Replaces the text tower of an encoder without one; any use of it raises ValueError."""

    name: str

    def class_embeddings(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Raise ValueError, since names cannot be embedded."""
        raise ValueError(
            f"encoder {self.name!r} has no text encoder; use --head linear or --class-embeddings"
        )


def load_clip(
    model: str, pretrained: str = "", *, quick_gelu: bool | None = None
) -> tuple[FrozenEncoder, TextTower | NoText]:
    """Load a CLIP with open_clip, or an image encoder with timm, on the CPU in fp32.

    Args:
        model: open_clip name, `local-dir:PATH`, `demo`, or `timm:NAME`.
        pretrained: open_clip tag or path of the weights; empty means random weights for a
            built-in name.
        quick_gelu: whether a built-in architecture uses QuickGELU (default: as the published
            weights do).

    Raises:
        ValueError: open_clip does not know the model, cannot load it, or its images are not
            square.
    """
    if model.startswith(PREFIX):
        return load_timm(model, pretrained), NoText(model)
    model = model if model == "demo" else resolved_name(model)
    source = f"local-dir:{DEMO_MODEL}" if model == "demo" else model
    folder = Path(source.removeprefix("local-dir:"))
    with one_line_errors(model, pretrained):
        settings = dict(open_clip.get_pretrained_cfg(source, pretrained))
        if not settings and ":" not in source and Path(pretrained).is_file():
            settings = dict(settings_of_file(source, Path(pretrained)))
        # Set explicitly: if the weights need QuickGELU, open_clip only warns about a mismatch.
        quick = bool(settings.pop("quick_gelu", False))
        built_in = ":" not in source and not folder.is_dir()
        if quick_gelu is not None and built_in:
            quick = quick_gelu
        prepared = {k: v for k, v in settings.items() if k in SETTINGS and v is not None}
        if is_transformers_clip(folder):
            clip, tokenizer = load_transformers_clip(folder)
        else:
            clip = open_clip.create_model(
                source,
                pretrained=pretrained or None,
                force_quick_gelu=quick,
                force_preprocess_cfg=prepared,
            )
            tokenizer = open_clip.get_tokenizer(source)
    if getattr(clip.visual, "output_tokens", False):
        # CoCa's tower would also return tokens for its captions.
        clip.visual.output_tokens = False
    settings = open_clip.get_model_preprocess_cfg(clip)
    height, width = (
        settings["size"] if isinstance(settings["size"], tuple) else (settings["size"],) * 2
    )
    if height != width:
        raise ValueError(
            f"model {model!r} needs {height}x{width} images; only square images are supported"
        )
    preprocess = Preprocess(
        size=height,
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        interpolation=settings["interpolation"],
        resize_mode=settings["resize_mode"],
    )
    scale, bias = clip.logit_scale.exp().item(), getattr(clip, "logit_bias", None)
    encoder = FrozenEncoder(
        clip.visual,
        preprocess,
        name=model,
        pretrained=pretrained,
        logit_scale=min(scale, 100.0) if bias is None else scale,
        logit_bias=None if bias is None else bias.item(),
        quick_gelu=quick if built_in else None,
    )
    return encoder, TextTower(clip.eval(), tokenizer)


def load_encoder(model: str, pretrained: str = "") -> FrozenEncoder:
    """Load only the frozen image tower; arguments and errors are those of `load_clip`."""
    return load_clip(model, pretrained)[0]
