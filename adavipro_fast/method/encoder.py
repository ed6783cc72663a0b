"""The frozen image tower, with its precision and the hash of its weights."""

import copy
import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from adavipro_fast.device import full_fp32
from adavipro_fast.method.config import DTYPES, Precision
from adavipro_fast.method.preprocess import Preprocess


class LeanAttention(nn.Module):
    """Self-attention without the copies that PyTorch makes: heads are views of one projection.

    On a CPU with gradients, the attention weights are materialised, because the backward pass of
    PyTorch's blockwise attention would take most of a training step.

    Args:
        attention: the module to replace; its weights are shared.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.embed_dim = attention.embed_dim
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = attention.out_proj

    def forward(self, query: Tensor, *_: Tensor, **__: Any) -> tuple[Tensor, None]:
        """Self-attention over (B, N, C); the block's other arguments repeat it and are ignored."""
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
    """A CLIP image tower that is never trained or changed in place.

    Its weights get no gradients and it stays in evaluation mode; `with_` returns a modified twin.

    Args:
        visual: image tower, (B, 3, S, S) normalised to (B, E).
        preprocess: turns images into its input.
        name: open_clip model name, `local-dir:PATH` or `demo`.
        pretrained: open_clip's tag of the weights.
        logit_scale: factor of the cosine, at most 100 as in CLIP.
        logit_bias: added to the logits if the encoder was trained with a sigmoid, like SigLIP.
        sha256: hash of its weights, if known.
        quick_gelu: see `EncoderIdentity`.
    """

    def __init__(
        self,
        visual: nn.Module,
        preprocess: Preprocess,
        *,
        name: str,
        pretrained: str,
        logit_scale: float,
        logit_bias: float | None = None,
        sha256: str | None = None,
        quick_gelu: bool | None = None,
    ) -> None:
        super().__init__()
        self.visual = visual.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.name, self.pretrained = name, pretrained
        self.logit_scale, self.logit_bias = logit_scale, logit_bias
        self.sha256 = sha256 or fingerprint(visual)
        self.precision: Precision = "fp32"
        self.quick_gelu = quick_gelu

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Stay in evaluation mode, whatever the mode of the surrounding model."""
        return super().train(False)

    @property
    def projection(self) -> Tensor | None:
        """The last projection (F, E) of a vision transformer; None for other towers."""
        return self.visual.proj if isinstance(self.visual, VisionTransformer) else None

    def with_(
        self,
        *,
        preprocess: Preprocess | None = None,
        precision: Precision | None = None,
        lean: bool = True,
    ) -> "FrozenEncoder":
        """Return a twin; it shares the weights unless a precision is given.

        Args:
            preprocess: replaces the preprocessing.
            precision: precision of matrix products, as under autocast. Weights of linear and
                convolution layers are cast once, not at every step; LayerNorm, softmax and the
                final normalisation stay in fp32.
            lean: if a precision is given, replace PyTorch's attention with `LeanAttention`.

        Raises:
            ValueError: the image size differs from the tower's.
        """
        if preprocess is not None and preprocess.size != self.preprocess.size:
            raise ValueError(
                f"images of side {preprocess.size} do not fit the encoder {self.name!r}, which "
                f"needs {self.preprocess.size}"
            )
        twin = FrozenEncoder(
            self.visual if precision is None else copy.deepcopy(self.visual),
            preprocess or self.preprocess,
            name=self.name,
            pretrained=self.pretrained,
            logit_scale=self.logit_scale,
            logit_bias=self.logit_bias,
            sha256=self.sha256,
            quick_gelu=self.quick_gelu,
        )
        twin.precision = precision or self.precision
        if precision is not None:
            _cast(twin.visual, DTYPES[precision], lean)
        return twin

    def thawed(self, precision: Precision = "fp32") -> "FrozenEncoder":
        """Return a trainable fp32 copy; autocast runs its matrix products in `precision`."""
        twin = copy.deepcopy(self)
        twin.precision = precision
        for parameter in twin.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return twin

    def forward(self, images: Tensor) -> Tensor:
        """Embed normalised images (B, 3, S, S) as fp32 unit rows (B, E)."""
        return self.embed(images)[0]

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return fp32 unit rows (B, E), and the features (B, F) before the projection."""
        with (
            torch.autocast(
                images.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"
            ),
            full_fp32(),
        ):
            features, projection = self._features(images), self.projection
            projected = features if projection is None else features @ projection
        return F.normalize(projected.float(), dim=-1), features.float()

    def _features(self, images: Tensor) -> Tensor:
        visual = self.visual
        if not isinstance(visual, VisionTransformer):
            output: Tensor = visual(images)
            return output
        pooled: Tensor = visual._pool(visual.transformer(visual._embeds(images)))[0]
        return pooled


def fingerprint(visual: nn.Module) -> str:
    """Hash an image tower: sha256 over its state dict, sorted by name, values as fp32 bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(visual.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _cast(visual: nn.Module, dtype: torch.dtype, lean: bool) -> None:
    """Cast the weights of matrix products; use lean attention in plain residual blocks."""
    for module in visual.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            module.in_proj_weight.data = module.in_proj_weight.data.to(dtype)
            module.in_proj_bias.data = module.in_proj_bias.data.to(dtype)
    for block in visual.modules():
        if lean and type(block) is ResidualAttentionBlock:
            attention = block.attn
            assert isinstance(attention, nn.MultiheadAttention)
            block.attn = LeanAttention(attention)
