"""Export checkpoints with their encoder as one ONNX file, verified before it is renamed."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import tyro
from torch import Tensor

from adavipro_fast import cli
from adavipro_fast.artifact.onnx import OnnxArtifact
from adavipro_fast.artifact.open_tasks import OpenArtifact
from adavipro_fast.artifact.torch import TorchArtifact, encoder_of
from adavipro_fast.errors import VerificationError
from adavipro_fast.export.comparison import (
    Comparison,
    Unprompted,
    compare,
    compare_sizes,
    compare_tasks,
    opened,
    sample_batches,
)
from adavipro_fast.export.gate import QuantisationImages, quantisation_images, quantise_file
from adavipro_fast.export.graph import Form, Graph, GraphKind, deployed, usual_form
from adavipro_fast.export.onnx_file import check_dtypes, write
from adavipro_fast.export.open_tasks import folded_task
from adavipro_fast.export.tasks import bytes_of
from adavipro_fast.files.about import Description, OpenFor, Task
from adavipro_fast.files.checkpoint import Checkpoint, load_checkpoint
from adavipro_fast.files.hub import run_name
from adavipro_fast.files.task import TaskFile, stacked
from adavipro_fast.files.whole import file_sha256, named_when_whole
from adavipro_fast.method.config import QUANTISED, ExportPrecision, Input
from adavipro_fast.method.model import AdaViPro

# Opset 23 has attention as one node, which TensorRT supports only in half precision.
OPSETS = {"fp32": 20, "fp16": 23, "bf16": 23, "int8": 20, "fp8": 20}


@dataclass(frozen=True)
class OnnxConfig:
    """Export checkpoints with their frozen encoder as one verified ONNX file."""

    help_first: ClassVar[tuple[str, ...]] = (
        "output",
        "input",
        "precision",
        "images",
        "tasks",
        "task",
        "baseline",
    )

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """checkpoint.safetensors"""
    output: Path
    """output file, F.onnx"""
    more: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """checkpoints of further tasks with the same encoder; the graph gets a second input, `task`"""
    task: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """name of a task; repeatable, in the checkpoints' order (default: their folders' names)"""
    tasks: Literal["baked", "open"] = "baked"
    """baked: tasks are part of the file; open: tasks are .task files, added while it runs"""
    graph: GraphKind | None = None
    """folded: add the prompt to the patch tokens; pixel: to the pixels (default: folded for
    ViTs)"""
    precision: ExportPrecision = "fp32"
    """precision of the encoder; the mask generator stays in fp32. int8 and fp8 need --images"""
    largest_loss: float = 0.5
    """with int8 and fp8: largest loss of accuracy of a task on its --images, points; else no file
    is written"""
    input: Input = "float32"
    """float32: normalised floats; uint8: RGB bytes; any: RGB bytes of any size, resized in the
    graph"""
    baseline: bool = False
    """export the frozen encoder without a prompt"""
    opset: int | None = None
    """ONNX operator set (default: 20 for fp32, 23 for half precision)"""
    images: cli.Images = ()
    model: cli.Model = None
    pretrained: cli.Pretrained = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All checkpoints."""
        return (self.checkpoint, *self.more)

    @property
    def alone(self) -> bool:
        """Whether the file contains a single, unnamed task."""
        return self.tasks == "baked" and not self.more


class Source(NamedTuple):
    """A checkpoint to export."""

    checkpoint: Checkpoint
    model: AdaViPro
    name: str = ""
    """of its task; empty in a file of one task"""
    sha256: str = ""
    """hash of the checkpoint's file"""


def export(config: OnnxConfig) -> dict[str, Any]:
    """Export, verify, and only then rename the file to its final name.

    Raises:
        ValueError: encoder, graph, precision and opset do not fit together.
        VerificationError: the exported graph's output differs from PyTorch's.
    """
    opset = config.opset or OPSETS[config.precision]
    if not OPSETS[config.precision] <= opset <= OPSETS["fp16"]:
        raise ValueError(
            f"opset {opset} cannot hold this graph in {config.precision}; "
            f"use {OPSETS[config.precision]} to {OPSETS['fp16']}"
        )
    check_quantisable(config)
    if config.output.suffix != ".onnx":
        raise ValueError(f"output {config.output} must end in .onnx")
    checkpoints = [load_checkpoint(path) for path in config.paths]
    encoder = encoder_of(checkpoints[0], config.model, config.pretrained)
    encoder = encoder.with_(precision="fp32")
    models = [checkpoint.model(encoder) for checkpoint in checkpoints]
    names = task_names(config)
    digests = map(file_sha256, config.paths)
    sources = [
        Source(*source) for source in zip(checkpoints, models, names or [""], digests, strict=True)
    ]
    form = Form(
        config.graph or usual_form(models[0]),
        config.precision,
        config.input,
        config.baseline,
        "alone" if config.alone else config.tasks,
    )
    # Read first, so that errors in folders are reported before the export.
    images = images_of_tasks(config, sources) if config.precision in QUANTISED else []
    with named_when_whole(config.output) as path:
        about, nodes = write_graph(path, sources, form, opset)
        trial = Trial(path, sources, form, config.images)
        sizes = trial.sizes()
        quantised = {}
        if config.precision == "int8" or config.precision == "fp8":
            tables = trial.tables() if config.tasks == "open" else {}
            quantised = quantise_file(path, config.precision, images, config.largest_loss, tables)
        check_dtypes(path, config.precision)
        verdict = trial.verdict()
        size = sum(file.stat().st_size for file in path.parent.iterdir())
    return {
        "path": str(config.output),
        "graph": form.graph,
        "precision": config.precision,
        "input": config.input,
        "opset": opset,
        "baseline": about.baseline,
        **({"tasks": names} if names else {}),
        **quantised,
        **verdict,
        **sizes,
        "nodes": nodes,
        "bytes": size,
    }


def check_quantisable(config: OnnxConfig) -> None:
    """Raise ValueError if the options of int8 and fp8 are invalid."""
    if config.precision not in QUANTISED:
        return
    if not 0 <= config.largest_loss <= 100:
        raise ValueError(f"largest_loss is {config.largest_loss}; use 0 to 100 points")
    if not config.images:
        raise ValueError(
            f"{config.precision} needs images for its calibration; add --images FOLDER"
        )
    if len(config.images) not in (1, len(config.paths)):
        raise ValueError(
            f"{len(config.paths)} checkpoints, but {len(config.images)} folders of --images; give "
            "one folder for all, or one for each in the checkpoints' order"
        )


def images_of_tasks(config: OnnxConfig, sources: Sequence[Source]) -> list[QuantisationImages]:
    """Read each task's images for quantisation; raises the errors of `quantisation_images`."""
    folders = config.images * (len(sources) if len(config.images) == 1 else 1)
    return [
        quantisation_images(
            folder,
            source.checkpoint.class_names,
            source.checkpoint.preprocess,
            source.name,
            tasks=len(sources),
        )
        for folder, source in zip(folders, sources, strict=True)
    ]


def task_names(config: OnnxConfig) -> list[str]:
    """Return the tasks' names; empty for a single, unnamed task.

    Raises:
        ValueError: names are repeated or empty, or their number differs from the checkpoints'.
    """
    if config.alone:
        if config.task:
            raise ValueError("--task needs several checkpoints; leave it out for one")
        return []
    if config.baseline:
        raise ValueError("--baseline needs exactly one checkpoint")
    names = list(config.task) or [run_name(path) for path in config.paths]
    if len(names) != len(config.paths):
        raise ValueError(
            f"got {len(config.paths)} checkpoints and {len(names)} --task; give one per checkpoint"
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or "" in names:
        raise ValueError(
            f"task name {(twice or [''])[0]!r} is repeated or empty; set names with --task"
        )
    return names


def write_graph(
    path: Path, sources: Sequence[Source], form: Form, opset: int | None = None
) -> tuple[Description, int]:
    """Write the sources as one file, without verifying it.

    Args:
        path: of the file.
        sources: one per task.
        form: of the graph.
        opset: ONNX operator set (default: the precision's).

    Returns:
        The file's description, and its number of nodes.

    Raises:
        ValueError: encoder, form and sources do not fit together.
    """
    graph = deployed([source.model for source in sources], form)
    about = describe(sources, form, graph)
    opset = opset or OPSETS[form.precision]
    return about, write(graph, path, opset=opset, metadata=about.stored())


def describe(sources: Sequence[Source], form: Form, graph: Graph) -> Description:
    """Return the file's description."""
    first = sources[0]
    about = Description.of_checkpoint(
        first.checkpoint,
        form.precision,
        form.input,
        baseline=form.baseline,
        several=form.tasks != "alone",
    )
    about = replace(about, graph=form.graph, checkpoint_sha256=first.sha256)
    if form.tasks == "open":
        return replace(about, open_for=open_for([source.checkpoint for source in sources]))
    if form.tasks == "baked":
        tasks = (Task.of(s.name, s.checkpoint, s.sha256, bytes_of(graph, s.model)) for s in sources)
        return replace(about, tasks=tuple(tasks))
    return about


def open_for(checkpoints: Sequence[Checkpoint]) -> OpenFor:
    """Return which tasks a graph with tasks as inputs accepts, given example checkpoints.

    Raises:
        ValueError: the checkpoints use different edge detectors.
    """
    configs = [c.config for c in checkpoints if c.config.method == "adavipro"]
    kinds = {(config.edge, config.edge_padding) for config in configs}
    if len(kinds) > 1:
        raise ValueError("--tasks open needs checkpoints with the same edge detector")
    first = (configs or [checkpoints[0].config])[0]
    edge = first.edge if configs else None
    return OpenFor(checkpoints[0].encoder.sha256, edge, first.edge_padding)


@dataclass(frozen=True)
class Trial:
    """Verifies a file that was just written against its checkpoints."""

    path: Path
    sources: Sequence[Source]
    form: Form
    images: Sequence[Path] = ()
    """folders of images to compare on; if empty, the demo's images are used"""

    @property
    def references(self) -> list[TorchArtifact]:
        """The PyTorch model of each task."""
        cpu = torch.device("cpu")
        return [TorchArtifact.of(source.checkpoint, source.model, cpu) for source in self.sources]

    @cached_property
    def folded(self) -> list[TaskFile]:
        """The tables of each task."""
        return [folded_task(s.name, s.checkpoint, s.model) for s in self.sources]

    def holder(self, candidate: OnnxArtifact) -> OpenArtifact:
        """Add the tasks to a file with tasks as data."""
        holder = OpenArtifact(candidate)
        for task in self.folded:
            holder.add(task)
        return holder

    def tables(self) -> dict[str, Any]:
        """Return the tables of all tasks, the inputs of a graph with tasks as data."""
        tables = stacked(self.folded, self.form.dtype)
        return {name: table.detach().numpy() for name, table in tables.items()}

    def sizes(self) -> dict[str, Any]:
        """Compare a graph that resizes with our preprocessing, before it is quantised.

        Raises:
            VerificationError: the graph resizes differently.
        """
        candidate = opened(self.path) if self.form.input == "any" else None
        if candidate is None:
            return {}
        first = self.sources[0]
        reference = Unprompted(first.model) if self.form.baseline else self.references[0]
        run = partial(candidate.run, tasks=[0] if self.form.tasks == "baked" else ())
        if self.form.tasks == "open":
            run = partial(self.holder(candidate).run, tasks=first.name)
        preprocess = candidate.about.preprocess

        def on_device(image: Tensor) -> dict[str, Tensor]:
            return run(image.to(candidate.device))

        return {"any_size_cosine": compare_sizes(reference, on_device, preprocess, self.images)}

    def verdict(self) -> dict[str, Any]:
        """Compare the file with PyTorch in fp32, if it can run here.

        Raises:
            VerificationError: the outputs differ.
        """
        candidate = opened(self.path)
        if candidate is None:
            return {
                "verified": False,
                "reason": "ONNX Runtime cannot run bf16 here; only structure and dtypes were "
                "checked",
                **dict.fromkeys(Comparison.__dataclass_fields__),
            }
        references, names = self.references, [source.name for source in self.sources]
        batches = sample_batches(references[0].about.preprocess, self.images)
        if self.form.tasks == "alone":
            model = references[0].model
            reference = Unprompted(model) if self.form.baseline else references[0]
            comparison = compare(model, reference, candidate, batches)
        else:
            several = self.holder(candidate) if self.form.tasks == "open" else candidate
            comparison = compare_tasks(references, names, several, batches)
        if complaint := comparison.complaint(self.form.precision):
            raise VerificationError(f"{self.path.name} was not written: {complaint}")
        figures: dict[str, Any] = asdict(comparison)
        if candidate.about.baseline:
            figures |= {"mask_agreement": None, "mask_ties": None}
        return {"verified": True, "reason": "", **figures}
