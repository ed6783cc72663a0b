"""Classify images with a trained prompt: `python -m adavipro_fast.predict ARTIFACT IMAGE...`.

With `--output`, sources may also be folders, lists, tar shards and Parquet files, and a stopped
command continues when it is started again.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import tyro

from adavipro_fast import cli, pictures
from adavipro_fast.artifact.answers import answers
from adavipro_fast.artifact.artifact import Artifact
from adavipro_fast.artifact.open import open_artifact
from adavipro_fast.bulk.cluster import answered_by_ray
from adavipro_fast.bulk.rows import Output
from adavipro_fast.bulk.run import answered, classify_all
from adavipro_fast.bulk.values import decoded
from adavipro_fast.data.ahead import decoded_ahead
from adavipro_fast.data.cache import joined_reasons
from adavipro_fast.device import slow_precision, torch_device
from adavipro_fast.errors import counted, printable
from adavipro_fast.files.whole import file_sha256
from adavipro_fast.method.config import Precision

BATCH = 64


@dataclass(frozen=True)
class PredictConfig:
    """Classify images: print the class names, probabilities and mask of each."""

    help_first: ClassVar[tuple[str, ...]] = (
        "output",
        "picture",
        "embeddings",
        "reject",
        "task",
        "device",
        "threads",
    )

    artifact: Annotated[Path, tyro.conf.Positional]
    """checkpoint.safetensors, .onnx or .engine"""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """image files; with --output also folders, - (a list of paths on stdin), .tar shards and
    .parquet files with a column of encoded images"""
    picture: Path | None = None
    """save a plot of each image and of the regions that get the prompt"""
    output: Path | None = None
    """write one row per image to F.csv, F.jsonl, F.parquet, or a folder of Parquet files"""
    embeddings: bool = False
    """with --output: also write the embedding of each image"""
    reject: cli.Reject = None
    task: cli.Task = None
    model: cli.Model = None
    pretrained: cli.Pretrained = None
    precision: Precision = "fp32"
    """precision of a checkpoint's encoder"""
    device: cli.Device = "auto"
    runtime: cli.Runtime = "auto"
    decode: cli.Decode = None
    threads: cli.Threads = None
    ray: str | None = None
    """with --output: address of a Ray cluster to run on, or auto"""


def main() -> None:
    """Parse, predict, print."""
    cli.main(PredictConfig, command, summary)


def command(config: PredictConfig) -> dict[str, Any]:
    """Classify and return a prediction per image."""
    if not config.images:
        raise ValueError("no image given; use adavipro-predict ARTIFACT IMAGE [IMAGE ...]")
    if config.ray is not None and config.output is None:
        raise ValueError("--ray needs --output F.csv, .jsonl or .parquet")
    options = cli.opening(config)
    artifact = open_artifact(config.artifact, **options)
    artifact.about.check_one_task(config.artifact)
    cli.warn(slow_precision(config.precision, torch_device(config.device)))
    if config.output is not None:
        return write_rows(artifact, options, config, config.output)
    for path in config.images:
        if path.is_dir() or str(path) == "-" or path.suffix in (".tar", ".parquet"):
            raise ValueError(f"{path} contains many images; add --output F.csv, .jsonl or .parquet")
    predictions: list[dict[str, Any]] = []
    printed, drawn = 0, []
    decode = partial(decoded, preprocess=artifact.about.preprocess)
    for paths, each in decoded_ahead(config.images, decode, BATCH):
        read = [pixels for pixels in each if not isinstance(pixels, str)]
        described: list[dict[str, Any]] = []
        if read:
            pixels = torch.from_numpy(np.stack(read))
            prediction = artifact(pixels)
            described = answers(artifact.about, prediction, config.reject)
            if config.picture is not None:
                drawn.append((pixels, prediction.mask))
        answered = iter(described)
        for path, one in zip(paths, each, strict=True):
            answer = {"error": one} if isinstance(one, str) else next(answered)
            predictions.append({"path": str(path)} | answer)
        # Errors wait for the first answer: without one they are the command's own error.
        if printed or described:
            for row in predictions[printed:]:
                print_prediction(row)
            printed = len(predictions)
    if not printed:
        count = len(predictions)
        more = f" (none of the {count} images can be read)" if count > 1 else ""
        raise ValueError(joined_reasons([each["error"] for each in predictions]) + more)
    if config.picture is not None:
        titles = [
            f"{p['classes'][0]['name']} {100 * p['classes'][0]['probability']:.0f} %"
            for p in predictions
            if "answer" in p
        ]
        pixels, masks = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        about = artifact.about
        prompt = None if about.baseline else about.config
        figure = pictures.overlay(pixels, masks, titles, prompt)
        pictures.save(figure, config.picture)
        print(f"picture: {str(config.picture)!r}")
    return {"predictions": predictions, "probabilities": artifact.about.calibration.link}


def write_rows(
    artifact: Artifact, options: dict[str, Any], config: PredictConfig, output: Path
) -> dict[str, Any]:
    """Classify all images into a new file or folder, or continue an unfinished one.

    Args:
        artifact: opened with the options.
        options: arguments of `open_artifact`, for other machines.
        config: the command's settings.
        output: file or folder of the rows.
    """
    if config.picture is not None:
        raise ValueError("--picture cannot be combined with --output; leave one of them out")
    plan = {
        "artifact": file_sha256(config.artifact),
        "task": config.task,
        "sources": [str(path) for path in config.images],
        "reject": config.reject,
        "embeddings": config.embeddings,
        "decode": config.decode,
    }
    rows = Output(output, plan, embeddings=config.embeddings)
    asked: dict[str, Any] = {"columns": rows.columns, "reject": config.reject}
    if config.ray is None:
        classify = partial(answered, artifact, **asked)
    else:
        classify = partial(
            answered_by_ray,
            address=config.ray,
            path=config.artifact.absolute(),
            options=options,
            threads=config.threads,
            **asked,
        )
    return classify_all(classify, config.images, rows)


def summary(result: dict[str, Any]) -> str:
    """Say what was written; without --output, each image has had its line."""
    if "output" not in result:
        return ""
    resumed = f", {result['resumed']} of them from before" if result["resumed"] else ""
    return (
        f"{result['output']}: {counted(result['images'], 'image')}{resumed}, "
        f"{counted(result['errors'], 'error')}, {result['images_per_s']:.0f} images/s"
    )


def print_prediction(described: dict[str, Any]) -> None:
    """Print one answer or error."""
    if "error" in described:
        print(f"{described['path']!r}: error: {printable(described['error'])}")
        return
    nearest = described["classes"][0]
    answered = (
        f"unknown, nearest {nearest['name']!r}" if described["rejected"] else repr(nearest["name"])
    )
    print(f"{described['path']!r}: {answered} ({nearest['probability']:.1%})")


if __name__ == "__main__":
    main()
