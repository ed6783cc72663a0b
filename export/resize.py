"""Images of any size in the graph: Pillow's antialiased resize as two matrix products.

Pillow resizes the width, rounds to bytes, then resizes the height. The graph computes the weights
of both passes from the image's height and width, only for pixels inside the centre crop.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adavipro_fast.method.preprocess import Preprocess

# Pillow's filters and their radius, in pixels of the coarser image.
REACH = {"bicubic": 2.0, "bilinear": 1.0}
# Scale of Pillow's fixed-point weights.
PRECISION = 2.0**22
LARGEST_SIDE = 16384
# Height and width of the traced example, different from any size in the model.
EXAMPLE = (37, 53)


def any_size_obstacle(preprocess: Preprocess) -> str | None:
    """Return why the graph cannot do a preprocessing; None if it can."""
    if preprocess.interpolation not in REACH:
        return f"interpolation {preprocess.interpolation!r} is not {' or '.join(REACH)}"
    if preprocess.resize_mode == "longest":
        return "resize mode 'longest' pads images, which the graph does not support"
    return None


class Resize(nn.Module):
    """Images (B, 3, H, W) uint8 to the encoder's pixels (B, 3, S, S), integers in fp32.

    Args:
        preprocess: the encoder's; `any_size_obstacle` must return None for it.
    """

    outputs_at: Tensor
    colour: Tensor

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        self.preprocess, self.margin = preprocess, preprocess.margin
        self.side, self.shorter = preprocess.inner, preprocess.shorter
        self.squash = preprocess.resize_mode == "squash"
        self.interpolation, self.reach = preprocess.interpolation, REACH[preprocess.interpolation]
        self.register_buffer("outputs_at", torch.arange(self.side))
        self.register_buffer("colour", preprocess.colour.float().view(3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Resize, crop and add the margin."""
        height, width = image.shape[2:]
        by = torch.sym_min(height, width)
        across = self.weights(width, self.side if self.squash else self.shorter * width // by)
        down = self.weights(height, self.side if self.squash else self.shorter * height // by)
        columns = to_bytes(image.float() @ across.t())
        pixels = to_bytes(down @ columns)
        if not self.margin:
            return pixels
        return F.pad(pixels - self.colour, (self.margin,) * 4) + self.colour

    def weights(self, size: Any, resized: Any) -> Tensor:
        """Return the matrix (side, size) that resizes and crops a line of pixels.

        Args:
            size: pixels of the line.
            resized: pixels after resizing and before the crop.
        """
        begin, _ = self.preprocess.cropped(resized)
        scale = size / resized
        stretch = torch.sym_max(scale, 1.0)
        centres = (self.outputs_at.double() + begin + 0.5) * scale
        away = (torch.arange(size) + 0.5 - centres[:, None]).abs() / stretch
        weights = self.filtered(away) * (away < self.reach)
        weights = weights / weights.sum(1, keepdim=True)
        rounded: Tensor = (weights * PRECISION).round().float() / PRECISION
        return rounded

    def filtered(self, x: Tensor) -> Tensor:
        """Evaluate the filter at distances x ≥ 0 inside its reach (Keys, 1981, with a = -1/2)."""
        if self.interpolation == "bilinear":
            return 1 - x
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        return torch.where(x < 1, near, far)


def to_bytes(values: Tensor) -> Tensor:
    """Round to integers from 0 to 255, halves up."""
    rounded: Tensor = (values + 0.5).floor().clamp(0, 255)
    return rounded
