"""The embedded demo: procedural images and the small CLIP that is trained on them.

A photo shows one speckled shape on a smooth coloured ground. The small CLIP first learned shapes,
on photos like those of the downstream task. Then colour and shape went together in most photos,
so it came to read the ground as well as the shape. The downstream task breaks that habit: the
ground's colour says nothing. A prompt helps by drowning the misleading ground, and harms where it
covers the shape, which may stand anywhere and have any size. So it pays to learn where to add.

    python -m adavipro_fast.demo model  --output DIR    remake the small CLIP (deterministic)
    python -m adavipro_fast.demo images --output DIR    write the downstream task as folders
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from open_clip import SimpleTokenizer
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import trange

from adavipro_fast import cli

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
SPLITS = {"train": 128, "val": 320, "test": 960}


def task(split: str) -> tuple[Tensor, Tensor]:
    """Draw one split of the downstream task: images (N, 3, 224, 224) uint8 and labels (N,)."""
    generator = torch.Generator().manual_seed(1 + list(SPLITS).index(split))
    # In batches: one whole split would spend most of the time on fresh memory.
    parts = [render(BATCH, DOWNSTREAM, generator) for _ in range(SPLITS[split] // BATCH)]
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def write_images(output: Path) -> None:
    """Write the downstream task as <split>/<class name>/<number>.png."""
    for split in SPLITS:
        for number, (image, label) in enumerate(zip(*task(split), strict=True)):
            folder = output / split / CLASS_NAMES[int(label)]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:04d}.png")


MODEL: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "layers": 4,
            "width": 160,
            "head_width": 32,
            "patch_size": 32,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}
BATCH, STEPS, PEAK_LR, WARM_UP = 64, 1800, 1e-3, 100
SHAPES_FIRST = 0.6


def train_model() -> dict[str, Tensor]:
    """Train the small CLIP, first on shapes, then on the habit; about 12 minutes on 2 cores.

    Each photo is matched against the texts of all classes, which is CLIP's loss with the batch's
    duplicate captions taken out.

    Returns:
        The state dict, fp16 but for `logit_scale`.
    """
    torch.manual_seed(0)
    clip = CLIP(**MODEL["model_cfg"])
    texts = SimpleTokenizer()([f"This is a photo of a {name}" for name in CLASS_NAMES])
    optimizer = torch.optim.AdamW(clip.parameters(), lr=PEAK_LR, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * s / STEPS)),
    )
    generator = torch.Generator().manual_seed(0)
    # On a CPU flash attention is several times slower than plain attention at 50 tokens.
    with sdpa_kernel(SDPBackend.MATH):
        for step in (bar := trange(STEPS, desc="train the demo CLIP")):
            # Shapes are learned first: where colour tells the class, shape would not be.
            world = PRETRAINING if step >= STEPS * SHAPES_FIRST else DOWNSTREAM
            images, labels = render(BATCH, world, generator)
            with torch.autocast("cpu", torch.bfloat16):
                image = clip.encode_image(images.float() / 127.5 - 1, normalize=True)
                text = clip.encode_text(texts, normalize=True)
                logits = clip.logit_scale.exp() * image @ text.t()
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    weights = {name: value.half() for name, value in clip.state_dict().items()}
    return weights | {"logit_scale": clip.logit_scale.detach().clone()}


def write_model(output: Path) -> None:
    """Train the small CLIP and write it as a folder that open_clip's `local-dir:` reads."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "open_clip_config.json").write_text(json.dumps(MODEL, indent=2) + "\n")
    save_file(train_model(), output / "open_clip_model.safetensors")


@dataclass(frozen=True)
class DemoConfig:
    """Make the embedded demo's small CLIP, or write its images as folders."""

    what: Annotated[Literal["model", "images"], tyro.conf.Positional]
    """which of the two"""
    output: Path
    """folder to write"""


def command(config: DemoConfig) -> dict[str, Any]:
    """Make what was asked for."""
    (write_model if config.what == "model" else write_images)(config.output)
    return {"what": config.what, "output": str(config.output)}


def main() -> None:
    """Parse, make, print."""
    config = cli.parse(DemoConfig)
    cli.run(lambda: command(config))


if __name__ == "__main__":
    main()
