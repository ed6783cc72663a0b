"""A vision transformer rewritten for deployment; other towers as they are."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import (
    AttentionalPooler,
    LayerScale,
    ResidualAttentionBlock,
    VisionTransformer,
)
from timm.layers.attention_pool import AttentionPoolLatent
from torch import Tensor, nn

from adavipro_fast.method.encoder import FrozenEncoder
from adavipro_fast.method.head import HeadRows
from adavipro_fast.method.model import AdaViPro


def is_plain(visual: nn.Module) -> bool:
    """Tell whether a tower is a vision transformer that `Trunk` computes."""
    return (
        isinstance(visual, VisionTransformer)
        and visual.attn_pool is None
        and visual.pool_type in ("tok", "avg")
        and all(type(block) is ResidualAttentionBlock for block in visual.transformer.resblocks)
    )


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """Normalise in fp32, whatever the dtype that comes in and goes out."""
    if isinstance(norm, nn.Identity):
        return x
    assert isinstance(norm, nn.LayerNorm)
    wide = F.layer_norm(x.float(), norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return wide.to(x.dtype)


class Block(nn.Module):
    """A residual attention block with packed projections.

    Args:
        block: open_clip's.
        dtype: of the matrix products.
        first_only: compute the first token's output alone, all that a class-token tower reads.
    """

    def __init__(self, block: Any, dtype: torch.dtype, *, first_only: bool) -> None:
        super().__init__()
        self.heads, self.first_only = block.attn.num_heads, first_only
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        self.ls_1, self.ls_2 = block.ls_1, block.ls_2
        width = block.attn.embed_dim
        self.qkv = nn.Linear(width, 3 * width, device="meta")
        # The query's share of the weights carries attention's 1 / √width.
        scale = torch.ones(3, width, dtype=torch.double)
        scale[0] = (width / self.heads) ** -0.5
        weight, bias = block.attn.in_proj_weight.detach(), block.attn.in_proj_bias.detach()
        self.qkv.weight = nn.Parameter((weight * scale.view(-1, 1)).to(dtype))
        self.qkv.bias = nn.Parameter((bias * scale.view(-1)).to(dtype))
        self.out, self.mlp = block.attn.out_proj, block.mlp
        for part in (self.out, self.mlp):
            part.to(dtype)
        if isinstance(self.ls_1, LayerScale):
            self.ls_1.to(dtype)
            self.ls_2.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens (B, N, W)."""
        query, key, value = self.qkv(layer_norm(x, self.ln_1)).chunk(3, -1)
        if self.first_only:
            query, x = query[:, :1], x[:, :1]
        mixed = attention(*(split_heads(part, self.heads) for part in (query, key, value)))
        x = x + self.ls_1(self.out(mixed.transpose(1, 2).flatten(2)))
        out: Tensor = x + self.ls_2(self.mlp(layer_norm(x, self.ln_2)))
        return out


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Split (B, N, W) into heads (B, H, N, W / H)."""
    split: Tensor = x.unflatten(2, (heads, -1))
    return split.transpose(1, 2)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend: softmax(q kᵀ) v of (B, H, N, width), the softmax in fp32.

    In half precision it is one node, but for a single query, for which TensorRT has no such kernel.
    """
    if query.dtype != torch.float32 and query.shape[2] > 1:
        return F.scaled_dot_product_attention(query, key, value, scale=1.0)
    scores = query @ key.transpose(2, 3)
    return scores.float().softmax(-1).to(value.dtype) @ value


class Trunk(nn.Module):
    """A vision transformer from patch tokens (B, N, W) to its features (B, F), fp32."""

    def __init__(self, visual: VisionTransformer, dtype: torch.dtype) -> None:
        super().__init__()
        self.class_token = visual.pool_type == "tok"
        self.pool_first = visual.final_ln_after_pool
        self.ln_pre, self.ln_post = visual.ln_pre, visual.ln_post
        positions = visual.positional_embedding.detach().double().clone()
        positions[0] += visual.class_embedding.detach()
        self.positions = nn.Parameter(positions.to(dtype))
        last = len(visual.transformer.resblocks) - 1
        self.blocks = nn.ModuleList(
            Block(block, dtype, first_only=self.class_token and number == last)
            for number, block in enumerate(visual.transformer.resblocks)
        )

    def forward(self, patches: Tensor) -> Tensor:
        """Encode patch tokens (B, N, W)."""
        # An empty row in front, which the class token and its position fill: no dynamic shape.
        x = layer_norm(F.pad(patches, (0, 0, 1, 0)) + self.positions, self.ln_pre)
        for block in self.blocks:
            x = block(x)
        if self.class_token:
            return layer_norm(x[:, 0].float(), self.ln_post)
        x = x[:, 1:].float()
        pooled = layer_norm(x.mean(1), self.ln_post)
        if not self.pool_first:
            pooled = layer_norm(x, self.ln_post).mean(1)
        return pooled


class Projection(nn.Module):
    """From features (B, F) to the embedding (B, E), in fp32."""

    weight: Tensor | None

    def __init__(self, encoder: FrozenEncoder) -> None:
        super().__init__()
        weight = encoder.projection
        self.register_buffer("weight", None if weight is None else weight.detach().float())

    def widths(self, rows: HeadRows) -> tuple[int, int]:
        """Count the numbers of an embedding and of the features that a head's rows go with."""
        if self.weight is None:
            return rows.rows.shape[1], rows.rows.shape[1]
        return self.weight.shape[1], self.weight.shape[0]

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embedding (B, E), unit rows, and the features (B, F), both fp32."""
        features = features.float()
        embedding = features if self.weight is None else features @ self.weight
        return embedding / embedding.norm(dim=-1, keepdim=True), features


class Scores(nn.Module):
    """From features (B, F) to logits (B, K) and embedding (B, E), in fp32.

    What is left of the embedding's accuracy is not rounded away at its last step.
    """

    classes: Tensor
    bias: Tensor | None

    def __init__(self, model: AdaViPro) -> None:
        super().__init__()
        self.project, head = Projection(model.encoder), model.head.folded
        self.on_features = head.reads == "features"
        self.register_buffer("classes", head.rows.t().contiguous())
        self.register_buffer("bias", head.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Score the classes."""
        embedding, features = self.project(features)
        logits = (features if self.on_features else embedding) @ self.classes
        return logits if self.bias is None else logits + self.bias, embedding


class Whole(nn.Module):
    """Any image tower as it is, in `dtype`, its LayerNorms and last projection in fp32."""

    def __init__(self, visual: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.visual, self.dtype = visual.to(dtype), dtype
        if isinstance(visual, VisionTransformer):
            # `Projection` has it.
            visual.proj = None
        replaced: list[tuple[type[nn.Module], Callable[[Any], nn.Module]]] = [
            (AttentionalPooler, Pooler),
            (AttentionPoolLatent, LatentPooler),
            (nn.LayerNorm, WideLayerNorm),
        ]
        for kind, deployed in replaced:
            for name, module in list(visual.named_modules()):
                if isinstance(module, kind):
                    parent, _, attribute = name.rpartition(".")
                    setattr(visual.get_submodule(parent), attribute, deployed(module))

    def forward(self, images: Tensor) -> Tensor:
        """Encode normalised images."""
        features: Tensor = self.visual(images.to(self.dtype))
        return features


class Pooler(nn.Module):
    """open_clip's attentional pooling; its queries are constants, shared by all images."""

    def __init__(self, pooler: AttentionalPooler) -> None:
        super().__init__()
        attn, self.ln_k = pooler.attn, pooler.ln_k
        self.out, self.heads = attn.out_proj, attn.num_heads
        if attn.in_proj_weight is None:
            weights = [attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight]
        else:
            weights = list(attn.in_proj_weight.chunk(3))
        biases = attn.in_proj_bias.chunk(3)
        scale = (attn.embed_dim / self.heads) ** -0.5
        query = F.linear(pooler.ln_q(pooler.query), weights[0], biases[0]) * scale
        self.query = nn.Parameter(split_heads(query[None], self.heads).detach())
        self.weights = nn.ParameterList(weight.detach() for weight in weights[1:])
        self.biases = nn.ParameterList(bias.detach() for bias in biases[1:])

    def forward(self, x: Tensor) -> Tensor:
        """Pool tokens (B, N, W) into (B, queries, W)."""
        x = self.ln_k(x)
        key, value = (
            split_heads(F.linear(x, weight, bias), self.heads)
            for weight, bias in zip(self.weights, self.biases, strict=True)
        )
        pooled: Tensor = self.out(gather(self.query, key, value))
        return pooled


class LatentPooler(nn.Module):
    """timm's attention from latent queries, SigLIP's; they are constants too."""

    def __init__(self, pooler: AttentionPoolLatent) -> None:
        super().__init__()
        self.pooler, self.heads = pooler, pooler.num_heads
        query = split_heads(pooler.q(pooler.latent), self.heads)
        self.query = nn.Parameter((pooler.q_norm(query) * pooler.scale).detach())

    def forward(self, x: Tensor) -> Tensor:
        """Pool tokens (B, N, W) into (B, W)."""
        pooler = self.pooler
        if pooler.pos_embed is not None:
            x = x + pooler.pos_embed
        key, value = (split_heads(part, self.heads) for part in pooler.kv(x).chunk(2, -1))
        pooled: Tensor = pooler.proj(gather(self.query, pooler.k_norm(key), value))
        if pooler.mlp is not None:
            pooled = pooled + pooler.mlp(pooler.norm(pooled))
        return pooled.mean(1) if pooler.pool == "avg" else pooled[:, 0]


def gather(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend from queries (1, H, Q, width) that all images share: (B, Q, H · width)."""
    weights = (query @ key.transpose(2, 3)).float().softmax(-1).to(value.dtype)
    return (weights @ value).transpose(1, 2).flatten(2)


class WideLayerNorm(nn.Module):
    """A LayerNorm of any kind, such as timm's over channels, run in fp32."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm.float()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        wide: Tensor = self.norm(x.float())
        return wide.to(x.dtype)
