"""Accuracy of one checkpoint through every backend and precision, beside its speed.

    python bench/accuracy.py runs/mine/checkpoint.safetensors --data my_images

Every row predicts the whole test split. Agreement is with PyTorch in fp32, top-1 in percent and
masks as a share of regions.
"""

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from adavipro_fast import cli
from adavipro_fast.artifact.description import Artifact
from adavipro_fast.artifact.open import open_artifact
from adavipro_fast.data.metrics import Evaluation
from adavipro_fast.data.sets import DataConfig, load_test
from adavipro_fast.data.split import Split
from adavipro_fast.device import torch_device
from adavipro_fast.evaluate import evaluate_artifact
from adavipro_fast.export import to_onnx
from adavipro_fast.export.to_onnx import Graph
from adavipro_fast.method.config import Input, Precision
from lib.table import Json, publish

ONNX: tuple[tuple[Graph | None, Precision, Input], ...] = (
    (None, "fp32", "float32"),
    (None, "fp32", "uint8"),
    ("pixel", "fp32", "float32"),
    (None, "fp16", "uint8"),
    (None, "bf16", "uint8"),
)


@dataclass(frozen=True)
class AccuracyConfig:
    """Run one checkpoint through every backend and precision on a test split."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """checkpoint.safetensors"""
    data: DataConfig = field(default_factory=DataConfig)
    model: cli.Model = None
    pretrained: cli.Pretrained = None
    batch_size: int = 64
    """images at once"""
    device: cli.Device = "auto"
    json: Json = None


def figures(
    artifact: Artifact, split: Split, config: AccuracyConfig, reference: Evaluation | None
) -> tuple[dict[str, Any], Evaluation]:
    """Predict a split and compare with the reference's predictions."""
    began = time.perf_counter()
    found = evaluate_artifact(artifact, split, config.batch_size)
    seconds = time.perf_counter() - began
    first = reference or found
    row = {
        "top1": found.top1,
        "top1_agreement": 100 * (found.predicted == first.predicted).double().mean().item(),
        "mask_agreement": (found.masks == first.masks).double().mean().item(),
        "images_per_s": len(split) / seconds,
        "n": len(split),
        "provider": artifact.provider,
    }
    return row, found


def open_torch(config: AccuracyConfig, precision: Precision) -> Artifact:
    """Open the checkpoint in PyTorch."""
    return open_artifact(
        config.checkpoint,
        model=config.model,
        pretrained=config.pretrained,
        precision=precision,
        device=config.device,
    )


def open_onnx(
    config: AccuracyConfig, variant: tuple[Graph | None, Precision, Input], folder: Path
) -> Artifact:
    """Export a variant, verified, and open it."""
    graph, precision, kind = variant
    path = folder / f"{graph}-{precision}-{kind}.onnx"
    options = to_onnx.OnnxConfig(
        config.checkpoint,
        path,
        graph=graph,
        precision=precision,
        input=kind,
        model=config.model,
        pretrained=config.pretrained,
    )
    to_onnx.command(options)
    return open_artifact(path, device=config.device, runtime="onnxruntime")


def main() -> None:
    """Parse, predict, print."""
    cli.main(AccuracyConfig, command)


def command(config: AccuracyConfig) -> dict[str, Any]:
    """Run every row."""
    device = torch_device(config.device)
    reference = open_torch(config, "fp32")
    split = load_test(config.data, reference.about.preprocess)[1]
    told, expected = figures(reference, split, config, None)
    rows = [{"name": "torch_fp32", **told}]
    for precision in ("bf16", "fp16") if device.type == "cuda" else ("bf16",):
        told, _ = figures(open_torch(config, precision), split, config, expected)
        rows.append({"name": f"torch_{precision}", **told})
    with tempfile.TemporaryDirectory() as folder:
        for variant in ONNX:
            name = "_".join(["onnx", variant[0] or "folded", *variant[1:]])
            if variant[1] == "bf16" and device.type == "cpu":
                reason = "ONNX Runtime's CPU provider cannot run bf16"
                rows.append({"name": name, "skipped": reason})
                continue
            artifact = open_onnx(config, variant, Path(folder))
            rows.append({"name": name, **figures(artifact, split, config, expected)[0]})
    for name in ("tensorrt_fp16", "tensorrt_rtx_fp16"):
        reason = "an engine needs a CUDA device; evaluate ENGINE gives its figures"
        rows.append({"name": name, "skipped": reason})
    return publish(rows, device, config.json, f"accuracy: {config.checkpoint}")


if __name__ == "__main__":
    main()
