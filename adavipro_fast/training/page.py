"""The results of `compare` as one HTML file with embedded pictures."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import torch
from matplotlib.figure import Figure

from adavipro_fast import pictures
from adavipro_fast.data.metrics import expected_calibration_error, macro_of
from adavipro_fast.data.mistakes import confusion, mistakes
from adavipro_fast.files.checkpoint import load_checkpoint
from adavipro_fast.training.search import Finalist

TEMPLATE = Path(__file__).with_name("compare.html")
WORST = 12


def page(result: Mapping[str, Any], winner: Finalist) -> str:
    """Return the page as HTML.

    Args:
        result: of the search.
        winner: the winner with its answers to the test images, or to the validation images if
            there is no test split.
    """
    path, evaluation, dataset = Path(result["checkpoint"]), winner.evaluation, winner.dataset
    kept = load_checkpoint(path)
    calibration, names = kept.calibration, kept.class_names
    probabilities = calibration.probabilities(evaluation.logits)
    uncalibrated = calibration.without.probabilities(evaluation.logits)
    drawn = {
        "comparison": pictures.comparison(result["rows"], result["winner"]),
        "confusion": pictures.confusion(confusion(evaluation, len(names)), names),
    }
    if winner.rows:
        drawn["curves"] = pictures.curves(winner.rows, None)
    worst = mistakes(evaluation, probabilities, names, str)[: -WORST - 1 : -1]
    if worst:
        rows = torch.tensor([each.row for each in worst])
        images, _ = winner.split.batch(rows, torch.device("cpu"))
        titles = [f"{each.label}: {each.answer} {100 * each.confidence:.0f} %" for each in worst]
        drawn["worst"] = pictures.overlay(images, evaluation.masks[rows], titles, kept.config)
    template = jinja2.Environment(autoescape=True).from_string(TEMPLATE.read_text())
    return template.render(
        data=winner.data,
        encoder=kept.encoder.name,
        images=dataset.counts,
        result=result,
        rows=sorted(result["rows"], key=lambda row: -row["val_top1"]),
        pictures={name: inline(figure) for name, figure in drawn.items()},
        judged="validation" if dataset.test is None else "test",
        top1=evaluation.top1,
        macro=macro_of(evaluation.per_class(names)),
        ece=expected_calibration_error(probabilities, evaluation.labels),
        ece_uncalibrated=expected_calibration_error(uncalibrated, evaluation.labels),
        commands=(
            f"adavipro-evaluate {path} --data {winner.data}",
            f"adavipro-to-onnx {path} --output model.onnx --input uint8",
            "adavipro-predict model.onnx IMAGE",
            "adavipro-serve model.onnx",
        ),
    )


def inline(figure: Figure) -> str:
    """Return a figure as a data URL."""
    return "data:image/png;base64," + base64.b64encode(pictures.encoded(figure, "png")).decode()
