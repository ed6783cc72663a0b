"""How well `unknown` separates images of other sets from a task's own.

    python bench/unknown.py mine.onnx --data my_images --others other_images --json rows.json

Reports the AUROC of the artifact's confidence, and the share of each set that `--reject` rejects.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from sklearn.metrics import roc_auc_score
from torch import Tensor

from adavipro_fast import cli, open_artifact
from adavipro_fast.artifact.artifact import Artifact
from adavipro_fast.data.sets import DataConfig, load_test
from adavipro_fast.data.split import Split
from adavipro_fast.evaluate import evaluate_artifact
from lib.table import Json, publish

BATCH = 32
RATES = (0.05, 0.1)


@dataclass(frozen=True)
class UnknownConfig:
    """Measure what the confidence of an artifact says about images of other sets."""

    artifact: Annotated[Path, tyro.conf.Positional]
    """checkpoint.safetensors, .onnx or .engine"""
    data: str
    """the task's own labelled images; the test split counts"""
    others: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """labelled images of other sets; repeatable"""
    model: cli.Model = None
    pretrained: cli.Pretrained = None
    json: Json = None


def command(config: UnknownConfig) -> dict[str, Any]:
    """Compare the confidences, with one row per set."""
    artifact = open_artifact(
        config.artifact, model=config.model, pretrained=config.pretrained, device="cpu"
    )
    about = artifact.about
    known = confidences(artifact, load_test(DataConfig(config.data), about.preprocess)[1])
    shares = {rate: about.calibration.threshold(rate) for rate in RATES}
    rows: list[dict[str, Any]] = [row("known", Path(config.data).name, known, shares)]
    for name in config.others:
        other = confidences(artifact, load_test(DataConfig(name), about.preprocess)[1])
        labels = torch.cat([torch.ones(len(known)), torch.zeros(len(other))])
        area = roc_auc_score(labels, torch.cat([known, other]))
        rows.append(row("other", Path(name).name, other, shares) | {"auroc": float(area)})
    return publish(rows, torch.device("cpu"), config.json, "confidence on known and other images")


def confidences(artifact: Artifact, split: Split) -> Tensor:
    """Return the highest probability of each image (n,)."""
    logits = evaluate_artifact(artifact, split, BATCH).logits
    return artifact.about.calibration.probabilities(logits).amax(1)


def row(kind: str, name: str, confidence: Tensor, shares: dict[float, float]) -> dict[str, Any]:
    """Return a set's figures."""
    rejected = {
        f"unknown_at_{rate}": (confidence < least).double().mean().item()
        for rate, least in shares.items()
    }
    return {"name": name, "kind": kind, "images": len(confidence), **rejected}


def main() -> None:
    """Parse, run, print."""
    cli.main(UnknownConfig, command)


if __name__ == "__main__":
    main()
