"""Build an engine from a checkpoint or .onnx: `python export/to_tensorrt.py SOURCE --output F`.

One strongly typed path for TensorRT (on the GPU it is built for) and TensorRT-RTX (for any listed
GPU, also on a machine without one). What an engine cannot hold lies in `F.engine.json`.
"""

import hashlib
import json
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import onnx
import torch
import tyro
from tqdm import tqdm

from adavipro_fast import cli
from adavipro_fast.artifact import describe_onnx, open_prompt
from adavipro_fast.checkpoint import FORMAT, write_whole
from adavipro_fast.clip import Precision
from adavipro_fast.description import Description, file_sha256
from adavipro_fast.engine import (
    EngineArtifact,
    compute_capability,
    runtime_module,
    sidecar_path,
    sidecar_sha256,
)
from adavipro_fast.export import to_onnx
from adavipro_fast.export.verify import compare, sample_batches

Runtime = Literal["auto", "tensorrt", "tensorrt-rtx"]
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# TensorRT's names of the types.
TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
PRODUCTS = ("MATRIX_MULTIPLY", "CONVOLUTION", "ATTENTION", "ATTENTION_INPUT")
# The mask path's convolutions, the last projection and the logits stay in fp32.
WIDE_PRODUCTS = 5


@dataclass(frozen=True)
class TensorRtConfig:
    """Build a TensorRT or TensorRT-RTX engine."""

    source: Annotated[Path, tyro.conf.Positional]
    """checkpoint.safetensors or .onnx"""
    output: Path
    """file to write, F.engine; F.engine.json lies beside it"""
    runtime: Runtime = "auto"
    """tensorrt builds on the GPU it is for; tensorrt-rtx for any; auto: tensorrt with a GPU"""
    compute_capability: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """GPU to build for, such as 8.6 (RTX 3090); repeatable; tensorrt-rtx (default: this GPU)"""
    precision: Precision | None = None
    """of a checkpoint's encoder (default: fp16); an .onnx file has its own"""
    batch: str = "1,16,256"
    """smallest, usual and largest batch: MIN,OPT,MAX"""
    input: to_onnx.Input = "float32"
    """of a checkpoint: normalised floats, or RGB bytes 0-255"""
    baseline: bool = False
    """of a checkpoint: the frozen encoder without a prompt"""
    builder_level: int = 3
    """0 builds fastest, 5 searches longest"""
    timing_cache: Path = field(default_factory=lambda: Path.home() / ".cache" / "adavipro_fast")
    """where TensorRT's timings are kept, by version and GPU"""
    images: Path | None = None
    """folder of images to verify with (default: procedural ones)"""
    model: str | None = None
    """where a checkpoint's encoder now lies (default: as in training)"""
    pretrained: str | None = None
    """open_clip tag or path of its weights (default: as in training)"""


def main() -> None:
    """Parse, build, print."""
    config = cli.parse(TensorRtConfig)
    cli.run(lambda: command(config))


def command(config: TensorRtConfig) -> dict[str, Any]:
    """Build, prove the precision, verify where a GPU can run it, and only then name the files.

    Raises:
        ImportError: no TensorRT is installed.
        ValueError: source, precision, batch or compute capability cannot be used.
        VerificationError: the engine is not what was asked for.
    """
    if config.output.suffix != ".engine":
        raise ValueError(f"output {config.output} does not end in .engine; name a file F.engine")
    batch = parse_batch(config.batch)
    runtime = choose_runtime(config.runtime)
    trt = runtime_module(runtime)
    capabilities = choose_capabilities(trt, runtime, config.compute_capability)
    with to_onnx.named_when_whole(config.output) as path:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            source = onnx_source(config, Path(folder))
            about = describe_onnx(source)
            began = time.perf_counter()
            network = Network(trt, runtime, source)
            path.write_bytes(network.build(batch, about.preprocess.size, capabilities, config))
            seconds = time.perf_counter() - began
            types = network.types()
            prove_precision(types["products"], about.precision)
            sidecar = describe(about, source) | {
                "runtime": runtime,
                "runtime_version": trt.__version__,
                "compute_capabilities": capabilities,
                "tensor_dtypes": dict(types["tensors"]),
                "batch": list(batch),
                "engine_sha256": file_sha256(path),
                "verified": False,
                "reason": "",
            }
        write_sidecar(path, sidecar)
        sidecar |= verify(path, config, capabilities)
        write_sidecar(path, sidecar)
        size = path.stat().st_size
    told = {key: value for key, value in sidecar.items() if key != "class_names"}
    return {**told, "path": str(config.output), "build_seconds": seconds, "bytes": size}


def parse_batch(text: str) -> tuple[int, int, int]:
    """Read MIN,OPT,MAX."""
    try:
        smallest, usual, largest = (int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"batch {text!r} is not MIN,OPT,MAX, such as 1,16,256") from error
    if not 1 <= smallest <= usual <= largest:
        raise ValueError(f"batch {text!r} is out of order; 1 <= MIN <= OPT <= MAX is needed")
    return smallest, usual, largest


def choose_runtime(asked: Runtime) -> str:
    """Take what was asked for; auto is TensorRT on a machine with a GPU that has it."""
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
    """Check the GPUs to build for.

    Raises:
        ValueError: none named and none here, or one that the runtime does not know.
    """
    here = compute_capability()
    if runtime == "tensorrt":
        if here is None:
            raise ValueError(
                "tensorrt builds on the GPU it is for, and torch sees no CUDA device; "
                "use --runtime tensorrt-rtx with --compute-capability"
            )
        if set(asked) - {here}:
            raise ValueError(
                f"tensorrt builds for this GPU ({here}) only; leave --compute-capability out or "
                "use --runtime tensorrt-rtx"
            )
        return [here]
    if not asked and here is None:
        raise ValueError("no GPU here to build for; name one, such as --compute-capability 8.6")
    known = {
        f"{name[2:-1]}.{name[-1]}" for name in trt.ComputeCapability.__members__ if name[:2] == "SM"
    }
    wanted = list(dict.fromkeys(asked)) or [str(here)]
    for capability in wanted:
        if capability not in known:
            raise ValueError(
                f"compute capability {capability!r} is unknown to {runtime} {trt.__version__}; "
                f"use {', '.join(sorted(known, key=float))}"
            )
    return wanted


def onnx_source(config: TensorRtConfig, folder: Path) -> Path:
    """Return the .onnx file to build from; a checkpoint is exported and verified first."""
    if config.source.suffix == ".onnx":
        about = describe_onnx(config.source)
        if config.precision not in (None, about.precision):
            raise ValueError(
                f"{config.source} holds {about.precision}, {config.precision} was asked for; "
                f"export it again with --precision {config.precision}"
            )
        return config.source
    path = folder / "source.onnx"
    to_onnx.command(
        to_onnx.OnnxConfig(
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


def describe(about: Description, source: Path) -> dict[str, Any]:
    """Collect what the sidecar says beside the engine's own figures."""
    return {
        "format": FORMAT,
        **asdict(about),
        "preprocess": about.preprocess.stored(),
        "onnx_sha256": file_sha256(source),
    }


def write_sidecar(engine: Path, values: dict[str, Any]) -> None:
    """Write the sidecar with its own digest."""
    # Tuples become the lists that will be read back.
    values = json.loads(json.dumps(values))
    text = json.dumps(values | {"sidecar_sha256": sidecar_sha256(values)}, indent=1)
    sidecar_path(engine).write_text(text + "\n")


class Network:
    """A parsed, strongly typed network.

    Raises:
        ValueError: the parser does not take the graph.
    """

    def __init__(self, trt: ModuleType, runtime: str, source: Path) -> None:
        self.trt, self.runtime = trt, runtime
        self.logger = trt.Logger(trt.Logger.ERROR)
        self.builder = trt.Builder(self.logger)
        flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.definition = self.builder.create_network(flag)
        self.parser = trt.OnnxParser(self.definition, self.logger)
        model = onnx.load(source, load_external_data=False)
        for node in model.graph.node:
            # TensorRT's attention keeps its softmax in fp32 and refuses to be told so.
            kept = [a for a in node.attribute if a.name != "softmax_precision"]
            del node.attribute[:]
            node.attribute.extend(kept)
        if not self.parser.parse(model.SerializeToString(), str(source)):
            errors = [self.parser.get_error(i).desc() for i in range(self.parser.num_errors)]
            raise ValueError(f"{runtime} cannot import {source}: {'; '.join(errors[:3])}")

    def build(
        self,
        batch: tuple[int, int, int],
        side: int,
        capabilities: list[str],
        config: TensorRtConfig,
    ) -> bytes:
        """Build the engine.

        Raises:
            ValueError: the builder gave up.
        """
        options = self.options(batch, side, capabilities, config.builder_level)
        if self.runtime == "tensorrt-rtx":
            plan = self.builder.build_serialized_network(self.definition, options)
        else:
            plan = self._build_with_timings(options, config.timing_cache)
        if plan is None:
            raise ValueError(
                f"{self.runtime} could not build the engine; its messages are above; try another "
                "--precision or a smaller --batch"
            )
        return bytes(plan)

    def options(
        self, batch: tuple[int, int, int], side: int, capabilities: list[str], level: int
    ) -> Any:
        """Return how to build: batch sizes, GPUs, and fp32 that is fp32."""
        trt = self.trt
        options = self.builder.create_builder_config()
        # On by default; it would turn decisions near 0.
        options.clear_flag(trt.BuilderFlag.TF32)
        options.builder_optimization_level = level
        options.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        options.progress_monitor = progress(trt)
        profile = self.builder.create_optimization_profile()
        profile.set_shape("image", *((size, 3, side, side) for size in batch))
        options.add_optimization_profile(profile)
        if self.runtime == "tensorrt-rtx":
            options.num_compute_capabilities = len(capabilities)
            for index, capability in enumerate(capabilities):
                known = trt.ComputeCapability.__members__["SM" + capability.replace(".", "")]
                options.set_compute_capability(known, index)
        return options

    def _build_with_timings(self, options: Any, folder: Path) -> Any:
        """Build with the timings that earlier builds of this version and GPU measured.

        Raises:
            ValueError: they are damaged or of another version or GPU.
        """
        gpu = torch.cuda.get_device_name().replace(" ", "-")
        path = folder / f"{self.trt.__version__}-{gpu}.timings"
        cache = options.create_timing_cache(read_timings(path))
        if cache is None or not options.set_timing_cache(cache, ignore_mismatch=False):
            raise ValueError(f"{self.runtime} does not take the timings in {path}; remove it")
        plan = self.builder.build_serialized_network(self.definition, options)
        write_timings(path, bytes(options.get_timing_cache().serialize()))
        return plan

    def types(self) -> dict[str, Counter[str]]:
        """Count the types of tensors, and those of matrix products.

        A strongly typed engine keeps the types of its network.
        """
        tensors: Counter[str] = Counter()
        products: Counter[str] = Counter()
        for index in range(self.definition.num_layers):
            layer = self.definition.get_layer(index)
            kind = layer.get_output(0).dtype.name
            name = TYPES.get(kind, kind.lower())
            tensors[name] += 1
            if layer.type.name in PRODUCTS:
                products[name] += 1
        return {"tensors": tensors, "products": products}


def write_timings(path: Path, timings: bytes) -> None:
    """Write TensorRT's timings behind their sha256."""
    write_whole(path, hashlib.sha256(timings).digest() + timings)


def read_timings(path: Path) -> bytes:
    """Read what `write_timings` wrote; nothing where there is no file.

    Raises:
        ValueError: damaged.
    """
    if not path.is_file():
        return b""
    content = path.read_bytes()
    digest, timings = content[:32], content[32:]
    if hashlib.sha256(timings).digest() != digest:
        raise ValueError(f"timing cache {path} is damaged; remove it")
    return timings


def progress(trt: ModuleType) -> Any:
    """Show a build's phases as progress bars."""

    class Progress(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.bars: dict[str, tqdm[Any]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.bars[phase_name] = tqdm(desc=phase_name, total=num_steps, leave=False)

        def phase_finish(self, phase_name: str) -> None:
            self.bars.pop(phase_name).close()

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.bars[phase_name].update(step + 1 - self.bars[phase_name].n)
            return True

    return Progress()


def prove_precision(products: Counter[str], precision: str) -> None:
    """Raise VerificationError unless the matrix products are in `precision`."""
    wanted = DTYPES[precision]
    others = sum(products.values()) - products[wanted]
    if products[wanted] == 0 or (wanted != "float32" and others > WIDE_PRODUCTS):
        raise cli.VerificationError(
            f"the engine's matrix products are {dict(products)}; {precision} was asked for"
        )


def verify(path: Path, config: TensorRtConfig, capabilities: list[str]) -> dict[str, Any]:
    """Run the engine where a fitting GPU is at hand, and compare it with its checkpoint.

    Raises:
        VerificationError: it computes something else.
    """
    here = compute_capability()
    if here not in capabilities:
        place = "no CUDA device is here" if here is None else f"this GPU is {here}"
        return {"verified": False, "reason": f"{place}: the engine was built but could not be run"}
    if config.source.suffix == ".onnx" or config.baseline:
        reason = "export/verify.py CHECKPOINT ENGINE compares it with its checkpoint"
        return {"verified": False, "reason": reason}
    reference = open_prompt(config.source, config.model, config.pretrained)
    candidate = EngineArtifact.open(path)
    batches = sample_batches(reference.about.preprocess, config.images)
    comparison = compare(reference.model, reference, candidate, batches)
    if complaint := comparison.complaint(candidate.about.precision):
        raise cli.VerificationError(f"the engine is not its checkpoint: {complaint}")
    return {"verified": True, "reason": "", **asdict(comparison)}


if __name__ == "__main__":
    main()
