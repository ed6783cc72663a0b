"""Settings of the prompt and the head, which are stored in the checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from adavipro_fast.method.functional import Activation, Edge, EdgePadding

Precision = Literal["fp32", "bf16", "fp16"]
TrainPrecision = Literal["auto", "fp32", "bf16", "fp16"]
ExportPrecision = Literal["fp32", "bf16", "fp16", "int8", "fp8"]
QUANTISED = ("int8", "fp8")
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    # The dtype of the layers that are not quantised.
    "int8": torch.float32,
    "fp8": torch.float32,
}
HeadKind = Literal["text", "linear"]
HeadInput = Literal["embedding", "features"]
Input = Literal["float32", "uint8", "any"]
LARGEST_SIDE = 4096
Method = Literal["adavipro", "vp", "zero_shot", "linear_probe", "full_finetune"]
PROMPTED = ("adavipro", "vp")
Kernel = Literal["auto", "fused", "plain"]
# What runs an .onnx file.
Runtime = Literal["auto", "onnxruntime", "openvino"]


@dataclass(frozen=True)
class PromptConfig:
    """Settings of the prompt; stored in the checkpoint."""

    method: Method = "adavipro"
    """adavipro adds the prompt to some regions, vp to all; zero_shot, linear_probe and
    full_finetune have no prompt"""
    prompt_size: int = 30
    """width of the prompt's frame, pixels"""
    region_size: int = 32
    """side of a region, pixels; must divide the image side"""
    embed_dim: int = 64
    """channels between the two convolutions of the mask generator"""
    edge: Edge = "laplacian"
    """edge detector in front of the mask generator"""
    edge_padding: EdgePadding = "zero"
    """padding of the edge detector at the image border"""
    activation: Activation = "none"
    """activation between the two convolutions of the mask generator; relu disables the fast path"""
    gumbel: Literal["hard", "soft"] = "hard"
    """Gumbel-Softmax masks in training: hard (straight-through) or soft (relaxed)"""
    prompt_init: Literal["normal", "zero"] = "normal"
    """initial values of the template: N(0, 1) or 0"""
    generator_init: Literal["random", "avoid-edges"] = "random"
    """initial mask generator: random, or open except where edges are strong"""
    head: HeadKind = "text"
    """text: embeddings of the class names; linear: a trained linear layer"""
    head_input: HeadInput | None = None
    """input of a linear head: the unit embedding, or the features before the projection
    (default: the better one on validation)"""
    margin: int = 0
    """shrink images by this many pixels on each side and leave the border to the prompt"""

    def __post_init__(self) -> None:
        for name in ("prompt_size", "region_size", "embed_dim"):
            if not 1 <= getattr(self, name) <= LARGEST_SIDE:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 to {LARGEST_SIDE}")
        if self.margin and self.method not in PROMPTED:
            raise ValueError(f"--margin needs a prompt, and method {self.method} has none")
        if self.method == "zero_shot" and self.head == "linear":
            raise ValueError("zero_shot does not train a head; use --method linear_probe")
        text = self.head == "text" and self.method != "linear_probe"
        if text and self.head_input == "features":
            raise ValueError(
                "a text head only supports embeddings; use --head linear with --head-input features"
            )

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        """Turn the `mapped` head of older files into the equivalent linear head on features."""
        if values.get("head") != "mapped":
            return dict(values)
        method = values.get("method")
        method = "linear_probe" if method == "zero_shot" else method
        return {**values, "method": method, "head": "linear", "head_input": "features"}

    def stored(self) -> dict[str, Any]:
        """Return the values that files store; the margin is stored with the preprocessing."""
        values = asdict(self)
        del values["margin"]
        if self.head == "text":
            del values["head_input"]
        return values


@dataclass(frozen=True)
class EncoderIdentity:
    """Which frozen encoder a checkpoint belongs to."""

    name: str
    pretrained: str
    sha256: str
    quick_gelu: bool | None = None
    """activation of an open_clip architecture; None if its name or folder defines it, and in
    older files"""

    def stored(self) -> dict[str, Any]:
        """Return the values that files store."""
        values = asdict(self)
        if self.quick_gelu is None:
            del values["quick_gelu"]
        return values
