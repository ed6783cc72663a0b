"""Export a checkpoint as one verified ONNX file: `python export/to_onnx.py CHECKPOINT --output F`.

Inputs and outputs: image (B, 3, S, S) to logits (B, K), mask (B, G, G) int32 and embedding (B, E).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from adavipro_fast import cli
from adavipro_fast.artifact.description import OpenFor
from adavipro_fast.artifact.open_tasks import OpenArtifact
from adavipro_fast.artifact.torch import TorchArtifact, encoder_of
from adavipro_fast.errors import VerificationError
from adavipro_fast.export.calibrate import judges_of, quantise_file
from adavipro_fast.export.fold import Plain, deployed
from adavipro_fast.export.graph import check_dtypes, write
from adavipro_fast.export.open_tasks import OpenTasks, folded_task
from adavipro_fast.export.patches import folding_obstacle
from adavipro_fast.export.resize import AnySize, AnySizeTasks, any_size_obstacle
from adavipro_fast.export.tasks import Tasks, tasks_obstacle
from adavipro_fast.export.verify import (
    Comparison,
    Unprompted,
    compare,
    compare_sizes,
    compare_tasks,
    opened,
    sample_batches,
)
from adavipro_fast.files.checkpoint import FORMAT, Checkpoint, load_checkpoint
from adavipro_fast.files.hub import run_name
from adavipro_fast.files.task import TaskFile
from adavipro_fast.files.whole import file_sha256, named_when_whole
from adavipro_fast.method.config import DTYPES, PROMPTED, QUANTISED, ExportPrecision, Input
from adavipro_fast.method.model import AdaViPro

Graph = Literal["folded", "pixel"]
# Attention is one node since opset 23, which TensorRT builds in half precision only.
OPSETS = {"fp32": 20, "fp16": 23, "bf16": 23, "int8": 20, "fp8": 20}


@dataclass(frozen=True)
class OnnxConfig:
    """Export a checkpoint with its frozen encoder as ONNX."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """checkpoint.safetensors"""
    output: Path
    """file to write, F.onnx"""
    more: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """checkpoints of further tasks for the same encoder; the graph then takes each image's task"""
    task: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """name of a task; repeatable, in the checkpoints' order (default: their folders' names)"""
    tasks: Literal["baked", "open"] = "baked"
    """tasks in the file, or as inputs: then they are data that export/to_task.py writes"""
    graph: Graph | None = None
    """prompt folded into the tokens, or on the pixels (default: folded for ViTs)"""
    precision: ExportPrecision = "fp32"
    """of the encoder; the mask path stays in fp32. int8 and fp8 take their ranges from --images"""
    largest_loss: float = 0.5
    """with int8 and fp8: accuracy that may be lost on --images, points; else there is no file"""
    input: Input = "float32"
    """normalised floats, RGB bytes 0-255, or bytes of any height and width, resized in the graph"""
    baseline: bool = False
    """the frozen encoder without a prompt, in the same form"""
    opset: int | None = None
    """ONNX operator set (default: 20 for fp32, 23 for half precision)"""
    images: cli.Images = None
    model: cli.Model = None
    pretrained: cli.Pretrained = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All checkpoints."""
        return (self.checkpoint, *self.more)

    @property
    def alone(self) -> bool:
        """Whether the file holds one task without a name."""
        return self.tasks == "baked" and not self.more


def main() -> None:
    """Parse, export, print."""
    cli.main(OnnxConfig, command, summary)


def command(config: OnnxConfig) -> dict[str, Any]:
    """Export, verify, and only then give the file its name.

    Raises:
        ValueError: encoder, graph, precision or opset do not go together.
        VerificationError: the exported graph computes something else.
    """
    opset = config.opset or OPSETS[config.precision]
    if not OPSETS[config.precision] <= opset <= OPSETS["fp16"]:
        raise ValueError(
            f"opset {opset} cannot hold this graph in {config.precision}; "
            f"use {OPSETS[config.precision]} to {OPSETS['fp16']}"
        )
    check_quantisable(config)
    if config.output.suffix != ".onnx":
        raise ValueError(f"output {config.output} does not end in .onnx; name a file F.onnx")
    checkpoints = [load_checkpoint(path) for path in config.paths]
    encoder = encoder_of(checkpoints[0], config.model, config.pretrained)
    encoder = encoder.with_(precision="fp32")
    models = [checkpoint.model(encoder) for checkpoint in checkpoints]
    names = task_names(config)
    graph = config.graph or _default_graph(models[0])
    module = build(models, config, graph)
    whole = resizing(module, models[0], config)
    metadata = describe(checkpoints[0], config, graph)
    if config.tasks == "open":
        metadata["open_for"] = asdict(open_for(checkpoints))
    elif names:
        assert isinstance(module, Tasks)
        metadata["tasks"] = [
            describe_task(*task) | {"bytes": module.bytes_of(number)}
            for number, task in enumerate(zip(names, checkpoints, config.paths, strict=True))
        ]
    cpu = torch.device("cpu")
    references = [TorchArtifact.of(*pair, cpu) for pair in zip(checkpoints, models, strict=True)]
    judges = None
    if config.precision in QUANTISED:
        assert config.images is not None
        about = checkpoints[0]
        judges = judges_of(config.images, about.class_names, about.preprocess)
    with named_when_whole(config.output) as path:
        side = checkpoints[0].preprocess.size
        nodes = write(whole, path, side=side, opset=opset, metadata=metadata)
        sizes = verify_sizes(references[0], path, config)
        quantised = {}
        if config.precision == "int8" or config.precision == "fp8":
            assert judges is not None
            quantised = quantise_file(path, config.precision, judges, config.largest_loss)
        check_dtypes(path, config.precision)
        tasks = []
        if config.tasks == "open":
            tasks = [folded_task(*part) for part in zip(names, checkpoints, models, strict=True)]
        verdict = verify(references, names, path, config, tasks)
        size = sum(file.stat().st_size for file in path.parent.iterdir())
    return {
        "path": str(config.output),
        "graph": graph,
        "precision": config.precision,
        "input": config.input,
        "opset": opset,
        "baseline": metadata["baseline"],
        **({"tasks": names} if names else {}),
        **quantised,
        **verdict,
        **sizes,
        "nodes": nodes,
        "bytes": size,
    }


def check_quantisable(config: OnnxConfig) -> None:
    """Raise ValueError where int8 and fp8 are not offered, or their options mean nothing."""
    if config.precision not in QUANTISED:
        return
    if not config.alone:
        raise ValueError(
            f"{config.precision} is not offered with several tasks; name one checkpoint, and leave "
            "--tasks open out"
        )
    if not 0 <= config.largest_loss <= 100:
        raise ValueError(f"largest_loss is {config.largest_loss}; 0 to 100 points work")
    if config.images is None:
        raise ValueError(
            f"{config.precision} takes its ranges from your images; name a folder with --images"
        )


def task_names(config: OnnxConfig) -> list[str]:
    """Name the tasks of several checkpoints; one checkpoint's needs no name.

    Raises:
        ValueError: two have one name, or there are other names than checkpoints.
    """
    if config.alone:
        if config.task:
            raise ValueError("--task names one of several checkpoints; leave it out for one")
        return []
    if config.baseline:
        raise ValueError("--baseline is the encoder of one checkpoint; name one")
    names = list(config.task) or [run_name(path) for path in config.paths]
    if len(names) != len(config.paths):
        raise ValueError(
            f"{len(config.paths)} checkpoints, but {len(names)} times --task; name each"
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or "" in names:
        raise ValueError(f"task {(twice or [''])[0]!r} stands twice or is empty; give --task names")
    return names


def build(models: Sequence[AdaViPro], config: OnnxConfig, graph: Graph) -> Plain:
    """Build the module that is exported.

    Raises:
        ValueError: the encoder cannot be folded, or the models cannot share a graph.
    """
    folded, dtype, uint8 = graph == "folded", DTYPES[config.precision], config.input != "float32"
    if config.alone:
        return deployed(
            models[0], folded=folded, dtype=dtype, uint8=uint8, baseline=config.baseline
        )
    if obstacle := tasks_obstacle(models):
        raise ValueError(f"the checkpoints cannot share one graph: {obstacle}; export each alone")
    if config.tasks == "baked":
        return Tasks(models, folded=folded, dtype=dtype, uint8=uint8)
    if not folded:
        raise ValueError("--tasks open has its prompts as tokens; use --graph folded")
    prompted = [model for model in models if model.prompt.generator is not None]
    return OpenTasks((prompted or models)[0], dtype=dtype, uint8=uint8)


def resizing(module: Plain, model: AdaViPro, config: OnnxConfig) -> Plain | AnySize:
    """Put a resize before a module, where images of any size are asked for.

    Raises:
        ValueError: the encoder's preprocessing cannot be in the graph.
    """
    if config.input != "any":
        return module
    if config.tasks == "open":
        raise ValueError("--tasks open takes resized images; use --input uint8")
    if obstacle := any_size_obstacle(model.preprocess):
        raise ValueError(f"--input any is not offered here: {obstacle}; use --input uint8")
    kind = AnySize if config.alone else AnySizeTasks
    preprocess = model.preprocess
    if config.baseline:
        preprocess = replace(preprocess, margin=0)
    return kind(module, preprocess)


def open_for(checkpoints: Sequence[Checkpoint]) -> OpenFor:
    """Say which tasks a graph takes that is made of these.

    Raises:
        ValueError: they decide on different edges.
    """
    configs = [c.config for c in checkpoints if c.config.method == "adavipro"]
    kinds = {(config.edge, config.edge_padding) for config in configs}
    if len(kinds) > 1:
        raise ValueError("--tasks open forms edges of one kind; the checkpoints have several")
    first = (configs or [checkpoints[0].config])[0]
    edge = first.edge if configs else None
    return OpenFor(checkpoints[0].encoder.sha256, edge, first.edge_padding)


def describe_task(name: str, checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    """Collect what the file says about one of its tasks."""
    return {
        "name": name,
        "class_names": checkpoint.class_names,
        "config": checkpoint.config.stored(),
        "calibration": asdict(checkpoint.calibration),
        "checkpoint_sha256": file_sha256(path),
    }


def _default_graph(model: AdaViPro) -> Graph:
    return "pixel" if folding_obstacle(model.encoder.visual) else "folded"


def summary(result: dict[str, Any]) -> str:
    """Say what lies where, and how far it is from PyTorch."""
    path, error = result["path"], result["max_abs_error"]
    checked = (
        f"verified: embeddings within {error:.1e} of PyTorch"
        if result["verified"]
        else (f"not verified: {result['reason']}")
    )
    quantised = ""
    if result["precision"] in QUANTISED:
        quantised = (
            f"{result['loss_points']:.1f} points of {result['measure']} lost on "
            f"{result['judged_images']} images, {len(result['wide'])} of {result['products']} "
            "products left in fp32\n"
        )
    return (
        f"{path}: {result['graph']}, {result['precision']}, {result['input']} input, "
        f"{result['bytes'] / 1e6:.1f} MB\n{quantised}{checked}\n"
        f"measure:  python -m adavipro_fast.evaluate {path}\n"
        f"classify: python -m adavipro_fast.predict {path} IMAGE"
    )


def describe(checkpoint: Checkpoint, config: OnnxConfig, graph: Graph) -> dict[str, Any]:
    """Collect what the file says about itself."""
    preprocess, calibration = checkpoint.preprocess, checkpoint.calibration
    if config.baseline:
        # A margin is the prompt's.
        preprocess = replace(preprocess, margin=0)
    return {
        "format": FORMAT,
        "class_names": checkpoint.class_names,
        "preprocess": preprocess.stored(),
        "config": checkpoint.config.stored(),
        "encoder": checkpoint.encoder.stored(),
        # The prompt's, whose logits a baseline does not have.
        "calibration": asdict(calibration.without if config.baseline else calibration),
        "templates": checkpoint.templates,
        "checkpoint_sha256": file_sha256(config.checkpoint),
        "graph": graph,
        "precision": config.precision,
        "input": config.input,
        "baseline": config.baseline or (config.alone and checkpoint.config.method not in PROMPTED),
    }


def verify_sizes(reference: TorchArtifact, path: Path, config: OnnxConfig) -> dict[str, Any]:
    """Compare a graph that resizes with our preprocessing, before its products are rounded.

    Raises:
        VerificationError: pixels are not resized alike.
    """
    candidate = opened(path) if config.input == "any" else None
    if candidate is None:
        return {}
    expected = Unprompted(reference.model) if config.baseline else reference
    return {"any_size_cosine": compare_sizes(expected, candidate, config.images)}


def verify(
    references: Sequence[TorchArtifact],
    names: Sequence[str],
    path: Path,
    config: OnnxConfig,
    tasks: Sequence[TaskFile] = (),
) -> dict[str, Any]:
    """Compare the file with PyTorch in fp32, where a backend at hand can run it.

    Args:
        references: the checkpoint of each task.
        names: of the tasks; none where there is one.
        path: of the file.
        config: what was asked for.
        tasks: that are added to a file whose tasks are data.

    Raises:
        VerificationError: it computes something else.
    """
    candidate = opened(path)
    if candidate is None:
        return {
            "verified": False,
            "reason": "no ONNX Runtime here runs bf16; structure and dtypes were checked",
            **dict.fromkeys(Comparison.__dataclass_fields__),
        }
    batches = sample_batches(references[0].about.preprocess, config.images)
    if config.tasks == "open":
        holder = OpenArtifact(candidate)
        for task in tasks:
            holder.add(task)
        comparison = compare_tasks(references, names, holder, batches)
    elif names:
        comparison = compare_tasks(references, names, candidate, batches)
    else:
        model = references[0].model
        expected = Unprompted(model) if config.baseline else references[0]
        comparison = compare(model, expected, candidate, batches)
    if complaint := comparison.complaint(config.precision):
        raise VerificationError(f"{path.name} was not written: {complaint}")
    figures: dict[str, Any] = asdict(comparison)
    if candidate.about.baseline:
        figures |= {"mask_agreement": None, "mask_ties": None}
    return {"verified": True, "reason": "", **figures}


if __name__ == "__main__":
    main()
