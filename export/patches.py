"""The patch embedding of a vision transformer: where a prompt can be folded into the tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers.format import Format
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn


def patch_convolution(visual: nn.Module) -> nn.Conv2d | None:
    """Return the convolution that makes tokens of patches: open_clip's or timm's, if there is one.

    Args:
        visual: an image tower.
    """
    holder = timm_patches(visual)
    convolution: nn.Conv2d | None = None if holder is None else holder.proj
    return visual.conv1 if isinstance(visual, VisionTransformer) else convolution


def timm_patches(visual: nn.Module) -> PatchEmbed | None:
    """Return timm's patch embedding; a class made of it may do more, and is none."""
    holder: Any = getattr(trunk_of(visual), "patch_embed", None)
    return holder if type(holder) is PatchEmbed else None


def folding_obstacle(visual: nn.Module) -> str | None:
    """Say what keeps an image tower from the folded form."""
    convolution = patch_convolution(visual)
    if convolution is None:
        return f"{type(trunk_of(visual)).__name__} has no patch embedding to fold the prompt into"
    if convolution.kernel_size != convolution.stride or convolution.padding != (0, 0):
        return "its patches overlap or are padded"
    return None


def foldable(visual: nn.Module) -> nn.Conv2d:
    """Return the convolution that a prompt is folded through.

    Raises:
        ValueError: the tower has none.
    """
    if obstacle := folding_obstacle(visual):
        raise ValueError(
            f"the prompt cannot be folded into this encoder: {obstacle}; use --graph pixel"
        )
    convolution = patch_convolution(visual)
    assert convolution is not None
    return convolution


def trunk_of(visual: nn.Module) -> nn.Module:
    """Return the tower itself, out of open_clip's wrapper of timm's."""
    return visual.trunk if isinstance(visual, TimmModel) else visual


def take_tokens(visual: nn.Module) -> None:
    """Change a tower that can be folded in place: it takes patch tokens (B, N, W) for images."""
    if isinstance(visual, VisionTransformer):
        visual.conv1 = Plane()
    elif (holder := timm_patches(visual)) is not None:
        trunk_of(visual).patch_embed = Embedded(holder)


class Plane(nn.Module):
    """Tokens (B, N, W) as a convolution gives them, (B, W, N, 1)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Turn."""
        return tokens.transpose(1, 2)[..., None]


class Embedded(nn.Module):
    """What timm's patch embedding does behind its convolution.

    Args:
        patches: whose form and norm it takes over.
    """

    def __init__(self, patches: PatchEmbed) -> None:
        super().__init__()
        self.norm, self.flatten, self.output_fmt = patches.norm, patches.flatten, patches.output_fmt
        # Which some trunks ask for.
        self.grid_size, self.patch_size = patches.grid_size, patches.patch_size

    def forward(self, tokens: Tensor) -> Tensor:
        """Shape and normalise tokens (B, N, W)."""
        if not self.flatten:
            tokens = tokens.unflatten(1, self.grid_size)
            if self.output_fmt == Format.NCHW:
                tokens = tokens.permute(0, 3, 1, 2)
        normalised: Tensor = self.norm(tokens)
        return normalised


class PatchEmbedding(nn.Module):
    """Images (B, 3, S, S) to patch tokens (B, N, W).

    Args:
        convolution: the tower's.
        scale: (3,), a of x = a·u + c, folded into the weights.
        shift: (3,), c.
        dtype: of the convolution.
    """

    def __init__(
        self, convolution: nn.Conv2d, scale: Tensor, shift: Tensor, dtype: torch.dtype
    ) -> None:
        super().__init__()
        weight = convolution.weight.detach().double()
        self.stride = convolution.stride
        scaled = weight * scale.double().view(3, 1, 1)
        self.weight = nn.Parameter(scaled.to(dtype))
        # Of the rounded weights, so that their rounding meets centred pixels, not bytes.
        offset = (shift / scale).double().view(3, 1, 1)
        bias = (self.weight.detach().double() * offset).sum((1, 2, 3))
        if convolution.bias is not None:
            bias += convolution.bias.detach().double()
        # In the convolution, where it is added before the sum is rounded.
        self.bias = nn.Parameter(bias.to(dtype)) if bool(bias.any()) else None

    def forward(self, images: Tensor) -> Tensor:
        """Embed images."""
        images = images.to(self.weight.dtype)
        tokens = F.conv2d(images, self.weight, self.bias, stride=self.stride)
        return tokens.flatten(2).transpose(1, 2)
