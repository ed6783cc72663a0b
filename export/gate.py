"""Quantise an exported file with the user's images, and reject it if it loses accuracy."""

from collections.abc import Iterator, Sequence
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

# Calibration images of all tasks together, and the minimum per task.
CALIBRATED_ON, LEAST_OF_TASK = 256, 16
# Held-out images per task.
JUDGED_ON = 1000
SAMPLE = 32
BATCH = 16


@dataclass(frozen=True)
class QuantisationImages:
    """Images of one task: some to calibrate ranges, others to measure the loss of accuracy."""

    ranges: Tensor
    """(N, 3, S, S) uint8, for calibrating ranges"""
    held_out: Tensor
    """(M, 3, S, S) uint8, for measuring the loss"""
    labels: Tensor | None = None
    """(M,) of the held-out images; without labels, the graph's fp32 answers count as right"""
    name: str = ""
    """of the task; empty in a file of one task"""


def quantisation_images(
    images: Path,
    class_names: tuple[str, ...],
    preprocess: Preprocess,
    name: str = "",
    tasks: int = 1,
) -> QuantisationImages:
    """Read images for calibrating ranges and for measuring the loss.

    They are the training and the validation images of a labelled folder, or two halves of the
    images in any other folder.

    Args:
        images: a labelled folder as for `--data`, or a folder of images.
        class_names: classes that a labelled folder must have.
        preprocess: turns images into pixels.
        name: of the task.
        tasks: number of tasks that share the limit of calibration images.

    Raises:
        ValueError: there are too few images, or a labelled folder has other classes.
    """
    most = max(CALIBRATED_ON // tasks, LEAST_OF_TASK)
    if not images.is_dir():
        raise ValueError(f"{images} is not a folder; --images needs a folder of images")
    if split_folders(images)[0]:
        data = load_dataset(DataConfig(str(images)), preprocess)
        if set(data.class_names) != set(class_names):
            of = f" of task {name!r}" if name else ""
            differing = sorted(set(data.class_names) ^ set(class_names))
            raise ValueError(
                f"the classes in {images} differ from the checkpoint's{of}: {', '.join(differing)}"
            )
        # A folder's classes are in alphabetical order, a data set's may be in another.
        label_of = torch.tensor([class_names.index(own) for own in data.class_names])
        cpu = torch.device("cpu")
        ranges, _ = data.train.batch(spread(len(data.train), most), cpu)
        held_out, labels = data.val.batch(spread(len(data.val), JUDGED_ON), cpu)
        return QuantisationImages(ranges, held_out, label_of[labels], name)
    files = images_in(images)
    if len(files) < 2:
        raise ValueError(f"{images} contains {len(files)} images; use several hundred")
    chosen = spread(len(files), most + JUDGED_ON).tolist()
    pixels = read_pixels(tuple(files[number] for number in chosen), preprocess)
    return QuantisationImages(pixels[::2][:most], pixels[1::2], name=name)


def spread(count: int, most: int) -> Tensor:
    """Return at most `most` evenly spaced positions out of `count`."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()


@dataclass(frozen=True)
class GraphInputs:
    """Builds a graph's inputs: images, their task numbers, and the tables of tasks as data."""

    about: Description
    names: frozenset[str]
    """names of the graph's inputs"""
    tables: Feeds
    """the same in every call"""

    def batches(self, pixels: Tensor, tasks: Array, size: int = BATCH) -> Iterator[Feeds]:
        """Yield the inputs of one batch at a time, to save memory.

        Args:
            pixels: (N, 3, S, S) uint8.
            tasks: (N,) int64, each image's task number.
            size: number of images in a batch.
        """
        for start in range(0, len(pixels), size):
            part = slice(start, start + size)
            image = self.about.image(pixels[part]).numpy()
            fed = {"image": image, "task": tasks[part], **self.tables}
            yield {name: value for name, value in fed.items() if name in self.names}

    def of_task(self, pixels: Tensor, task: int) -> Iterator[Feeds]:
        """Yield batches of one task's images."""
        return self.batches(pixels, np.full(len(pixels), task))


class Gate:
    """Measures each task's loss by quantisation: points of accuracy on its held-out images.

    Args:
        exact: the graph in fp32.
        kind: int8 or fp8.
        tasks: images of each task.
        inputs: of the graph.
    """

    def __init__(
        self,
        exact: onnx.ModelProto,
        kind: Kind,
        tasks: Sequence[QuantisationImages],
        inputs: GraphInputs,
    ) -> None:
        self.kind, self.tasks, self.inputs = kind, tasks, inputs
        answers = self.answers(exact, "fp32")
        self.right = [
            own if task.labels is None else task.labels.numpy()
            for own, task in zip(answers, tasks, strict=True)
        ]
        self.top1 = self.accuracy(answers)
        self.points: list[float] = []
        """each task's loss with the graph that was measured last"""

    def answers(self, graph: onnx.ModelProto, precision: ExportPrecision) -> list[Array]:
        """Return a graph's predicted classes (M,) of each task's held-out images."""
        run = runner(graph, precision, ["logits"])
        return [
            np.concatenate(
                [run(fed)[0].argmax(1) for fed in self.inputs.of_task(task.held_out, number)]
            )
            for number, task in enumerate(self.tasks)
        ]

    def accuracy(self, answers: Sequence[Array]) -> list[float]:
        """Return the share of right answers of each task."""
        return [float((a == b).mean()) for a, b in zip(answers, self.right, strict=True)]

    def loss(self, graph: onnx.ModelProto) -> float:
        """Return a quantised graph's loss in points, for the task that loses most."""
        now = self.accuracy(self.answers(graph, self.kind))
        self.points = [100 * (before - after) for before, after in zip(self.top1, now, strict=True)]
        return max(self.points)


def quantise_file(
    path: Path,
    kind: Kind,
    tasks: Sequence[QuantisationImages],
    largest_loss: float,
    tables: Feeds | None = None,
) -> dict[str, Any]:
    """Quantise an exported fp32 graph in place.

    Args:
        path: the file.
        kind: int8 or fp8.
        tasks: images of each task, in the file's order.
        largest_loss: largest accepted loss of any task, points of accuracy.
        tables: of tasks as data.

    Returns:
        Figures for the command's JSON.

    Raises:
        ValueError: there are no products to quantise, or the weights need a second file.
        VerificationError: a task loses more accuracy than accepted.
    """
    about = describe_onnx(path)
    if path.with_name(path.name + ".data").exists():
        raise ValueError(
            f"this encoder is too large to quantise to {kind}: its file would exceed ONNX's "
            "size limit"
        )
    model = onnx.load(path)
    inputs = GraphInputs(about, frozenset(part.name for part in model.graph.input), tables or {})
    ranges = torch.cat([task.ranges for task in tasks])
    numbers = np.repeat(np.arange(len(tasks)), [len(task.ranges) for task in tasks])
    quantiser = Quantiser(model, kind, inputs.batches(ranges, numbers))
    gate = Gate(quantiser.model, kind, tasks, inputs)
    chosen = spread(len(ranges), SAMPLE)
    (sample,) = inputs.batches(ranges[chosen], numbers[chosen.numpy()], SAMPLE)
    quantised, loss, in_fp32 = search(quantiser, gate.loss, sample, largest_loss)
    measure = "agreement" if all(task.labels is None for task in tasks) else "accuracy"
    if quantised is None:
        worst = int(np.argmax(gate.points))
        of = f" in task {tasks[worst].name!r}" if tasks[worst].name else ""
        raise VerificationError(
            f"{path.name} was not written: {kind} loses {loss:.1f} points of {measure}{of} on "
            f"{len(gate.right[worst])} images with {len(in_fp32)} of {len(quantiser.products)} "
            f"products in fp32; --largest-loss is {largest_loss}"
        )
    count = quantised_products(quantised, kind)
    if count != len(quantiser.products) - len(in_fp32):
        raise VerificationError(f"{path.name} was not written: only {count} products are in {kind}")
    save_sealed(quantised, path, metadata_of(quantised))
    losses = {task.name: points for task, points in zip(tasks, gate.points, strict=True)}
    return {
        "products": len(quantiser.products),
        "wide": in_fp32,
        "loss_points": loss,
        **({"losses": losses} if any(losses) else {}),
        "measure": measure,
        "judged_images": sum(map(len, gate.right)),
        "calibration_images": len(ranges),
    }


def quantised_products(model: onnx.ModelProto, kind: Kind) -> int:
    """Count the products of two quantised tensors."""
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
