"""Build an engine from a checkpoint or .onnx: `python export/to_tensorrt.py SOURCE --output F`.

Networks are strongly typed. TensorRT builds for this machine's GPU; TensorRT-RTX builds for any
listed GPU, even on a machine without one. Metadata is written to `F.engine.json`.
"""

import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro

from adavipro_fast import cli
from adavipro_fast.artifact.tensorrt import EngineArtifact, compute_capability, runtime_module
from adavipro_fast.artifact.torch import TorchArtifact
from adavipro_fast.errors import VerificationError
from adavipro_fast.export.comparison import compare, sample_batches
from adavipro_fast.export.network import (
    WIDE_PRODUCTS,
    Network,
    Ranges,
    prove_precision,
    prove_quantised,
)
from adavipro_fast.export.onnx_export import OnnxConfig, export
from adavipro_fast.files.about import Description
from adavipro_fast.files.sealed import describe_onnx, write_sidecar
from adavipro_fast.files.whole import file_sha256, named_when_whole
from adavipro_fast.method.config import QUANTISED, ExportPrecision, Input

Runtime = Literal["auto", "tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True)
class TensorRtConfig:
    """Build a TensorRT or TensorRT-RTX engine from a checkpoint or ONNX file."""

    help_first: ClassVar[tuple[str, ...]] = (
        "output",
        "runtime",
        "compute_capability",
        "precision",
        "input",
        "batch",
        "images",
    )

    source: Annotated[Path, tyro.conf.Positional]
    """checkpoint.safetensors or .onnx"""
    output: Path
    """output file, F.engine; F.engine.json is written beside it"""
    runtime: Runtime = "auto"
    """tensorrt builds for the GPU of this machine, tensorrt-rtx for any; auto: tensorrt if there
    is a GPU"""
    compute_capability: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """GPU to build for with tensorrt-rtx, such as 8.6 (RTX 3090); repeatable (default: this GPU)"""
    precision: ExportPrecision | None = None
    """precision of a checkpoint's encoder (default: fp16); an .onnx file keeps its own"""
    batch: str = "1,16,256"
    """smallest, most frequent and largest batch: MIN,OPT,MAX"""
    image_size: str = "32,512,1024"
    """with --input any: smallest, most frequent and largest height and width, pixels"""
    tasks: str = "1,8,64"
    """with tasks as data: smallest, most frequent and largest number of tasks in a call"""
    classes: str = "1,16,1024"
    """with tasks as data: the same for the number of classes of the largest task in a call"""
    input: Input = "float32"
    """for a checkpoint: float32 (normalised), uint8 (RGB bytes) or any (RGB bytes of any size)"""
    baseline: bool = False
    """for a checkpoint: build the frozen encoder without a prompt"""
    builder_level: int = 3
    """optimisation level: 0 builds fastest, 5 searches longest"""
    timing_cache: Path = field(default_factory=lambda: Path.home() / ".cache" / "adavipro_fast")
    """folder of TensorRT's timing caches, one per version and GPU"""
    images: cli.Images = ()
    model: cli.Model = None
    pretrained: cli.Pretrained = None


def main() -> None:
    """Parse, build, print."""
    cli.main(TensorRtConfig, command, summary)


def command(config: TensorRtConfig) -> dict[str, Any]:
    """Build, check the precision, verify if a GPU can run it, and only then rename the files.

    Raises:
        ImportError: TensorRT is not installed.
        ValueError: source, precision, batch or compute capability is invalid.
        VerificationError: the engine's precision or output is wrong.
    """
    if config.output.suffix != ".engine":
        raise ValueError(f"output {config.output} must end in .engine")
    ranges = ranges_of(config)
    runtime = choose_runtime(config.runtime)
    trt = runtime_module(runtime)
    capabilities = choose_capabilities(trt, runtime, config.compute_capability)
    with named_when_whole(config.output) as path:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            source = onnx_source(config, Path(folder))
            about = describe_onnx(source)
            began = time.perf_counter()
            network = Network(trt, runtime, source)
            plan = network.build(
                ranges,
                capabilities,
                level=config.builder_level,
                timings=config.timing_cache,
            )
            path.write_bytes(plan)
            seconds = time.perf_counter() - began
            types = network.types()
            if about.precision in QUANTISED:
                prove_quantised(types, about.precision, network.dequantised)
            else:
                prove_precision(types["products"], about.precision, wide_products(about))
            sidecar = about.stored() | {
                "onnx_sha256": file_sha256(source),
                "runtime": runtime,
                "runtime_version": trt.__version__,
                "compute_capabilities": capabilities,
                "tensor_dtypes": dict(types["tensors"]),
                "batch": list(ranges["batch"]),
                **facts_of(about, ranges),
                "engine_sha256": file_sha256(path),
                "verified": False,
                "reason": "",
            }
        write_sidecar(path, sidecar)
        sidecar |= verify(path, config, capabilities)
        write_sidecar(path, sidecar)
        size = path.stat().st_size
    rest = {key: value for key, value in sidecar.items() if key != "class_names"}
    return {**rest, "path": str(config.output), "build_seconds": seconds, "bytes": size}


def summary(result: dict[str, Any]) -> str:
    """Format the engine's properties, and whether it was verified."""
    checked = "verified on this GPU" if result["verified"] else f"not run: {result['reason']}"
    return (
        f"{result['path']}: {result['runtime']} {result['runtime_version']}, "
        f"{result['precision']}, for compute capability "
        f"{', '.join(result['compute_capabilities'])}, {result['bytes'] / 1e6:.1f} MB, built in "
        f"{result['build_seconds']:.0f} s\n{checked}"
    )


def ranges_of(config: TensorRtConfig) -> Ranges:
    """Return the sizes of the dynamic axes, by their names in the graph."""
    sides = parse_range("image_size", config.image_size)
    return {
        "batch": parse_range("batch", config.batch),
        "height": sides,
        "width": sides,
        "tasks": parse_range("tasks", config.tasks),
        "classes": parse_range("classes", config.classes),
    }


def parse_range(name: str, text: str) -> tuple[int, int, int]:
    """Parse MIN,OPT,MAX."""
    try:
        smallest, usual, largest = (int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name} {text!r} is not MIN,OPT,MAX, such as 1,16,256") from error
    if not 1 <= smallest <= usual <= largest:
        raise ValueError(f"{name} {text!r} is out of order; use 1 <= MIN <= OPT <= MAX")
    return smallest, usual, largest


def facts_of(about: Description, ranges: Ranges) -> dict[str, Any]:
    """Return the sidecar's entries about dynamic axes other than the batch."""
    facts: dict[str, Any] = {}
    if about.input == "any":
        largest = 3 * ranges["batch"][2] * ranges["height"][2] * ranges["width"][2]
        # The engine stores the images as bytes, and as floats while it resizes them.
        facts["image_size"] = list(ranges["height"])
        facts["largest_images_mib"] = round(largest * (1 + 4) / 2**20)
    if about.open_for is not None:
        facts["tasks_in_call"] = list(ranges["tasks"])
        facts["classes_in_call"] = list(ranges["classes"])
    return facts


def wide_products(about: Description) -> int:
    """Count the products that may be in fp32: those of the mask, the last projection, the scores.

    A graph that resizes has two more.
    """
    resize = 2 * (about.input == "any")
    if not about.tasks:
        return WIDE_PRODUCTS + resize
    kinds = {(task.config.edge, task.config.edge_padding) for task in about.tasks}
    # Each edge detector has up to two filters and the kernels; there are two kinds of scores.
    return 3 * len(kinds) + 4 + resize


def choose_runtime(asked: Runtime) -> str:
    """Resolve auto: TensorRT if there is a GPU and TensorRT is installed, else TensorRT-RTX.

    Raises:
        ValueError: TensorRT is asked for, and there is no GPU.
    """
    if asked == "tensorrt" and compute_capability() is None:
        raise ValueError(
            "tensorrt builds for the GPU of this machine, and PyTorch finds no CUDA device; "
            "use --runtime tensorrt-rtx with --compute-capability"
        )
    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        try:
            runtime_module("tensorrt")
        except ImportError:
            return "tensorrt-rtx"
        return "tensorrt"
    return "tensorrt-rtx"


def choose_capabilities(trt: ModuleType, runtime: str, asked: tuple[str, ...]) -> list[str]:
    """Return the compute capabilities to build for.

    Raises:
        ValueError: none is given and there is no GPU, or the runtime does not support one.
    """
    here = compute_capability()
    if runtime == "tensorrt":
        if set(asked) - {here}:
            raise ValueError(
                f"tensorrt builds for this GPU ({here}) only; leave --compute-capability out or "
                "use --runtime tensorrt-rtx"
            )
        return [str(here)]
    if not asked and here is None:
        raise ValueError(
            "this machine has no GPU; choose one to build for, such as --compute-capability 8.6"
        )
    known = {
        f"{name[2:-1]}.{name[-1]}" for name in trt.ComputeCapability.__members__ if name[:2] == "SM"
    }
    capabilities = list(dict.fromkeys(asked)) or [str(here)]
    for capability in capabilities:
        if capability not in known:
            raise ValueError(
                f"compute capability {capability!r} is unknown to {runtime} {trt.__version__}; "
                f"use {', '.join(sorted(known, key=float))}"
            )
    return capabilities


def onnx_source(config: TensorRtConfig, folder: Path) -> Path:
    """Return the .onnx file to build from; export and verify a checkpoint first."""
    if config.source.suffix == ".onnx":
        about = describe_onnx(config.source)
        if config.precision not in (None, about.precision):
            raise ValueError(
                f"{config.source} is {about.precision}, but --precision is {config.precision}; "
                f"export it again with --precision {config.precision}"
            )
        return config.source
    path = folder / "source.onnx"
    export(
        OnnxConfig(
            checkpoint=config.source,
            output=path,
            precision=config.precision or "fp16",
            input=config.input,
            baseline=config.baseline,
            images=config.images,
            model=config.model,
            pretrained=config.pretrained,
        )
    )
    return path


def verify(path: Path, config: TensorRtConfig, capabilities: list[str]) -> dict[str, Any]:
    """Compare the engine with its checkpoint, if there is a suitable GPU.

    Raises:
        VerificationError: the outputs differ.
    """
    here = compute_capability()
    if here not in capabilities:
        place = "no CUDA device is here" if here is None else f"this GPU is {here}"
        return {"verified": False, "reason": f"{place}: the engine was built but could not be run"}
    if config.source.suffix == ".onnx" or config.baseline:
        reason = "export/verify.py CHECKPOINT ENGINE compares it with its checkpoint"
        return {"verified": False, "reason": reason}
    reference = TorchArtifact.open(
        config.source, model=config.model, pretrained=config.pretrained, device="cpu"
    )
    candidate = EngineArtifact.open(path)
    batches = sample_batches(reference.about.preprocess, config.images)
    comparison = compare(reference.model, reference, candidate, batches)
    if complaint := comparison.complaint(candidate.about.precision):
        raise VerificationError(f"the engine does not match its checkpoint: {complaint}")
    return {"verified": True, "reason": "", **asdict(comparison)}


if __name__ == "__main__":
    main()
