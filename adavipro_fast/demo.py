"""The built-in demo: generated images and the small CLIP that is trained on them.

A photo shows one speckled shape on a smooth coloured background. The small CLIP first learns shapes
on photos like those of the downstream task. Then it is trained on photos in which most backgrounds
have the colour associated with their shape, so it learns to use the background too. In the
downstream task the background's colour is uninformative and misleads it. A prompt helps where it
covers the background and harms where it covers the shape, which may have any position and size, so
it is worth learning where to add the prompt.

    python -m adavipro_fast.demo model  --output DIR    train the small CLIP again (deterministic)
    python -m adavipro_fast.demo images --output DIR    write the downstream task as folders
"""

import json
import math
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
from adavipro_fast.data.world import (
    CLASS_NAMES,
    DOWNSTREAM,
    IMAGE_SIZE,
    PRETRAINING,
    SPLITS,
    render,
    task,
)


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
    """Train the small CLIP, first on shapes, then on correlated colours: 12 minutes on 2 cores.

    The loss matches each photo against the texts of all classes, which is CLIP's loss without the
    duplicate captions of a batch.

    Returns:
        The state dict, in fp16 except `logit_scale`.
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
        for step in (bar := trange(STEPS, desc="train the demo CLIP", disable=None)):
            # Learn shapes first: if colour predicted the class, shapes would not be learned.
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
    """Train the small CLIP and write it as a folder for open_clip's `local-dir:`."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "open_clip_config.json").write_text(json.dumps(MODEL, indent=2) + "\n")
    save_file(train_model(), output / "open_clip_model.safetensors")


@dataclass(frozen=True)
class DemoConfig:
    """Train the small CLIP of the built-in demo, or write the demo's images as folders."""

    what: Annotated[Literal["model", "images"], tyro.conf.Positional]
    """what to create: the model or the images"""
    output: Path
    """output folder"""


def command(config: DemoConfig) -> dict[str, Any]:
    """Create the model or the images."""
    (write_model if config.what == "model" else write_images)(config.output)
    return {"what": config.what, "output": str(config.output)}


def summary(result: dict[str, Any]) -> str:
    """Format what was written, and how to train with it."""
    output = result["output"]
    what, flag = {
        "model": ("the small CLIP", f"--model local-dir:{output}"),
        "images": ("the task's images", f"--data {output}"),
    }[result["what"]]
    return f"{output}: {what}\ntrain: adavipro-train {flag}"


def main() -> None:
    """Parse, create, print."""
    cli.main(DemoConfig, command, summary)


if __name__ == "__main__":
    main()
