"""The demo's images: procedural photos of a speckled shape on a smooth coloured background.

In the images that the demo's small CLIP was trained on, background colour and shape are correlated
in most photos; in the downstream task the background's colour is uninformative (see `demo`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IMAGE_SIZE = 224


@dataclass(frozen=True)
class World:
    """Parameters of the procedural photos."""

    habit: float
    """share of photos whose background has the colour associated with the shape"""
    hues: tuple[float, float]
    """range of the other backgrounds' hues, radians"""
    saturation: float
    """saturation of the background's colour, 0-1"""
    sizes: tuple[float, float]
    """smallest and largest radius of the shape, as a share of the image side"""


PRETRAINING = World(habit=0.8, hues=(0.0, 2 * math.pi), saturation=0.65, sizes=(0.18, 0.36))
DOWNSTREAM = World(habit=0.0, hues=(2.2, 2.6), saturation=1.0, sizes=(0.18, 0.36))


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(0.5 - y, 0.5 * (0.9 + y) - x.abs() * 0.9)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    return 0.75 - torch.hypot(x * 0.95, -y * 1.1 + 0.25 - 0.75 * x.abs())


# Signed membership functions, > 0 inside, of shapes about as large as the unit circle.
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
    """Evaluate shape i mod 8 for image i: (N, S, S) coordinates to (N, S, S) membership."""
    membership = torch.empty_like(x)
    for kind, shape in enumerate(SHAPES.values()):
        every = slice(kind, None, len(SHAPES))
        membership[every] = shape(x[every], y[every])
    return membership


def _hue(angle: Tensor) -> Tensor:
    """Convert hue angles (N,) to saturated RGB (N, 3) in 0-1."""
    phases = torch.tensor([0.0, 2.0, 4.0]) * math.pi / 3
    return 0.5 + 0.5 * torch.cos(angle[:, None] - phases)


def render(count: int, world: World, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw photos.

    Args:
        count: N.
        world: parameters of the photos.
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

    # A smooth background: one hue, gently shaded.
    slope = draw(2, 1, 1, low=-0.15, high=0.15)
    shade = (
        draw(1, 1, low=0.55, high=0.8) + slope[:, 0] * (column - 0.5) + slope[:, 1] * (row - 0.5)
    )
    colour = 1 - world.saturation * (1 - _hue(hue))
    ground = shade[:, None] * colour[:, :, None, None]

    # The shape is dark and speckled, so it has strong edges and no hue.
    speckle = torch.randn(count, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    figure = draw(1, 1, 1, low=0.1, high=0.25) + 0.12 * speckle
    noise = 0.01 * torch.randn(count, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    images = ground + inside * (figure - ground) + noise
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


# 16 training images per class, as few as users have; enough test images for a standard error of
# 1.6 points.
BATCH = 64
SPLITS = {"train": 128, "val": 320, "test": 960}


def task(split: str) -> tuple[Tensor, Tensor]:
    """Draw one split of the downstream task: images (N, 3, 224, 224) uint8 and labels (N,)."""
    generator = torch.Generator().manual_seed(1 + list(SPLITS).index(split))
    # In batches: drawing a split at once would spend most of the time allocating memory.
    parts = [render(BATCH, DOWNSTREAM, generator) for _ in range(SPLITS[split] // BATCH)]
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)
