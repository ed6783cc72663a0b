"""Quantise an exported file on the user's images, and refuse where it costs accuracy."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from adavipro_fast.data.folder import split_folders
from adavipro_fast.data.images import images_in, read_pixels
from adavipro_fast.data.sets import DataConfig, load_dataset
from adavipro_fast.errors import VerificationError
from adavipro_fast.export.quantise import ELEMENTS, Array, Feeds, Kind, Quantiser, runner, search
from adavipro_fast.files.about import Description
from adavipro_fast.files.sealed import describe_onnx, metadata_of, save_sealed
from adavipro_fast.method.config import ExportPrecision
from adavipro_fast.method.preprocess import Preprocess

CALIBRATED_ON, JUDGED_ON = 256, 1000
SAMPLE = 32
BATCH = 16


@dataclass(frozen=True)
class Judges:
    """Images for the ranges, and others that say what rounding costs."""

    ranges: Tensor
    """(N, 3, S, S) uint8"""
    judged: Tensor
    """(M, 3, S, S) uint8"""
    labels: Tensor | None
    """(M,); none where the images are of no known class: the graph's own answers are then right"""


def judges_of(images: Path, class_names: tuple[str, ...], preprocess: Preprocess) -> Judges:
    """Read a labelled folder's training and validation images, or any images, every other one.

    Args:
        images: as `--data` takes it; or a folder of images.
        class_names: that a labelled folder must have.
        preprocess: how images become pixels.

    Raises:
        ValueError: there are too few images.
    """
    if split_folders(images)[0]:
        data = load_dataset(DataConfig(str(images)), preprocess)
        if data.class_names != class_names:
            raise ValueError(f"the classes in {images} differ from the checkpoint's")
        cpu = torch.device("cpu")
        ranges, _ = data.train.batch(spread(len(data.train), CALIBRATED_ON), cpu)
        judged, labels = data.val.batch(spread(len(data.val), JUDGED_ON), cpu)
        return Judges(ranges, judged, labels)
    files = images_in(images)
    if len(files) < 2:
        raise ValueError(f"{images} contains {len(files)} images; use several hundred")
    chosen = spread(len(files), CALIBRATED_ON + JUDGED_ON).tolist()
    pixels = read_pixels(tuple(files[number] for number in chosen), preprocess)
    return Judges(pixels[::2][:CALIBRATED_ON], pixels[1::2], None)


def spread(count: int, most: int) -> Tensor:
    """Return at most `most` positions of `count`, evenly spread."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()


def quantise_file(path: Path, kind: Kind, judges: Judges, largest_loss: float) -> dict[str, Any]:
    """Quantise an exported fp32 graph in place.

    Args:
        path: of the file.
        kind: int8 or fp8.
        judges: images for ranges and gate.
        largest_loss: points of accuracy that may be lost.

    Returns:
        What was done, for the command's JSON.

    Raises:
        ValueError: there are no products, or its weights need a second file.
        VerificationError: more accuracy is lost.
    """
    about = describe_onnx(path)
    if path.with_name(path.name + ".data").exists():
        raise ValueError(
            f"this encoder is too large to quantise to {kind}: its file would exceed ONNX's "
            "size limit"
        )
    quantiser = Quantiser(onnx.load(path), kind, feeds_of(judges.ranges, about))
    exact = answers(quantiser.model, "fp32", judges, about)
    right = exact if judges.labels is None else judges.labels.numpy()
    top1 = float((exact == right).mean())

    def loss_of(graph: onnx.ModelProto) -> float:
        return 100 * (top1 - float((answers(graph, kind, judges, about) == right).mean()))

    (sample,) = feeds_of(judges.ranges[:SAMPLE], about, SAMPLE)
    found, loss, wide = search(quantiser, loss_of, sample, largest_loss)
    measure = "agreement" if judges.labels is None else "accuracy"
    if found is None:
        raise VerificationError(
            f"{path.name} was not written: {kind} loses {loss:.1f} points of {measure} on "
            f"{len(right)} images with {len(wide)} of {len(quantiser.products)} products in fp32; "
            f"--largest-loss is {largest_loss}"
        )
    if (count := quantised_products(found, kind)) != len(quantiser.products) - len(wide):
        raise VerificationError(f"{path.name} was not written: only {count} products are in {kind}")
    save_sealed(found, path, metadata_of(found))
    return {
        "products": len(quantiser.products),
        "wide": wide,
        "loss_points": loss,
        "measure": measure,
        "judged_images": len(right),
        "calibration_images": len(judges.ranges),
    }


def feeds_of(pixels: Tensor, about: Description, size: int = BATCH) -> Iterator[Feeds]:
    """Cut images into batches of a graph's input, one at a time: all would be large."""
    return ({"image": about.image(part).numpy()} for part in pixels.split(size))


def answers(
    model: onnx.ModelProto, precision: ExportPrecision, judges: Judges, about: Description
) -> Array:
    """Return a graph's classes of the judging images, (M,)."""
    run = runner(model, precision, ["logits"])
    return np.concatenate([run(fed)[0].argmax(1) for fed in feeds_of(judges.judged, about)])


def quantised_products(model: onnx.ModelProto, kind: Kind) -> int:
    """Count the products that read two quantised tensors."""
    elements = {t.name: t.data_type for t in model.graph.initializer}
    dequantised = {
        node.output[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and elements[node.input[2]] == ELEMENTS[kind][0]
    }
    return sum(
        node.op_type in ("MatMul", "Gemm") and set(node.input[:2]) <= dequantised
        for node in model.graph.node
    )
