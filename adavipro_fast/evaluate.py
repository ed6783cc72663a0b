"""Measure a trained prompt on a test split: `python -m adavipro_fast.evaluate ARTIFACT`."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tqdm import tqdm

from adavipro_fast import cli
from adavipro_fast.artifact.description import Artifact
from adavipro_fast.artifact.open import open_artifact
from adavipro_fast.data.metrics import (
    Evaluation,
    evaluate,
    expected_calibration_error,
    mask_figures,
    negative_log_likelihood,
)
from adavipro_fast.data.sets import DataConfig, load_test
from adavipro_fast.data.split import Split
from adavipro_fast.device import slow_precision, torch_device
from adavipro_fast.method.calibration import Calibration
from adavipro_fast.method.config import Precision
from adavipro_fast.method.prompt import frame_regions
from adavipro_fast.training.data_record import trained_on

SHOWN_CLASSES = 3


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a trained prompt on the test split of a data set."""

    artifact: Annotated[Path, tyro.conf.Positional]
    """checkpoint.safetensors, .onnx or .engine"""
    data: DataConfig = field(default_factory=DataConfig)
    model: cli.Model = None
    pretrained: cli.Pretrained = None
    precision: Precision = "fp32"
    """of a checkpoint's encoder"""
    device: cli.Device = "auto"
    runtime: cli.Runtime = "auto"
    threads: cli.Threads = None
    batch_size: int = 64
    """images at once"""
    reject: cli.Reject = None
    task: cli.Task = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; 1 or more is needed")


def main() -> None:
    """Parse, evaluate, print."""
    cli.main(EvaluateConfig, command, summary)


def command(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate and return the figures."""
    artifact = open_artifact(
        config.artifact,
        model=config.model,
        pretrained=config.pretrained,
        precision=config.precision,
        device=config.device,
        runtime=config.runtime,
        task=config.task,
    )
    artifact.about.check_one_task(config.artifact)
    cli.warn(slow_precision(config.precision, torch_device(config.device)))
    about = artifact.about
    class_names, test, notes = load_test(config.data, about.preprocess, about.class_names)
    for note in notes:
        cli.warn(note)
    if trained_on(config.artifact, Path(config.data.data)):
        cli.warn("the model was trained on these images; others say how good it is")
    calibration = artifact.about.calibration
    least = None if config.reject is None else calibration.threshold(config.reject)
    began = time.perf_counter()
    evaluation = evaluate_artifact(artifact, test, config.batch_size)
    seconds = time.perf_counter() - began
    inside = frame_regions(artifact.about.preprocess.size, artifact.about.config)
    figures = mask_figures(evaluation.masks, inside)
    return {
        "top1": evaluation.top1,
        "n": len(test),
        "per_class": evaluation.per_class(class_names),
        "backend": artifact.backend,
        "provider": artifact.provider,
        "images_per_s": len(test) / seconds,
        **probability_figures(evaluation, calibration, least),
        "mask_density": figures.density,
        "mask_adaptivity": figures.adaptivity,
        "mask_placement": figures.placement,
    }


def probability_figures(
    evaluation: Evaluation, calibration: Calibration, least: float | None
) -> dict[str, float]:
    """Say how far probabilities can be trusted, before and after calibration."""
    labels, figures = evaluation.labels, {"temperature": calibration.temperature}
    for ending, scale in (("", calibration), ("_uncalibrated", calibration.without)):
        probabilities = scale.probabilities(evaluation.logits)
        figures["nll" + ending] = negative_log_likelihood(probabilities, labels)
        figures["ece" + ending] = expected_calibration_error(probabilities, labels)
    if least is not None:
        kept = calibration.probabilities(evaluation.logits).amax(1) >= least
        right = (evaluation.predicted == labels)[kept].double()
        figures["rejected"] = 1 - kept.double().mean().item()
        figures["kept_top1"] = 100 * right.mean().item() if len(right) else 0.0
    return figures


def summary(result: dict[str, Any]) -> str:
    """Say how accurate it is, and where it is worst."""
    shares = [(name, top1) for name, top1 in result["per_class"].items() if top1 is not None]
    worst = sorted(shares, key=lambda entry: entry[1])[:SHOWN_CLASSES]
    return (
        f"top-1 {result['top1']:.1f} % of {result['n']} test images, by {result['backend']} "
        f"({result['provider']}), {result['images_per_s']:.0f} images/s\n"
        f"worst classes: {', '.join(f'{name} {top1:.0f} %' for name, top1 in worst)}"
    )


def evaluate_artifact(artifact: Artifact, split: Split, batch_size: int) -> Evaluation:
    """Run an artifact over a split, with a progress bar."""
    batches = split.batches(batch_size, torch.device("cpu"))
    steps = -(-len(split) // batch_size)
    bar = tqdm(batches, "evaluate", steps, leave=False, disable=None)
    return evaluate(lambda x: artifact(x)[:2], bar)


if __name__ == "__main__":
    main()
