"""Classify images with a trained prompt: `python -m adavipro_fast.predict ARTIFACT IMAGE...`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor

from adavipro_fast import cli, pictures
from adavipro_fast.artifact import open_artifact
from adavipro_fast.cache import decode_image
from adavipro_fast.clip import Precision, Preprocess

SHOWN_CLASSES = 5


@dataclass(frozen=True)
class PredictConfig:
    """Classify images; prints class names, probabilities and the mask of each."""

    artifact: Annotated[Path, tyro.conf.Positional]
    """checkpoint.safetensors, .onnx or .engine"""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """image files"""
    picture: Path | None = None
    """save a picture of the images with the mask laid over them"""
    model: str | None = None
    """where a checkpoint's encoder now lies (default: as in training)"""
    pretrained: str | None = None
    """open_clip tag or path of its weights (default: as in training)"""
    precision: Precision = "fp32"
    """of a checkpoint's encoder"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


def main() -> None:
    """Parse, predict, print."""
    config = cli.parse(PredictConfig)
    cli.run(lambda: command(config))


def command(config: PredictConfig) -> dict[str, Any]:
    """Predict and return what was found, image by image."""
    if not config.images:
        raise ValueError("no image was named; use predict ARTIFACT IMAGE [IMAGE ...]")
    artifact = open_artifact(
        config.artifact,
        model=config.model,
        pretrained=config.pretrained,
        precision=config.precision,
        device=config.device,
    )
    pixels = read_pixels(config.images, artifact.about.preprocess)
    logits, masks, _ = artifact(pixels)
    probabilities = logits.softmax(1)
    predictions = []
    for path, row, mask in zip(config.images, probabilities, masks, strict=True):
        top = row.topk(min(SHOWN_CLASSES, len(row)))
        classes = [
            {"name": artifact.about.class_names[index], "probability": value}
            for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        predictions.append({"path": str(path), "classes": classes, "mask": mask.int().tolist()})
        print(f"{str(path)!r}: {classes[0]['name']!r} ({classes[0]['probability']:.1%})")
    if config.picture is not None:
        titles = [
            f"{p['classes'][0]['name']} {p['classes'][0]['probability']:.0%}" for p in predictions
        ]
        pictures.save(
            pictures.overlay(pixels, masks, titles, artifact.about.config), config.picture
        )
    return {"predictions": predictions}


def read_pixels(paths: tuple[Path, ...], preprocess: Preprocess) -> Tensor:
    """Decode image files as the encoder wants them: (N, 3, S, S) uint8.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image.
    """
    transform = preprocess.pixels()
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no image file {path}")
    return torch.from_numpy(
        np.stack([transform(decode_image(path.read_bytes(), str(path))) for path in paths])
    )


if __name__ == "__main__":
    main()
