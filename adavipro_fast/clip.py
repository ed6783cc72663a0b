"""The frozen CLIP encoder from open_clip, its preprocessing, and the class embeddings."""

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import open_clip.transform
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from adavipro_fast.device import full_fp32

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

LARGEST_SIDE = 4096
INTERPOLATIONS = ("bicubic", "bilinear", "random")
RESIZE_MODES = ("shortest", "longest", "squash")
DEFAULT_TEMPLATE = "This is a photo of a {}"
DEMO_MODEL = Path(__file__).parent / "demo_model"


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the encoder's input; travels in the checkpoint."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    resize_mode: str
    margin: int = 0
    """pixels on each side that keep the mean colour, the image shrunk to what is left"""

    def __post_init__(self) -> None:
        if not 1 <= self.size <= LARGEST_SIDE:
            raise ValueError(f"image side {self.size} is out of range; 1 to {LARGEST_SIDE} works")
        if not 0 <= self.margin < self.size / 2:
            raise ValueError(
                f"margin {self.margin} leaves no image of side {self.size}; "
                f"use 0 to {(self.size - 1) // 2}"
            )
        if not (len(self.mean) == len(self.std) == 3):
            raise ValueError("mean and std need three channels")
        if not all(map(math.isfinite, self.mean + self.std)) or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} or std {self.std} cannot normalise an image")
        if self.interpolation not in INTERPOLATIONS or self.resize_mode not in RESIZE_MODES:
            raise ValueError(
                f"interpolation {self.interpolation!r} with resize mode {self.resize_mode!r} is "
                f"unknown; use {', '.join(INTERPOLATIONS)} and {', '.join(RESIZE_MODES)}"
            )

    def stored(self) -> dict[str, Any]:
        """Return what files keep: open_clip's settings, and the margin where there is one."""
        values = asdict(self)
        if not self.margin:
            del values["margin"]
        return values

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return the size that an image has once it is resized and not yet cropped."""
        side = self.size - 2 * self.margin
        if self.resize_mode == "squash":
            return side, side
        by = min(width, height) if self.resize_mode == "shortest" else max(width, height)
        return side * width // by, side * height // by

    def pixels(self) -> Callable[[Image.Image], np.ndarray[Any, np.dtype[np.uint8]]]:
        """Return open_clip's preprocessing, then the margin: image to (3, S, S) uint8 pixels."""
        inner = replace(self, size=self.size - 2 * self.margin, margin=0)
        config = open_clip.transform.PreprocessCfg(**inner.stored())
        whole = open_clip.transform.image_transform_v2(config, is_train=False)
        # The last two steps are ToTensor and Normalize, which run later and on the device.
        resize, last = whole.transforms[:-2], [type(t).__name__ for t in whole.transforms[-2:]]
        assert last[0].endswith("ToTensor"), last
        assert last[1] == "Normalize", last
        colour = tuple(round(255 * min(max(value, 0.0), 1.0)) for value in self.mean)

        def apply(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
            for step in resize:
                image = step(image)
            image = ImageOps.expand(image, self.margin, colour)
            return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)

        return apply


class LeanAttention(nn.MultiheadAttention):
    """Self-attention without the copies of PyTorch's: heads are views of one projection.

    On a CPU with gradients the weights are formed, for the backward pass of PyTorch's blockwise
    attention takes most of a step there. Whatever is not plain self-attention goes to PyTorch.
    """

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend (B, N, C) to itself; arguments and result are `nn.MultiheadAttention`'s."""
        plain = self.batch_first and self.bias_k is None and not self.add_zero_attn
        masked = options.get("attn_mask") is not None or options.get("key_padding_mask") is not None
        plain = plain and not masked and not options.get("need_weights", True)
        if not plain or query is not key or query is not value or self.training:
            return super().forward(query, key, value, **options)
        batch, tokens, channels = query.shape
        packed = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        split = packed.view(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, channels of a head)
        if q.device.type == "cpu" and torch.is_grad_enabled():
            weights = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            attended = weights.softmax(-1, dtype=q.dtype) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).reshape(batch, tokens, channels)), None


class FrozenEncoder(nn.Module):
    """A CLIP image tower that never learns: no gradients to its weights, always in eval mode.

    Args:
        visual: image tower, (B, 3, S, S) normalised to (B, E).
        preprocess: how images become its input.
        name: open_clip model name, `local-dir:PATH` or `demo`.
        pretrained: open_clip's tag of the weights.
        logit_scale: factor of the cosine, at most 100 as in CLIP.
    """

    def __init__(
        self,
        visual: nn.Module,
        preprocess: Preprocess,
        *,
        name: str,
        pretrained: str,
        logit_scale: float,
    ) -> None:
        super().__init__()
        self.visual = visual.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.name, self.pretrained, self.logit_scale = name, pretrained, logit_scale
        self.sha256 = fingerprint(visual)
        self.precision: Precision = "fp32"

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Keep evaluation mode whatever the surrounding model is put into."""
        return super().train(False) if mode else super().train(mode)

    def prepare_by(self, preprocess: Preprocess) -> None:
        """Take over the preprocessing that a file or a setting asks for.

        Raises:
            ValueError: its images are of another size.
        """
        if preprocess.size != self.preprocess.size:
            raise ValueError(
                f"images of side {preprocess.size} do not fit the encoder {self.name!r}, which "
                f"takes {self.preprocess.size}"
            )
        self.preprocess = preprocess

    def in_precision(self, precision: Precision) -> "FrozenEncoder":
        """Return a copy whose matrix products run in `precision`, as under autocast.

        Weights of linear and convolution layers are cast once, not at every step; LayerNorm,
        softmax and the final normalisation stay in fp32. Attention is `LeanAttention`.
        """
        twin = copy.deepcopy(self)
        twin.precision = precision
        for module in twin.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(DTYPES[precision])
            elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
                module.in_proj_weight.data = module.in_proj_weight.data.to(DTYPES[precision])
                module.in_proj_bias.data = module.in_proj_bias.data.to(DTYPES[precision])
                module.__class__ = LeanAttention
        return twin

    def forward(self, images: Tensor) -> Tensor:
        """Embed normalised images (B, 3, S, S) as fp32 unit rows (B, E)."""
        return F.normalize(self.tower(images), dim=-1)

    def tower(self, images: Tensor) -> Tensor:
        """Return what the image tower gives, as fp32, before it is made a unit row."""
        with (
            torch.autocast(
                images.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"
            ),
            full_fp32(),
        ):
            output: Tensor = self.visual(images)
        return output.float()


def fingerprint(visual: nn.Module) -> str:
    """Hash an image tower: sha256 over its state dict, names sorted, values as fp32 bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(visual.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_templates(templates: Sequence[str]) -> None:
    """Raise ValueError where a template has no `{}` for the class name."""
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"template {template!r} has no {{}} for the class name; add it")


@dataclass(frozen=True)
class TextTower:
    """The text side of a CLIP, needed once to embed the class names."""

    model: Any
    tokenizer: Any

    @torch.no_grad()
    def class_embeddings(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Embed each class as the mean over templates of its text embeddings.

        Args:
            class_names: K raw names; `_` and `-` become spaces and capitals lower case.
            templates: texts with `{}` in the class name's place.

        Returns:
            (K, E) fp32 unit rows.

        """
        rows = []
        for name in class_names:
            readable = name.replace("_", " ").replace("-", " ").lower()
            tokens = self.tokenizer([t.replace("{}", readable) for t in templates])
            rows.append(self.model.encode_text(tokens, normalize=True).float().mean(0))
        return F.normalize(torch.stack(rows), dim=-1)


def load_clip(model: str, pretrained: str = "") -> tuple[FrozenEncoder, TextTower]:
    """Load a CLIP with open_clip, on the CPU in fp32.

    Args:
        model: open_clip name, `local-dir:PATH`, or `demo`.
        pretrained: open_clip tag or path of the weights; empty is random for a built-in name.

    Raises:
        ValueError: open_clip does not know the model, cannot load it, or its images are not
            square.
    """
    source = f"local-dir:{DEMO_MODEL}" if model == "demo" else model
    known = open_clip.list_models()
    if ":" not in source and source not in known:
        raise ValueError(
            f"model {model!r} is unknown to open_clip; use demo, local-dir:PATH or one of "
            f"{', '.join(known[:3])} ... ({len(known)} names: open_clip.list_models())"
        )
    try:
        # Where the weights were trained with QuickGELU, open_clip only warns of another one.
        quick = open_clip.get_pretrained_cfg(source, pretrained).get("quick_gelu", False)
        clip = open_clip.create_model(source, pretrained=pretrained or None, force_quick_gelu=quick)
        tokenizer = open_clip.get_tokenizer(source)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0][:300]
        raise ValueError(
            f"model {model!r} with pretrained {pretrained!r} cannot be loaded: {reason}"
        ) from error
    if getattr(clip.visual, "output_tokens", False):
        # CoCa's tower also returns tokens, for its captions.
        clip.visual.output_tokens = False
    settings = open_clip.get_model_preprocess_cfg(clip)
    height, width = (
        settings["size"] if isinstance(settings["size"], tuple) else (settings["size"],) * 2
    )
    if height != width:
        raise ValueError(f"model {model!r} takes {height}x{width} images; square ones are needed")
    preprocess = Preprocess(
        size=height,
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        interpolation=settings["interpolation"],
        resize_mode=settings["resize_mode"],
    )
    encoder = FrozenEncoder(
        clip.visual,
        preprocess,
        name=model,
        pretrained=pretrained,
        logit_scale=min(clip.logit_scale.exp().item(), 100.0),
    )
    return encoder, TextTower(clip.eval(), tokenizer)


def load_encoder(model: str, pretrained: str = "") -> FrozenEncoder:
    """Load the frozen image tower alone; arguments and errors are `load_clip`'s."""
    return load_clip(model, pretrained)[0]
