"""Accuracy of one checkpoint through every backend and precision, over its speed.

    python bench/accuracy.py runs/mine/checkpoint.safetensors --data my_images

Every row classifies the complete test split. Agreement is with PyTorch in fp32: answers in percent,
masks as a share of regions. Then all rows are timed in turn on the same batch.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from adavipro_fast import cli
from adavipro_fast.artifact.artifact import Artifact
from adavipro_fast.artifact.onnx import OnnxArtifact
from adavipro_fast.artifact.open import open_artifact
from adavipro_fast.data.images import decode_image, unresized
from adavipro_fast.data.metrics import Evaluation, evaluate
from adavipro_fast.data.sets import DataConfig, load_test, sources_of
from adavipro_fast.data.split import Split
from adavipro_fast.device import torch_device
from adavipro_fast.errors import VerificationError
from adavipro_fast.evaluate import evaluate_artifact
from adavipro_fast.export import onnx_export
from adavipro_fast.export.graph import GraphKind
from adavipro_fast.method.config import QUANTISED, ExportPrecision, Input, Precision, Runtime
from lib.machine import no_openvino
from lib.table import Json, Plot, publish, scatter
from lib.timing import compared, percentiles, until_steady

ONNX: tuple[tuple[GraphKind | None, ExportPrecision, Input], ...] = (
    (None, "fp32", "float32"),
    (None, "fp32", "uint8"),
    (None, "fp32", "any"),
    ("pixel", "fp32", "float32"),
    (None, "fp16", "uint8"),
    (None, "bf16", "uint8"),
    (None, "int8", "uint8"),
    (None, "fp8", "uint8"),
)
IN_OPENVINO = (("fp32", "uint8"), ("int8", "uint8"))
TIMED_TO = "onnx_folded_fp32_uint8"
# Keys of an export's result to keep in its row.
EXPORT_FIGURES = ("products", "wide", "loss_points", "bytes")
# Largest difference between the two highest probabilities for a near-tie.
NEAR = 0.02
EVALUATED_IN = 64


@dataclass(frozen=True)
class AccuracyConfig:
    """Run one checkpoint through every backend and precision on a test split."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """checkpoint.safetensors"""
    data: DataConfig = field(default_factory=DataConfig)
    model: cli.Model = None
    pretrained: cli.Pretrained = None
    batch: int = 16
    """images of a timed call"""
    seconds: float = 120.0
    """longest time to measure; it ends earlier when medians are within 2 %"""
    device: cli.Device = "auto"
    json: Json = None
    plot: Plot = None


@dataclass(frozen=True)
class Row:
    """A variant of the checkpoint, or the reason why it cannot be run."""

    name: str
    artifact: Artifact | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    """the export's bytes and quantisation figures"""
    skipped: str = ""


def torch_rows(config: AccuracyConfig, device: torch.device) -> list[Row]:
    """Open the checkpoint in PyTorch, fp32 first."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    if device.type == "cuda":
        precisions += ("fp16",)
    opened = partial(
        open_artifact,
        config.checkpoint,
        model=config.model,
        pretrained=config.pretrained,
        device=config.device,
    )
    return [Row(f"torch_{precision}", opened(precision=precision)) for precision in precisions]


def file_rows(config: AccuracyConfig, device: torch.device, folder: Path) -> Iterator[Row]:
    """Export and verify the variants, and open each in its runtimes.

    Raises:
        VerificationError: the output of a variant that is not quantised is wrong.
    """
    for graph, precision, kind in ONNX:
        name = "_".join((graph or "folded", precision, kind))
        runtimes: dict[str, Runtime] = {f"onnx_{name}": "onnxruntime"}
        if (precision, kind) in IN_OPENVINO:
            runtimes[f"openvino_{name}"] = "openvino"
        path, skipped = folder / f"{name}.onnx", ""
        figures: dict[str, Any] = {}
        if precision == "bf16" and device.type == "cpu":
            skipped = "ONNX Runtime's CPU provider cannot run bf16"
        elif precision in QUANTISED and not Path(config.data.data).is_dir():
            skipped = f"{precision} takes its ranges from a folder of images"
        else:
            try:
                figures = export(config, graph, precision, kind, path)
            except VerificationError as error:
                if precision not in QUANTISED:
                    raise
                skipped = str(error)
        for title, runtime in runtimes.items():
            missing = no_openvino(device) if runtime == "openvino" else None
            if reason := missing or skipped:
                yield Row(title, skipped=reason)
            else:
                artifact = open_artifact(path, device=config.device, runtime=runtime)
                yield Row(title, artifact, figures)


def export(
    config: AccuracyConfig,
    graph: GraphKind | None,
    precision: ExportPrecision,
    kind: Input,
    path: Path,
) -> dict[str, Any]:
    """Export a variant; return its bytes and quantisation figures.

    Raises:
        VerificationError: its output is wrong, or quantisation loses too much accuracy.
    """
    result = onnx_export.export(
        onnx_export.OnnxConfig(
            config.checkpoint,
            path,
            graph=graph,
            precision=precision,
            input=kind,
            images=(Path(config.data.data),) if precision in QUANTISED else (),
            model=config.model,
            pretrained=config.pretrained,
        )
    )
    return {name: result[name] for name in EXPORT_FIGURES if name in result}


def classified(artifact: Artifact, config: AccuracyConfig, test: Split) -> Evaluation:
    """Classify the test split: resized, or for a graph that resizes, at its original size."""
    if artifact.about.input != "any":
        return evaluate_artifact(artifact, test, EVALUATED_IN)
    assert isinstance(artifact, OnnxArtifact)
    source, preprocess = sources_of(config.data).splits["test"], artifact.about.preprocess

    def predict(image: Tensor) -> tuple[Tensor, Tensor]:
        return artifact.about.prediction(artifact.run(image.to(artifact.device)))[:2]

    decoded = (
        (unresized(decode_image(source.read(i), source.name(i), preprocess)), torch.tensor([label]))
        for i, label in enumerate(source.labels)
    )
    return evaluate(predict, decoded)


def described(name: str, found: Evaluation, expected: Evaluation, near: Tensor) -> dict[str, Any]:
    """Compare predictions with the reference's; `near` (N,) marks its near-ties."""
    turned = found.predicted != expected.predicted
    return {
        "name": name,
        "top1": found.top1,
        "top1_agreement": 100 * (~turned).double().mean().item(),
        "turned": int(turned.sum()),
        "turned_near": int((turned & near).sum()),
        "mask_agreement": (found.masks == expected.masks).double().mean().item(),
        "n": len(turned),
    }


def command(config: AccuracyConfig) -> dict[str, Any]:
    """Classify with every row, then time all rows."""
    device = torch_device(config.device)
    opened = torch_rows(config, device)
    reference = opened[0].artifact
    assert reference is not None
    about = reference.about
    names, test, _ = load_test(config.data, about.preprocess)
    if names != about.class_names:
        raise ValueError(f"{config.data.data} has other classes than {config.checkpoint}")
    expected = classified(reference, config, test)
    first, second = about.calibration.probabilities(expected.logits).topk(2, 1).values.unbind(1)
    near = first - second < NEAR
    rows: list[dict[str, Any]] = []
    works: dict[str, partial[Any]] = {}
    images, _ = test.batch(torch.arange(config.batch) % len(test), torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        for row in (*opened, *file_rows(config, device, Path(folder))):
            if row.artifact is None:
                rows.append({"name": row.name, "skipped": row.skipped})
                continue
            known = row.artifact is reference
            found = expected if known else classified(row.artifact, config, test)
            rows.append(described(row.name, found, expected, near))
            rows[-1] |= {"provider": row.artifact.provider, **row.figures}
            # The time of a resize in the graph depends on the picture; see bench/latency.py.
            if row.artifact.about.input != "any":
                works[row.name] = partial(row.artifact, images)
        bases = dict.fromkeys(works, TIMED_TO)
        times = until_steady(works, device, seconds=config.seconds, bases=bases)
    for figures in rows:
        if own := times.get(figures["name"]):
            figures.update(percentiles(own) | compared(own, times[TIMED_TO]))
            figures["images_per_s"] = 1e3 * config.batch / figures["p50_ms"]
    for name in ("tensorrt_fp16", "tensorrt_rtx_fp16"):
        reason = "an engine needs a CUDA device; evaluate ENGINE gives its figures"
        rows.append({"name": name, "skipped": reason})
    if config.plot is not None:
        scatter(rows, config.plot)
    hidden = (*EXPORT_FIGURES, "provider", "n", "p50_ms")
    return publish(rows, device, config.json, f"accuracy: {config.checkpoint}", hidden)


def main() -> None:
    """Parse, classify, time, print."""
    cli.main(AccuracyConfig, command)


if __name__ == "__main__":
    main()
