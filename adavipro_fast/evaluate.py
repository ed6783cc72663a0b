"""Evaluate a checkpoint or exported file: `python -m adavipro_fast.evaluate ARTIFACT`."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import tyro
from tqdm.auto import tqdm

from adavipro_fast import cli, pictures
from adavipro_fast.artifact.artifact import Artifact
from adavipro_fast.artifact.open import open_artifact
from adavipro_fast.data.cut import Cut
from adavipro_fast.data.metrics import (
    Evaluation,
    evaluate,
    expected_calibration_error,
    macro_of,
    mask_figures,
    negative_log_likelihood,
)
from adavipro_fast.data.mistakes import confusion, mistakes, write_confusion, write_errors
from adavipro_fast.data.sets import DataConfig, cut_of_test
from adavipro_fast.data.split import Split
from adavipro_fast.device import slow_precision, torch_device
from adavipro_fast.files.about import Description
from adavipro_fast.method.calibration import Calibration
from adavipro_fast.method.config import Precision
from adavipro_fast.method.prompt import frame_regions
from adavipro_fast.training.data_record import trained_on

SHOWN_CLASSES = 3
PICTURES = (".png", ".svg", ".pdf")
DRAWN = 24


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a checkpoint or exported file on the test split of a data set."""

    help_first: ClassVar[tuple[str, ...]] = (
        "data",
        "task",
        "reject",
        "errors",
        "confusion",
        "worst",
        "batch_size",
        "device",
        "threads",
    )

    artifact: Annotated[Path, tyro.conf.Positional]
    """checkpoint.safetensors, .onnx or .engine"""
    data: DataConfig = field(default_factory=DataConfig)
    model: cli.Model = None
    pretrained: cli.Pretrained = None
    precision: Precision = "fp32"
    """precision of a checkpoint's encoder"""
    device: cli.Device = "auto"
    runtime: cli.Runtime = "auto"
    decode: cli.Decode = None
    threads: cli.Threads = None
    batch_size: int = 64
    """images per batch"""
    reject: cli.Reject = None
    task: cli.Task = None
    errors: Path | None = None
    """F.csv for the wrong answers: path, label, answer, confidence; least confident first"""
    confusion: Path | None = None
    """F.csv or F.png for the confusion matrix; rows are the true classes"""
    worst: Path | None = None
    """F.png for the most confident wrong answers"""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; use 1 or more")
        for path, endings in (
            (self.errors, (".csv",)),
            (self.confusion, (".csv", *PICTURES)),
            (self.worst, PICTURES),
        ):
            if path is not None and path.suffix not in endings:
                raise ValueError(f"{path} must end in {' or '.join(endings)}")


def main() -> None:
    """Parse, evaluate, print."""
    cli.main(EvaluateConfig, command, summary)


def command(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate and return the figures."""
    artifact = open_artifact(config.artifact, **cli.opening(config))
    artifact.about.check_one_task(config.artifact)
    cli.warn(slow_precision(config.precision, torch_device(config.device)))
    about = artifact.about
    class_names, cut, notes = cut_of_test(config.data, about.preprocess, about.class_names)
    test = cut.split
    for note in notes:
        cli.warn(note)
    if trained_on(config.artifact, Path(config.data.data)):
        cli.warn("the model was trained on these images; use other images to measure its accuracy")
    calibration = artifact.about.calibration
    least = None if config.reject is None else calibration.threshold(config.reject)
    began = time.perf_counter()
    evaluation = evaluate_artifact(artifact, test, config.batch_size)
    seconds = time.perf_counter() - began
    inside = frame_regions(artifact.about.preprocess.size, artifact.about.config)
    figures = mask_figures(evaluation.masks, inside)
    per_class = evaluation.per_class(class_names)
    write_mistakes(config, about, cut, evaluation)
    return {
        "top1": evaluation.top1,
        "macro": macro_of(per_class),
        "n": len(test),
        "per_class": per_class,
        "backend": artifact.backend,
        "provider": artifact.provider,
        "images_per_s": len(test) / seconds,
        **probability_figures(evaluation, calibration, least),
        "mask_density": figures.density,
        "mask_adaptivity": figures.adaptivity,
        "mask_placement": figures.placement,
    }


def write_mistakes(
    config: EvaluateConfig, about: Description, cut: Cut, evaluation: Evaluation
) -> None:
    """Write the requested files about the model's errors."""
    names = about.class_names
    if config.confusion is not None:
        counts = confusion(evaluation, len(names))
        if config.confusion.suffix == ".csv":
            write_confusion(config.confusion, counts, names)
        else:
            pictures.save(pictures.confusion(counts, names), config.confusion)
    probabilities = about.calibration.probabilities(evaluation.logits)
    wrong = mistakes(evaluation, probabilities, names, cut.name)
    if config.errors is not None:
        write_errors(config.errors, wrong)
    if config.worst is not None and not wrong:
        cli.warn(f"no answer is wrong, so {config.worst} was not written")
    elif config.worst is not None:
        drawn = wrong[: -DRAWN - 1 : -1]
        rows = torch.tensor([each.row for each in drawn])
        images, _ = cut.split.batch(rows, torch.device("cpu"))
        titles = [f"{each.label}: {each.answer} {100 * each.confidence:.0f} %" for each in drawn]
        prompt = None if about.baseline else about.config
        pictures.save(
            pictures.overlay(images, evaluation.masks[rows], titles, prompt), config.worst
        )


def probability_figures(
    evaluation: Evaluation, calibration: Calibration, least: float | None
) -> dict[str, float]:
    """Measure the quality of probabilities, with and without calibration."""
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
    """Format the accuracy and the worst classes."""
    shares = [(name, top1) for name, top1 in result["per_class"].items() if top1 is not None]
    worst = sorted(shares, key=lambda entry: entry[1])[:SHOWN_CLASSES]
    return (
        f"top-1 {result['top1']:.1f} % of {result['n']} test images (mean over classes "
        f"{result['macro']:.1f} %), by {result['backend']} "
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
