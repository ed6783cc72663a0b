"""Quantise an exported file on the user's images, and refuse where it costs accuracy."""

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

# Images for the ranges, of all tasks together; of each task at least the second number.
CALIBRATED_ON, LEAST_OF_TASK = 256, 16
# Held-out images of each task.
JUDGED_ON = 1000
SAMPLE = 32
BATCH = 16


@dataclass(frozen=True)
class QuantisationImages:
    """Images of one task: some set the ranges, others show what rounding costs."""

    ranges: Tensor
    """(N, 3, S, S) uint8"""
    held_out: Tensor
    """(M, 3, S, S) uint8"""
    labels: Tensor | None = None
    """(M,) of the held-out images; without labels the graph's fp32 answers count as right"""
    name: str = ""
    """of the task; empty in a file of one"""


def quantisation_images(
    images: Path,
    class_names: tuple[str, ...],
    preprocess: Preprocess,
    name: str = "",
    tasks: int = 1,
) -> QuantisationImages:
    """Read a labelled folder's training and validation images, or half of any images for each use.

    Args:
        images: as `--data` takes it; or a folder of images.
        class_names: that a labelled folder must have.
        preprocess: how images become pixels.
        name: of the task.
        tasks: that share the images for the ranges.

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
        # A folder's classes are in alphabetical order, a data set's in its own.
        place = torch.tensor([class_names.index(own) for own in data.class_names])
        cpu = torch.device("cpu")
        ranges, _ = data.train.batch(spread(len(data.train), most), cpu)
        held_out, labels = data.val.batch(spread(len(data.val), JUDGED_ON), cpu)
        return QuantisationImages(ranges, held_out, place[labels], name)
    files = images_in(images)
    if len(files) < 2:
        raise ValueError(f"{images} contains {len(files)} images; use several hundred")
    chosen = spread(len(files), most + JUDGED_ON).tolist()
    pixels = read_pixels(tuple(files[number] for number in chosen), preprocess)
    return QuantisationImages(pixels[::2][:most], pixels[1::2], name=name)


def spread(count: int, most: int) -> Tensor:
    """Return at most `most` positions of `count`, evenly spread."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()


@dataclass(frozen=True)
class GraphInputs:
    """How a graph is fed: images, the task of each, and the tables of tasks that are data."""

    about: Description
    names: frozenset[str]
    """of the graph's inputs"""
    tables: Feeds
    """the same in every call"""

    def batches(self, pixels: Tensor, tasks: Array, size: int = BATCH) -> Iterator[Feeds]:
        """Yield one batch at a time, since all would be large.

        Args:
            pixels: (N, 3, S, S) uint8.
            tasks: (N,) int64, the number of each image's task.
            size: images in a batch.
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
    """What rounding costs each task: points of accuracy on its held-out images.

    Args:
        exact: the graph in fp32.
        kind: int8 or fp8.
        tasks: their images.
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
        """that each task lost in the graph that was judged last"""

    def answers(self, graph: onnx.ModelProto, precision: ExportPrecision) -> list[Array]:
        """Return the classes that a graph gives each task's held-out images, (M,)."""
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
        """Judge a quantised graph: what the task that suffers most loses, points."""
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
        path: of the file.
        kind: int8 or fp8.
        tasks: images for ranges and gate, of each task in the file's order.
        largest_loss: points of accuracy that no task may exceed.
        tables: of tasks that are data.

    Returns:
        What was done, for the command's JSON.

    Raises:
        ValueError: there are no products, or its weights need a second file.
        VerificationError: a task loses more accuracy.
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
    some = spread(len(ranges), SAMPLE)
    (sample,) = inputs.batches(ranges[some], numbers[some.numpy()], SAMPLE)
    found, loss, wide = search(quantiser, gate.loss, sample, largest_loss)
    measure = "agreement" if all(task.labels is None for task in tasks) else "accuracy"
    if found is None:
        worst = int(np.argmax(gate.points))
        of = f" in task {tasks[worst].name!r}" if tasks[worst].name else ""
        raise VerificationError(
            f"{path.name} was not written: {kind} loses {loss:.1f} points of {measure}{of} on "
            f"{len(gate.right[worst])} images with {len(wide)} of {len(quantiser.products)} "
            f"products in fp32; --largest-loss is {largest_loss}"
        )
    if (count := quantised_products(found, kind)) != len(quantiser.products) - len(wide):
        raise VerificationError(f"{path.name} was not written: only {count} products are in {kind}")
    save_sealed(found, path, metadata_of(found))
    losses = {task.name: points for task, points in zip(tasks, gate.points, strict=True)}
    return {
        "products": len(quantiser.products),
        "wide": wide,
        "loss_points": loss,
        **({"losses": losses} if any(losses) else {}),
        "measure": measure,
        "judged_images": sum(map(len, gate.right)),
        "calibration_images": len(ranges),
    }


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
