"""A strongly typed TensorRT network: parse it, build it, count its types."""

import hashlib
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import torch
from tqdm.auto import tqdm

from adavipro_fast.errors import VerificationError
from adavipro_fast.files.whole import write_whole

DTYPES = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "int8",
    "fp8": "float8",
}
# TensorRT's names of the types.
TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8"}
# Smallest, optimal and largest size of each dynamic axis.
Ranges = dict[str, tuple[int, int, int]]
PRODUCTS = ("MATRIX_MULTIPLY", "CONVOLUTION", "ATTENTION", "ATTENTION_INPUT")
# Products that stay in fp32: the mask's convolutions, the last projection and the logits.
WIDE_PRODUCTS = 5


class Network:
    """A parsed, strongly typed network.

    Raises:
        ValueError: the parser rejects the graph.
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
            # TensorRT's attention always computes softmax in fp32 and rejects this attribute.
            kept = [a for a in node.attribute if a.name != "softmax_precision"]
            del node.attribute[:]
            node.attribute.extend(kept)
        self.shapes = {
            part.name: [
                axis.dim_param or axis.dim_value for axis in part.type.tensor_type.shape.dim
            ]
            for part in model.graph.input
        }
        self.dequantised = sum(node.op_type == "DequantizeLinear" for node in model.graph.node)
        if not self.parser.parse(model.SerializeToString(), str(source)):
            errors = [self.parser.get_error(i).desc() for i in range(self.parser.num_errors)]
            raise ValueError(f"{runtime} cannot import {source}: {'; '.join(errors[:3])}")

    def build(
        self,
        ranges: Ranges,
        capabilities: list[str],
        *,
        level: int,
        timings: Path,
    ) -> bytes:
        """Build the engine.

        Args:
            ranges: smallest, optimal and largest size of each dynamic axis, by its name.
            capabilities: compute capabilities of the GPUs.
            level: the builder's optimisation level.
            timings: folder of TensorRT's timing caches.

        Raises:
            ValueError: the build failed.
        """
        options = self.options(ranges, capabilities, level)
        if self.runtime == "tensorrt-rtx":
            plan = self.builder.build_serialized_network(self.definition, options)
        else:
            plan = self._build_with_timings(options, timings)
        if plan is None:
            raise ValueError(
                f"{self.runtime} could not build the engine; its messages are above; try another "
                "--precision or a smaller --batch"
            )
        return bytes(plan)

    def options(self, ranges: Ranges, capabilities: list[str], level: int) -> Any:
        """Return the builder's configuration: dynamic sizes, GPUs, no TF32."""
        trt = self.trt
        options = self.builder.create_builder_config()
        # TF32 is on by default, and would flip decisions near 0.
        options.clear_flag(trt.BuilderFlag.TF32)
        options.builder_optimization_level = level
        options.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        options.progress_monitor = progress(trt)
        profile = self.builder.create_optimization_profile()
        for name, shape in self.shapes.items():
            sizes = [ranges.get(str(axis), (axis,) * 3) for axis in shape]
            profile.set_shape(name, *zip(*sizes, strict=True))
        options.add_optimization_profile(profile)
        if self.runtime == "tensorrt-rtx":
            options.num_compute_capabilities = len(capabilities)
            for index, capability in enumerate(capabilities):
                known = trt.ComputeCapability.__members__["SM" + capability.replace(".", "")]
                options.set_compute_capability(known, index)
        return options

    def _build_with_timings(self, options: Any, folder: Path) -> Any:
        """Build with the timing cache of this TensorRT version and GPU, and update it.

        Raises:
            ValueError: the cache is damaged or belongs to another version or GPU.
        """
        gpu = torch.cuda.get_device_name().replace(" ", "-")
        path = folder / f"{self.trt.__version__}-{gpu}.timings"
        cache = options.create_timing_cache(read_timings(path))
        if cache is None or not options.set_timing_cache(cache, ignore_mismatch=False):
            raise ValueError(f"{self.runtime} rejects the timing cache {path}; remove it")
        plan = self.builder.build_serialized_network(self.definition, options)
        write_timings(path, bytes(options.get_timing_cache().serialize()))
        return plan

    def types(self) -> dict[str, Counter[str]]:
        """Count the types of layer outputs, of matrix products, and of dequantised tensors.

        A strongly typed engine keeps the types of its network.
        """
        tensors: Counter[str] = Counter()
        products: Counter[str] = Counter()
        quantised: Counter[str] = Counter()
        for index in range(self.definition.num_layers):
            layer = self.definition.get_layer(index)
            name = type_of(layer.get_output(0))
            tensors[name] += 1
            if layer.type.name == "DEQUANTIZE":
                quantised[type_of(layer.get_input(0))] += 1
            if layer.type.name in PRODUCTS:
                products[name] += 1
        return {"tensors": tensors, "products": products, "quantised": quantised}


def type_of(tensor: Any) -> str:
    """Return a tensor's type by its name in sidecars."""
    kind: str = tensor.dtype.name
    return TYPES.get(kind, kind.lower())


def write_timings(path: Path, timings: bytes) -> None:
    """Write TensorRT's timings, preceded by their sha256."""
    write_whole(path, hashlib.sha256(timings).digest() + timings)


def read_timings(path: Path) -> bytes:
    """Read timings written by `write_timings`; empty if there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return b""
    content = path.read_bytes()
    digest, timings = content[:32], content[32:]
    if hashlib.sha256(timings).digest() != digest:
        raise ValueError(f"timing cache {path} is damaged; remove it")
    return timings


def progress(trt: ModuleType) -> Any:
    """Return a monitor that shows a build's phases as progress bars."""

    class Progress(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.bars: dict[str, tqdm[Any]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.bars[phase_name] = tqdm(
                desc=phase_name, total=num_steps, leave=False, disable=None
            )

        def phase_finish(self, phase_name: str) -> None:
            self.bars.pop(phase_name).close()

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.bars[phase_name].update(step + 1 - self.bars[phase_name].n)
            return True

    return Progress()


def prove_quantised(types: dict[str, Counter[str]], precision: str, dequantised: int) -> None:
    """Raise VerificationError unless the engine quantises as many tensors as the graph."""
    dtype = DTYPES[precision]
    if not dequantised or types["quantised"] != {dtype: dequantised}:
        raise VerificationError(
            f"the engine dequantises {dict(types['quantised'])}; expected {dequantised} of {dtype}"
        )


def prove_precision(products: Counter[str], precision: str, most: int = WIDE_PRODUCTS) -> None:
    """Raise VerificationError unless all matrix products but at most `most` are in `precision`."""
    dtype = DTYPES[precision]
    others = sum(products.values()) - products[dtype]
    if products[dtype] == 0 or (dtype != "float32" and others > most):
        raise VerificationError(
            f"the engine's matrix products are {dict(products)}; expected {precision}"
        )
