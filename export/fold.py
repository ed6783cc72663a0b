"""The deployed graph: argmax mask path, prompt and frozen encoder as one module without a choice.

Two forms give the same outputs:

    folded   the patch embedding E is linear and patches do not overlap, so
             E(x + dilate(m) ⊙ P) = E(x) + Σ_r m_r T_r with a constant table T_r = E(P on region r)
    pixel    x + dilate(m) ⊙ P, then the encoder as it is

With uint8 input the normalisation x = a·u + c is folded too: into the patch embedding, and into
the collapsed generator. The mask path stays in fp32 whatever the encoder's precision.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import (
    AttentionalPooler,
    LayerScale,
    ResidualAttentionBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from adavipro_fast.functional import LAPLACIAN, SOBEL_X, apply_prompt, region_logit
from adavipro_fast.prompt import AdaptivePrompt, AdaViPro


def folding_obstacle(visual: nn.Module) -> str | None:
    """Say what keeps an image tower from the folded form."""
    if not isinstance(visual, VisionTransformer):
        return f"{type(visual).__name__} has no patch embedding to fold the prompt into"
    if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
        return "its pooling attends to tokens, which the folded form does not know"
    blocks = visual.transformer.resblocks
    if not all(type(block) is ResidualAttentionBlock for block in blocks):
        return f"its blocks are {type(blocks[0]).__name__}, which the folded form does not know"
    return None


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
    """A vision transformer from patch tokens (B, N, W) to the pooled embedding (B, E)."""

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
        # What is left of the embedding's accuracy is not rounded away at its last step.
        self.proj = nn.Parameter(visual.proj.detach().float())

    def forward(self, patches: Tensor) -> Tensor:
        """Encode patch tokens (B, N, W)."""
        # An empty row in front, which the class token and its position fill: no dynamic shape.
        x = layer_norm(F.pad(patches, (0, 0, 1, 0)) + self.positions, self.ln_pre)
        for block in self.blocks:
            x = block(x)
        if self.class_token:
            return layer_norm(x[:, 0].float(), self.ln_post) @ self.proj
        x = x[:, 1:].float()
        pooled = layer_norm(x.mean(1), self.ln_post)
        if not self.pool_first:
            pooled = layer_norm(x, self.ln_post).mean(1)
        return pooled @ self.proj


class PatchEmbedding(nn.Module):
    """Images (B, 3, S, S) to patch tokens (B, N, W).

    Args:
        visual: the tower.
        scale: (3,), a of x = a·u + c, folded into the weights.
        shift: (3,), c.
        dtype: of the convolution.
    """

    def __init__(
        self, visual: VisionTransformer, scale: Tensor, shift: Tensor, dtype: torch.dtype
    ) -> None:
        super().__init__()
        weight = visual.conv1.weight.detach().double()
        self.stride = weight.shape[-1]
        scaled = weight * scale.double().view(3, 1, 1)
        self.weight = nn.Parameter(scaled.to(dtype))
        # Of the rounded weights, so that their rounding meets centred pixels, not bytes.
        offset = (shift / scale).double().view(3, 1, 1)
        bias = (self.weight.detach().double() * offset).sum((1, 2, 3))
        if visual.conv1.bias is not None:
            bias += visual.conv1.bias.detach().double()
        # In the convolution, where it is added before the sum is rounded.
        self.bias = nn.Parameter(bias.to(dtype)) if bool(bias.any()) else None

    def forward(self, images: Tensor) -> Tensor:
        """Embed images."""
        images = images.to(self.weight.dtype)
        tokens = F.conv2d(images, self.weight, self.bias, stride=self.stride)
        return tokens.flatten(2).transpose(1, 2)


class TokenTable(nn.Module):
    """What each region's prompt adds to each patch token: Σ_r m_r T_r.

    Only pairs of region and token that overlap are stored: a token touches at most k regions.

    Args:
        visual: the tower.
        template: (3, S, S), P.
        grid: G.
        dtype: of the table.
    """

    index: Tensor

    def __init__(
        self, visual: VisionTransformer, template: Tensor, grid: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        weight = visual.conv1.weight.detach().double()
        patch, side = weight.shape[-1], template.shape[-1]
        region = side // grid
        spans = [
            sorted({pixel // region for pixel in range(i * patch, (i + 1) * patch)})
            for i in range(side // patch)
        ]
        pairs = [[(y, x) for y in rows for x in cols] for rows in spans for cols in spans]
        most = max(map(len, pairs))
        # A token with fewer regions than others names region 0 again, with an empty row.
        index = [[y * grid + x for y, x in p] + [0] * (most - len(p)) for p in pairs]
        table = torch.zeros(most, len(pairs), weight.shape[0], dtype=torch.double)
        regions = torch.arange(side) // region
        for part in range(most):
            chosen = torch.tensor([p[part] if part < len(p) else (-1, -1) for p in pairs])
            pixels = chosen.view(side // patch, side // patch, 2)
            pixels = pixels.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
            own = (pixels[..., 0] == regions[:, None]) & (pixels[..., 1] == regions[None, :])
            tokens = F.conv2d((template.double() * own)[None], weight, stride=patch)
            table[part] = tokens[0].flatten(1).t()
        self.rows = nn.ParameterList(list(table.to(dtype)))
        self.whole = most == 1 and index == [[i] for i in range(grid * grid)]
        self.register_buffer("index", torch.tensor(index).t().contiguous())

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Add the open regions' rows to tokens (B, N, W), given the mask (B, G, G)."""
        flat = mask.flatten(1).to(tokens.dtype)
        for number, rows in enumerate(self.rows):
            chosen = flat if self.whole else flat.index_select(1, self.index[number])
            tokens = tokens + chosen[..., None] * rows
        return tokens


class MaskHead(nn.Module):
    """The collapsed generator on images x = a·u + c: images (B, 3, S, S) to Δ (B, G, G), fp32.

    Linear detectors put a and c into K and a constant map; the others take a's magnitude into K,
    and c matters only where zero padding makes an edge of it.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, prompt: AdaptivePrompt, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        assert prompt.generator is not None
        config = prompt.config
        self.edge, self.replicate = config.edge, config.edge_padding == "replicate"
        self.generator = prompt.generator if config.activation != "none" else None
        linear = config.edge in ("laplacian", "none")
        padded = config.edge != "none" and not self.replicate
        # An offset that makes edges at a zero-padded border is taken off the pixels.
        self.centre = self.generator is not None or (not linear and padded)
        self.register_buffer("offset", (shift / scale).view(3, 1, 1))
        self.register_buffer("scale", (scale if linear else scale.abs()).view(3, 1, 1))
        across = torch.tensor(SOBEL_X)
        kernels = [torch.tensor(LAPLACIAN)] if "laplacian" in config.edge else [across, across.t()]
        self.filters = nn.ParameterList(k.expand(3, 1, 3, 3).contiguous() for k in kernels)
        if self.generator is not None:
            return
        kernel, bias = (part.detach() for part in prompt.generator.collapsed())
        self.kernel = nn.Parameter((kernel * self.scale)[None])
        self.bias = nn.Parameter(bias.view(1))
        self.constant = None
        if linear and bool(shift.any()):
            side = prompt.template.shape[-1]
            shifted = self.edges(shift.view(1, 3, 1, 1).expand(1, 3, side, side))
            self.constant = nn.Parameter(region_logit(shifted, kernel, torch.zeros(())))

    def edges(self, images: Tensor) -> Tensor:
        """Detect edges with convolutions, which inference runtimes do fastest."""
        if self.edge == "none":
            return images
        if self.replicate:
            images = F.pad(images, (1, 1, 1, 1), mode="replicate")
        padding = 0 if self.replicate else 1
        first, *second = (F.conv2d(images, k, padding=padding, groups=3) for k in self.filters)
        if second:
            return torch.sqrt(first * first + second[0] * second[0])
        # |e|, in the form that ONNX Runtime fuses into the convolution.
        return F.leaky_relu(first, -1.0) if self.edge == "laplacian-magnitude" else first

    def forward(self, images: Tensor) -> Tensor:
        """Decide on float32 images (B, 3, S, S)."""
        if self.centre:
            images = images + self.offset
        if self.generator is not None:
            delta: Tensor = self.generator(self.edges(images) * self.scale)
            return delta
        region = self.kernel.shape[-1] - 2
        edges = self.edges(images)
        delta = F.conv2d(edges, self.kernel, self.bias, stride=region, padding=1).squeeze(1)
        return delta if self.constant is None else delta + self.constant


class Deployed(nn.Module):
    """What is exported: images (B, 3, S, S) to logits (B, K), mask (B, G, G), embedding (B, E).

    Args:
        model: trained prompt and encoder; stays as it is.
        folded: the prompt as a token table; else on the pixels.
        dtype: of the encoder's matrix products.
        uint8: images are RGB pixels 0-255; else normalised floats.
        baseline: leave the prompt out; outputs are logits and embedding.
    """

    classes: Tensor

    def __init__(
        self,
        model: AdaViPro,
        *,
        folded: bool = True,
        dtype: torch.dtype = torch.float32,
        uint8: bool = False,
        baseline: bool = False,
    ) -> None:
        super().__init__()
        model = copy.deepcopy(model).cpu().eval()
        visual, prompt = model.encoder.visual, model.prompt
        obstacle = folding_obstacle(visual)
        if folded and obstacle:
            raise ValueError(f"this encoder cannot be folded: {obstacle}; use --graph pixel")
        self.uint8, self.baseline, self.grid = uint8, baseline, prompt.grid
        scale = 1 / (255 * prompt.std) if uint8 else torch.ones(3)
        shift = -prompt.mean / prompt.std if uint8 else torch.zeros(3)
        self.head = None
        if prompt.generator is not None and not baseline:
            self.head = MaskHead(prompt, scale, shift)
        template = prompt.template().detach()
        self.template = None
        self.table = None
        if folded and not baseline:
            self.table = TokenTable(visual, template, prompt.grid, dtype)
        elif not baseline:
            self.template = nn.Parameter(template)
        self.affine = None
        if uint8 and not folded:
            self.affine = nn.Parameter(torch.stack([scale, shift]).view(2, 3, 1, 1))
            scale, shift = torch.ones(3), torch.zeros(3)
        self.patches: nn.Module = nn.Identity()
        self.trunk: nn.Module = Whole(visual, dtype) if obstacle else nn.Identity()
        if obstacle is None:
            self.patches = PatchEmbedding(visual, scale, shift, dtype)
            self.trunk = Trunk(visual, dtype)
        rows = model.class_embeddings * model.encoder.logit_scale
        self.register_buffer("classes", rows.t().contiguous())

    def decide(self, pixels: Tensor) -> Tensor:
        """Decide where the prompt applies: (B, G, G) bool."""
        if self.head is None:
            # True, of the batch's size without a node that computes shapes, which would run on
            # the host and keep a GPU waiting.
            return pixels[:, 0, : self.grid, : self.grid].abs() >= 0
        delta: Tensor = self.head(pixels)
        return delta > 0

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Classify."""
        pixels = image.float() if self.uint8 else image
        mask = self.decide(pixels)
        if self.affine is not None:
            pixels = pixels * self.affine[0] + self.affine[1]
        if self.template is not None:
            pixels = apply_prompt(pixels, self.template, mask.to(pixels.dtype))
        tokens = self.patches(pixels)
        if self.table is not None:
            tokens = self.table(tokens, mask)
        embedding = self.trunk(tokens).float()
        embedding = embedding / embedding.norm(dim=-1, keepdim=True)
        logits = embedding @ self.classes
        return (logits, embedding) if self.baseline else (logits, mask.int(), embedding)


class Whole(nn.Module):
    """Any image tower as it is, in `dtype`, its LayerNorms in fp32."""

    def __init__(self, visual: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.visual, self.dtype = visual.to(dtype), dtype
        for kind, deployed in ((AttentionalPooler, Pooler), (nn.LayerNorm, WideLayerNorm)):
            for name, module in list(visual.named_modules()):
                if isinstance(module, kind):
                    parent, _, attribute = name.rpartition(".")
                    setattr(visual.get_submodule(parent), attribute, deployed(module))

    def forward(self, images: Tensor) -> Tensor:
        """Encode normalised images."""
        embedding: Tensor = self.visual(images.to(self.dtype))
        return embedding


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
        weights = (self.query @ key.transpose(2, 3)).float().softmax(-1).to(value.dtype)
        pooled: Tensor = self.out((weights @ value).transpose(1, 2).flatten(2))
        return pooled


class WideLayerNorm(nn.Module):
    """A LayerNorm of any kind, such as timm's over channels, run in fp32."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm.float()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        wide: Tensor = self.norm(x.float())
        return wide.to(x.dtype)
