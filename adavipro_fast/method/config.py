"""What a prompt is made of: the settings that travel in the checkpoint."""

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
    # What is not quantised stays in it.
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


@dataclass(frozen=True)
class PromptConfig:
    """What the prompt is made of; travels in the checkpoint."""

    method: Method = "adavipro"
    """adavipro decides per region where the prompt applies; vp applies it everywhere; the others
    have no prompt: zero_shot, linear_probe, full_finetune"""
    prompt_size: int = 30
    """width of each side of the frame, pixels"""
    region_size: int = 32
    """side of the square decision unit, pixels; divides the image side"""
    embed_dim: int = 64
    """channels between convergence and policy module"""
    edge: Edge = "laplacian"
    """edge detector in front of the mask generator"""
    edge_padding: EdgePadding = "zero"
    """what the edge detector sees outside the image"""
    activation: Activation = "none"
    """between convergence and policy module; relu gives up the collapsed fast path"""
    gumbel: Literal["hard", "soft"] = "hard"
    """training masks: hard is straight-through, soft is relaxed"""
    prompt_init: Literal["normal", "zero"] = "normal"
    """first values of the template: N(0, 1) or 0"""
    generator_init: Literal["random", "avoid-edges"] = "random"
    """first values of the mask generator: torch's default, or open where edges are weak"""
    head: HeadKind = "text"
    """what scores the classes: embeddings of their names, or a learned linear layer"""
    head_input: HeadInput | None = None
    """what a linear head reads: unit embeddings, or the features before the projection (default:
    what validation says)"""
    margin: int = 0
    """shrink images by this many pixels on each side; the prompt has the margin for itself"""

    def __post_init__(self) -> None:
        for name in ("prompt_size", "region_size", "embed_dim"):
            if not 1 <= getattr(self, name) <= LARGEST_SIDE:
                raise ValueError(f"{name} is {getattr(self, name)}; 1 to {LARGEST_SIDE} works")
        if self.margin and self.method not in PROMPTED:
            raise ValueError(f"{self.method} has no prompt to leave a --margin for")
        if self.method == "zero_shot" and self.head == "linear":
            raise ValueError("zero_shot learns no head; use --method linear_probe for one alone")
        text = self.head == "text" and self.method != "linear_probe"
        if text and self.head_input == "features":
            raise ValueError("a text head reads embeddings; use --head linear with --head-input")

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        """Turn a mapped head of older versions, rows that read features, into a linear one."""
        if values.get("head") != "mapped":
            return dict(values)
        method = values.get("method")
        method = "linear_probe" if method == "zero_shot" else method
        return {**values, "method": method, "head": "linear", "head_input": "features"}

    def stored(self) -> dict[str, Any]:
        """Return what files keep; they keep the margin with the preprocessing."""
        values = asdict(self)
        del values["margin"]
        if self.head == "text":
            del values["head_input"]
        return values
