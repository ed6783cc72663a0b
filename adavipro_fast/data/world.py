"""The embedded demo's world: procedural photos of one speckled shape on a smooth coloured ground.

In the world that the demo's small CLIP was trained on, colour and shape went together in most
photos; in the downstream task the ground's colour says nothing (see `demo`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IMAGE_SIZE = 224


@dataclass(frozen=True)
class World:
    """How the procedural photos are drawn."""

    habit: float
    """share of photos whose ground has the colour that goes with the shape"""
    hues: tuple[float, float]
    """range of the other grounds' hues, radians"""
    saturation: float
    """of the ground's colour, 0-1"""
    sizes: tuple[float, float]
    """least and largest radius of the shape, in image sides"""


PRETRAINING = World(habit=0.8, hues=(0.0, 2 * math.pi), saturation=0.65, sizes=(0.18, 0.36))
DOWNSTREAM = World(habit=0.0, hues=(2.2, 2.6), saturation=1.0, sizes=(0.18, 0.36))


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(0.5 - y, 0.5 * (0.9 + y) - x.abs() * 0.9)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    return 0.75 - torch.hypot(x * 0.95, -y * 1.1 + 0.25 - 0.75 * x.abs())


# Signed membership, > 0 inside, of shapes about as large as the unit circle.
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda x, y: 0.85 - torch.hypot(x, y),
    "cross": lambda x, y: torch.minimum(
        0.9 - torch.maximum(x.abs(), y.abs()), 0.28 - torch.minimum(x.abs(), y.abs())
    ),
    "crescent": lambda x, y: torch.minimum(
        0.9 - torch.hypot(x, y), torch.hypot(x - 0.45, y) - 0.72
    ),
    "heart": _heart,
    "ring": lambda x, y: torch.minimum(0.9 - torch.hypot(x, y), torch.hypot(x, y) - 0.52),
    "square": lambda x, y: 0.72 - torch.maximum(x.abs(), y.abs()),
    "star": lambda x, y: 0.48 + 0.40 * torch.cos(5 * torch.atan2(y, x)) - torch.hypot(x, y),
    "triangle": _triangle,
}
CLASS_NAMES = tuple(SHAPES)


def _membership(x: Tensor, y: Tensor) -> Tensor:
    """Evaluate shape i mod 8 for image i: coordinates (N, S, S) to membership (N, S, S)."""
    membership = torch.empty_like(x)
    for kind, shape in enumerate(SHAPES.values()):
        every = slice(kind, None, len(SHAPES))
        membership[every] = shape(x[every], y[every])
    return membership


def _hue(angle: Tensor) -> Tensor:
    """Turn hue angles (N,) into saturated RGB (N, 3) in 0-1."""
    phases = torch.tensor([0.0, 2.0, 4.0]) * math.pi / 3
    return 0.5 + 0.5 * torch.cos(angle[:, None] - phases)


def render(count: int, world: World, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw photos.

    Args:
        count: N.
        world: habit of the colours.
        generator: source of all randomness.

    Returns:
        images (N, 3, 224, 224) uint8 RGB and labels (N,).
    """

    def draw(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    labels = torch.arange(count) % len(CLASS_NAMES)
    habitual = draw() < world.habit
    own = labels * (2 * math.pi / len(CLASS_NAMES)) + draw(low=-0.2, high=0.2)
    hue = torch.where(habitual, own, draw(low=world.hues[0], high=world.hues[1]))

    axis = (torch.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE
    column, row = axis.view(1, 1, -1), axis.view(1, -1, 1)
    smallest, largest = world.sizes
    size = draw(1, 1, low=smallest, high=largest)
    cx = size + draw(1, 1) * (1 - 2 * size)
    cy = size + draw(1, 1) * (1 - 2 * size)
    turn = draw(1, 1, low=-0.3, high=0.3)
    u, v = (column - cx) / size, (row - cy) / size
    x, y = u * turn.cos() + v * turn.sin(), v * turn.cos() - u * turn.sin()
    inside = (_membership(x, y) * size * IMAGE_SIZE + 0.5).clamp(0, 1)[:, None]

    # A smooth ground: one hue, gently shaded.
    slope = draw(2, 1, 1, low=-0.15, high=0.15)
    shade = (
        draw(1, 1, low=0.55, high=0.8) + slope[:, 0] * (column - 0.5) + slope[:, 1] * (row - 0.5)
    )
    colour = 1 - world.saturation * (1 - _hue(hue))
    ground = shade[:, None] * colour[:, :, None, None]

    # The shape is dark and speckled: strong edges and no hue.
    speckle = torch.randn(count, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    figure = draw(1, 1, 1, low=0.1, high=0.25) + 0.12 * speckle
    noise = 0.01 * torch.randn(count, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    images = ground + inside * (figure - ground) + noise
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


# 16 training images a class, as users have; test images for a standard error of 1.6 points.
BATCH = 64
SPLITS = {"train": 128, "val": 320, "test": 960}


def task(split: str) -> tuple[Tensor, Tensor]:
    """Draw one split of the downstream task: images (N, 3, 224, 224) uint8 and labels (N,)."""
    generator = torch.Generator().manual_seed(1 + list(SPLITS).index(split))
    # In batches: one whole split would spend most of the time on fresh memory.
    parts = [render(BATCH, DOWNSTREAM, generator) for _ in range(SPLITS[split] // BATCH)]
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)
