"""The results of a run: test once, calibrate, draw, collect the figures."""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adavipro_fast import pictures
from adavipro_fast.data.metrics import mask_figures
from adavipro_fast.data.sets import load_test
from adavipro_fast.data.split import Split
from adavipro_fast.files.checkpoint import checkpoint_of, load_checkpoint
from adavipro_fast.method.config import PROMPTED, PromptConfig
from adavipro_fast.method.encoder import FrozenEncoder
from adavipro_fast.method.model import AdaViPro
from adavipro_fast.training.calibrate import calibrate
from adavipro_fast.training.config import TrainConfig
from adavipro_fast.training.log import say
from adavipro_fast.training.state import UNTRAINED
from adavipro_fast.training.trainer import Trainer

PICTURED = 8
SAME_MASK = 0.01


def zero_shot_top1(
    trainer: Trainer, frozen: FrozenEncoder, embeddings: Tensor | None, config: TrainConfig
) -> float | None:
    """Return the encoder's zero-shot test accuracy on images without the prompt's margin.

    Return None without a test split or a text encoder.
    """
    test = trainer.dataset.test
    if test is None or embeddings is None:
        return None
    settings = PromptConfig(method="zero_shot", region_size=config.prompt.region_size)
    model = AdaViPro(frozen, embeddings, settings).to(trainer.device)
    if config.prompt.margin:
        _, test, _ = load_test(config.data, model.preprocess)
    return trainer.evaluate(model, test).top1


def result_of(
    trainer: Trainer, frozen: FrozenEncoder, zero_shot_top1: float | None, config: TrainConfig
) -> dict[str, Any]:
    """Test the best and the last model in fp32, draw the pictures, collect the figures.

    Without a test split, mask figures come from the validation images.
    """
    progress, dataset = trainer.progress, trainer.dataset
    tested = dataset.test is not None
    test = dataset.val if dataset.test is None else dataset.test
    progress.images = dataset.counts
    current = checkpoint_of(trainer.model, trainer.dataset.class_names)
    model = current.model(frozen, config.kernel).to(trainer.device)
    last = best = trainer.evaluate(model, test)
    path = trainer.kept_path
    # The leading process may still be writing it.
    trainer.group.wait()
    if not trainer.last_is_kept:
        model = load_checkpoint(path).model(frozen, config.kernel).to(trainer.device)
        best = trainer.evaluate(model, test)
    keep_calibration(trainer, model, trainer.dataset.val, path)
    figures = mask_figures(best.masks, trainer.inside)
    prompted = config.prompt.method in PROMPTED
    if trainer.group.leads and prompted:
        _draw(trainer, model, zero_shot_top1)
    if prompted and progress.best_epoch == UNTRAINED:
        shrunk = " of the shrunk images" if config.prompt.margin else ""
        say(
            f"warning: no epoch was clearly better on validation than the untrained prompt{shrunk} "
            f"({progress.best_val:.1f} %); the untrained prompt is kept"
        )
    if model.prompt.generator is not None and figures.adaptivity < SAME_MASK:
        say(
            f"warning: the mask does not adapt: adaptivity {figures.adaptivity:.3f}, "
            f"on average {figures.density:.0%} of the regions are open"
        )
    speeds = [row["images_per_s"] for row in progress.rows]
    return {
        "method": config.prompt.method,
        "zero_shot_top1": zero_shot_top1,
        "val_top1": progress.best_val,
        "test_top1": best.top1 if tested else None,
        "last_test_top1": last.top1 if tested else None,
        "trainable_params": trainer.model.trainable_params,
        "mask_density": figures.density,
        "mask_adaptivity": figures.adaptivity,
        "mask_placement": figures.placement,
        "epochs": trainer.epochs,
        "images_per_s": statistics.median(
            speeds or [len(trainer.dataset.val) / max(progress.seconds, 1e-9)]
        ),
        "seconds": progress.seconds,
        "images": dataset.counts,
        "duplicates": dataset.facts.duplicates.stored(),
        "checkpoint": str(path),
    }


def keep_calibration(trainer: Trainer, model: AdaViPro, val: Split, path: Path) -> None:
    """Calibrate a model on validation images, and store the calibration in its file."""
    evaluation = trainer.evaluate(model, val)
    if trainer.group.leads:
        fitted = calibrate(evaluation.logits, evaluation.labels, model.head.link)
        replace(load_checkpoint(path), calibration=fitted).save(path)


def _draw(trainer: Trainer, model: AdaViPro, zero_shot_top1: float | None) -> None:
    val, names = trainer.dataset.val, trainer.dataset.class_names
    spread = torch.linspace(0, len(val) - 1, min(PICTURED, len(val))).long()
    images, labels = val.batch(spread, trainer.device)
    grid = pictures.mask_grid(model, images, [names[label] for label in labels.tolist()])
    pictures.save(grid, trainer.output / "masks.png")
    curves = pictures.curves(trainer.progress.rows, zero_shot_top1)
    pictures.save(curves, trainer.output / "curves.png")
