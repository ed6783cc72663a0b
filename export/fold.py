"""The prompt of one task in a deployed graph: the mask, and two equivalent forms of the prompt.

    folded   the patch embedding E is linear and patches do not overlap, so
             E(x + dilate(m) ⊙ P) = E(x) + Σ_r m_r T_r with a constant table T_r = E(P on region r)
    pixel    x + dilate(m) ⊙ P, then the unchanged encoder

With uint8 input the normalisation x = a·u + c is folded too: into the patch embedding, and into
the collapsed generator. The mask is computed in fp32 in any precision of the encoder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adavipro_fast.export.patches import foldable
from adavipro_fast.method.functional import (
    LAPLACIAN,
    SOBEL_X,
    Edge,
    apply_prompt,
    region_logit,
)
from adavipro_fast.method.model import AdaViPro
from adavipro_fast.method.prompt import AdaptivePrompt

# The convolutions of each edge detector that can be exported.
FILTERS: dict[Edge, tuple[tuple[tuple[float, ...], ...], ...]] = {
    "laplacian": (LAPLACIAN,),
    "laplacian-magnitude": (LAPLACIAN,),
    "sobel": (SOBEL_X, tuple(zip(*SOBEL_X, strict=True))),
    "none": (),
}


class TokenTable(nn.Module):
    """Adds the prompts of open regions to the patch tokens: Σ_r m_r T_r.

    Only overlapping pairs of region and token are stored: a token overlaps at most k regions.

    Args:
        model: its prompt and its tower's patch embedding are folded.
        dtype: of the table.
    """

    index: Tensor

    def __init__(self, model: AdaViPro, dtype: torch.dtype) -> None:
        super().__init__()
        template, grid = template_of(model), model.prompt.grid
        weight = foldable(model.encoder.visual).weight.detach().double()
        patch, side = weight.shape[-1], template.shape[-1]
        region = side // grid
        spans = [
            sorted({pixel // region for pixel in range(i * patch, (i + 1) * patch)})
            for i in range(side // patch)
        ]
        pairs = [[(y, x) for y in rows for x in cols] for rows in spans for cols in spans]
        most = max(map(len, pairs))
        # Tokens with fewer than k regions are padded with region 0 and a row of zeros.
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
        self.one_to_one = most == 1 and index == [[i] for i in range(grid * grid)]
        self.register_buffer("index", torch.tensor(index).t().contiguous())

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Add the open regions' rows to tokens (B, N, W), given the mask (B, G, G)."""
        flat = mask.flatten(1).to(tokens.dtype)
        for number, rows in enumerate(self.rows):
            chosen = flat if self.one_to_one else flat.index_select(1, self.index[number])
            tokens = tokens + chosen[..., None] * rows
        return tokens


class MaskHead(nn.Module):
    """The collapsed generator for images x = a·u + c: images u (B, 3, S, S) to Δ > 0 (B, G, G).

    Computes in fp32. For linear edge detectors, a is folded into K and c into a constant map. For
    the others, |a| is folded into K, and c matters only at a zero-padded border, where it would
    appear as an edge.
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
        # Shift the pixels by c / a if zero padding would make edges of it.
        self.centre = bool(shift.any()) and (self.generator is not None or (not linear and padded))
        self.register_buffer("offset", (shift / scale).view(3, 1, 1))
        self.register_buffer("scale", (scale if linear else scale.abs()).view(3, 1, 1))
        kernels = [torch.tensor(values) for values in FILTERS[config.edge]]
        self.filters = nn.ParameterList(k.expand(3, 1, 3, 3).contiguous() for k in kernels)
        if self.generator is not None:
            return
        kernel, bias = (part.detach() for part in prompt.generator.collapsed())
        # With a batch dimension, as conv2d needs it, so that the graph has no Reshape node.
        self.kernel = nn.Parameter((kernel * self.scale)[None])
        self.bias = nn.Parameter(bias.view(1))
        self.constant = None
        if linear and bool(shift.any()):
            side = prompt.grid * config.region_size
            shifted = self.edges(shift.view(1, 3, 1, 1).expand(1, 3, side, side))
            self.constant = nn.Parameter(region_logit(shifted, kernel, torch.zeros(())))

    def edges(self, images: Tensor) -> Tensor:
        """Detect edges with convolutions, the fastest way in inference runtimes."""
        if self.edge == "none":
            return images
        if self.replicate:
            images = F.pad(images, (1, 1, 1, 1), mode="replicate")
        padding = 0 if self.replicate else 1
        first, *second = (F.conv2d(images, k, padding=padding, groups=3) for k in self.filters)
        if second:
            return torch.sqrt(first * first + second[0] * second[0])
        # |e| as LeakyReLU, which ONNX Runtime fuses into the convolution.
        return F.leaky_relu(first, -1.0) if self.edge == "laplacian-magnitude" else first

    def edge_map(self, images: Tensor) -> Tensor:
        """Detect the edges of float32 images u (B, 3, S, S), without the factor |a|."""
        return self.edges(images + self.offset if self.centre else images)

    def delta(self, images: Tensor) -> Tensor:
        """Compute Δ (B, T, G, G) of float32 images (B, 3, S, S), where T is the kernels' number."""
        edges = self.edge_map(images)
        if self.generator is not None:
            uncollapsed: Tensor = self.generator(edges * self.scale)
            return uncollapsed[:, None]
        region = self.kernel.shape[-1] - 2
        delta = F.conv2d(edges, self.kernel, self.bias, stride=region, padding=1)
        return delta if self.constant is None else delta + self.constant

    def forward(self, images: Tensor) -> Tensor:
        """Decide for float32 images (B, 3, S, S)."""
        return self.delta(images).squeeze(1) > 0


def template_of(model: AdaViPro) -> Tensor:
    """Return the template (3, S, S); zeros without a prompt."""
    side, template = model.preprocess.size, model.prompt.template
    return torch.zeros(3, side, side) if template is None else template().detach()


def constant_delta(model: AdaViPro) -> float:
    """Return the Δ of a model without a generator: 1 opens all regions, -1 (no prompt) none."""
    return -1.0 if model.prompt.template is None else 1.0


class Always(nn.Module):
    """A mask that is open everywhere: images (B, 3, S, S) to (B, G, G) bool."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, images: Tensor) -> Tensor:
        """Return an all-true mask."""
        # Always true. Computed from the input so that the batch size needs no Shape node, which
        # would run on the host and stall a GPU.
        return images[:, 0, : self.grid, : self.grid].abs() >= 0


class Affine(nn.Module):
    """Normalisation: pixels u to x = a·u + c."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.stack([scale, shift]).view(2, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images (B, 3, S, S)."""
        return images * self.values[0] + self.values[1]


class PixelPrompt(nn.Module):
    """Adds the prompt to the pixels.

    Args:
        template: (3, S, S), P.
    """

    def __init__(self, template: Tensor) -> None:
        super().__init__()
        self.template = nn.Parameter(template)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Add the prompt to normalised images (B, 3, S, S), given the mask (B, G, G)."""
        return apply_prompt(images, self.template, mask.to(images.dtype))
