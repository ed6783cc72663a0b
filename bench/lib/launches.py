"""Launch the two fused kernels alone, on preallocated tensors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adavipro_fast.kernels import adaptive_prompt as kernels

MEAN, STD = (0.5,) * 3, (0.25,) * 3


@dataclass(frozen=True)
class Shape:
    """Shape of a launch: uint8 pixels in, images of `dtype` out."""

    batch: int
    region: int = 32
    dtype: torch.dtype = torch.bfloat16
    side: int = 224


def partial_sum_bytes(side: int, region: int, batch: int, images: int) -> int:
    """Count the bytes of backward's partial sums of template and K, one of each per program."""
    kernel = 3 * (region + 2) ** 2 * (side // region) ** 2
    return 4 * -(-batch // images) * (3 * side**2 + kernel)


def moved_bytes(part: str, shape: Shape, images: int) -> int:
    """Count a kernel's bytes: pixels, images or their gradient, and partial sums, once each."""
    pixels = shape.batch * 3 * shape.side**2
    moved = pixels * (1 + shape.dtype.itemsize)
    if part == "backward":
        moved += partial_sum_bytes(shape.side, shape.region, shape.batch, images)
    return moved


class Launches:
    """Launches forward and backward without allocation or autograd.

    Args:
        shape: of the launches.
        device: of the tensors.
        sets: number of sets of tensors used in turn, so that the next one is not in L2.
        options: launch options that replace those of `launch_options`.
    """

    def __init__(self, shape: Shape, device: torch.device, *, sets: int, **options: Any) -> None:
        self.shape, self.sets = shape, sets
        batch, region, side, grid = (
            shape.batch,
            shape.region,
            shape.side,
            shape.side // shape.region,
        )
        images = (batch, 3, side, side)

        def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        self.pixels = [
            torch.randint(0, 256, images, dtype=torch.uint8, device=device) for _ in range(sets)
        ]
        self.prompted = [empty(*images, dtype=shape.dtype) for _ in range(sets)]
        self.grads = [torch.randn(images, device=device).to(shape.dtype) for _ in range(sets)]
        self.delta, self.mask = empty(batch, grid, grid), empty(batch, grid, grid)
        self.template = torch.randn(3, side, side, device=device)
        self.kernel = torch.randn(3, region + 2, region + 2, device=device) / region
        self.bias = torch.zeros((), device=device)
        chosen = {"REPLICATE": True, "MAGNITUDE": True, "MODE": "hard", "GIVEN": False}
        self.constants = kernels._constants(self.pixels[0], self.kernel, **chosen) | options
        self.constants["EVEN"] = batch % self.constants["IMAGES"] == 0
        blocks = -(-batch // self.constants["IMAGES"])
        self.grid = (grid * grid, blocks)
        self.template_grad = empty(blocks, 3, side, side)
        self.kernel_grad = empty(blocks * grid * grid, 3, region + 2, region + 2)
        self.bias_grad = empty(blocks * grid * grid)
        affine = kernels._affine(self.pixels[0], list(MEAN), list(STD))
        self.scalars = (batch, 1.0, 3, 0, *affine)

    def forward(self, call: int) -> None:
        """Launch forward on the tensors of a call."""
        at = call % self.sets
        kernels._forward[self.grid](
            *(self.pixels[at], self.template, self.kernel, self.bias, self.delta),
            *(self.prompted[at], self.delta, self.mask, *self.scalars),
            **self.constants,
        )

    def backward(self, call: int) -> None:
        """Launch backward on the tensors of a call."""
        at = call % self.sets
        kernels._backward[self.grid](
            *(self.pixels[at], self.template, self.delta, self.delta, self.grads[at]),
            *(self.template_grad, self.kernel_grad, self.bias_grad, *self.scalars),
            **self.constants,
        )

    def moved_bytes(self, part: str) -> int:
        """Count a kernel's bytes."""
        return moved_bytes(part, self.shape, self.constants["IMAGES"])
