"""Run TensorRT and TensorRT-RTX engines: CUDA graphs, pinned buffers, a sidecar that must match.

Tasks that are data come with each call, in other numbers than before: those engines run without
CUDA graphs.
"""

import importlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adavipro_fast.artifact.artifact import GraphArtifact, NotRunnableError
from adavipro_fast.device import torch_device
from adavipro_fast.files.about import Description, Tasks
from adavipro_fast.files.sealed import read_sidecar
from adavipro_fast.method.model import Prediction

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
INSTALL = {"tensorrt": "pip install tensorrt", "tensorrt-rtx": "pip install tensorrt-rtx-cu13"}


def runtime_module(runtime: str) -> ModuleType:
    """Import TensorRT or TensorRT-RTX.

    Raises:
        ImportError: not installed; says how to.
    """
    try:
        return importlib.import_module(MODULES[runtime])
    except (ImportError, RuntimeError, OSError) as error:
        raise ImportError(
            f"{runtime} is not installed or cannot be loaded ({error}); {INSTALL[runtime]}"
        ) from error


def compute_capability(device: torch.device | None = None) -> str | None:
    """Return a CUDA device's compute capability, such as 8.6, or none without one.

    Args:
        device: which; none means the current one.
    """
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return None
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def check_runs_here(values: dict[str, Any], version: str, capability: str | None) -> None:
    """Raise ValueError unless an engine fits the runtime's version and the device."""
    if capability is None:
        raise ValueError("running an engine needs a CUDA device; use the .onnx file on a CPU")
    if values["runtime_version"] != version:
        raise ValueError(
            f"the engine was built by {values['runtime']} {values['runtime_version']}, but "
            f"{version} is "
            "installed; build it again with adavipro-to-tensorrt or install that version"
        )
    if capability not in values["compute_capabilities"]:
        raise ValueError(
            "the engine was built for compute capability "
            f"{', '.join(values['compute_capabilities'])}, but this GPU has {capability}; build it "
            f"again with adavipro-to-tensorrt --compute-capability {capability}"
        )


@dataclass(frozen=True)
class Replay:
    """One batch size: its execution context, its tensors, and the CUDA graph that runs on them.

    A captured graph uses its context's memory and shapes, so that no two may share one.
    """

    context: Any
    hosts: dict[str, Tensor]
    """inputs, pinned"""
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    graph: torch.cuda.CUDAGraph


@dataclass(frozen=True)
class EngineArtifact(GraphArtifact):
    """An engine on a CUDA device. Batches are padded to a few sizes, each captured once."""

    trt: ModuleType
    engine: Any
    about: Description
    batch: tuple[int, int, int]
    device: torch.device
    backend: str
    provider: str
    replays: dict[int, Replay] = field(default_factory=dict)
    contexts: list[Any] = field(default_factory=list)
    """one, where tasks are data"""
    lock: Any = field(default_factory=threading.Lock)
    """calls of several threads run one after the other: they share the replays' tensors"""

    @classmethod
    def open(cls, path: Path, device: str = "auto") -> "EngineArtifact":
        """Load an engine.

        Raises:
            FileNotFoundError: engine or sidecar is missing.
            ImportError: its runtime is not installed.
            ValueError: damaged, or not made for this version or device.
        """
        values = read_sidecar(path)
        about = Description.of(values, path)
        trt = runtime_module(values["runtime"])
        place = torch_device(device)
        check_runs_here(values, trt.__version__, compute_capability(place))
        if place.type != "cuda":
            raise ValueError(f"an engine cannot run on {place}; use --device cuda")
        # TensorRT takes the current device.
        torch.cuda.set_device(place)
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise ValueError(f"{values['runtime']} cannot load {path}; build it again")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        about.check_shapes({name: tuple(engine.get_tensor_shape(name)) for name in names}, path)
        smallest, usual, largest = values["batch"]
        return cls(
            trt,
            engine,
            about,
            (smallest, usual, largest),
            place,
            values["runtime"],
            torch.cuda.get_device_name(place),
        )

    @property
    def inputs(self) -> dict[str, Sequence[int]]:
        """Shapes of the engine's inputs by name; dynamic axes are -1."""
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        return {
            name: tuple(self.engine.get_tensor_shape(name))
            for name in names
            if self.engine.get_tensor_mode(name).name == "INPUT"
        }

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, task: Tasks | None = None) -> Prediction:
        """Classify (B, 3, S, S) uint8 RGB pixels, in parts of the profile's largest batch."""
        numbers = torch.tensor(self.about.numbers(task, len(pixels)), dtype=torch.int64)
        with self._alone():
            most = self.batch[2]
            parts = [
                self._run(part, numbers[number * most : (number + 1) * most])
                for number, part in enumerate(pixels.split(most))
            ]
        return Prediction(*(torch.cat(column) for column in zip(*parts, strict=True)))

    @torch.inference_mode()
    def run_on(self, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run on all inputs of an engine whose tasks are data; what lies on the device stays there.

        Args:
            feeds: inputs by name; `image` and `task` are cut into parts of the profile's largest
                batch, and filled up to its smallest one.

        Raises:
            ValueError: there are more tasks or classes than the engine was built for.
        """
        fed = {name: tensor.to(self.device).contiguous() for name, tensor in feeds.items()}
        count, (least, _, most) = len(fed["image"]), self.batch
        parts = []
        with self._alone():
            if not self.contexts:
                self.contexts.append(self._context())
            for start in range(0, count, most):
                size = min(most, count - start)
                of_images = {
                    name: filled(fed[name][start : start + size], least)
                    for name in fed.keys() & {"image", "task"}
                }
                outputs = self._bind(self.contexts[0], fed | of_images)
                self._enqueue(self.contexts[0], torch.cuda.current_stream(self.device))
                parts.append({name: each[:size].cpu() for name, each in outputs.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads out; a thread has a current device of its own."""
        cuda = self.device.type == "cuda"
        with self.lock, torch.cuda.device(self.device) if cuda else nullcontext():
            yield

    def _run(self, pixels: Tensor, tasks: Tensor) -> Prediction:
        count = len(pixels)
        size = padded_size(count, self.batch)
        if size not in self.replays:
            self.replays[size] = self._capture(size)
        replay = self.replays[size]
        replay.hosts["image"][:count].copy_(self.about.image(pixels))
        if "task" in replay.hosts:
            replay.hosts["task"][:count].copy_(tasks)
        for name, host in replay.hosts.items():
            replay.inputs[name].copy_(host, non_blocking=True)
        replay.graph.replay()
        outputs = {k: v[:count].to("cpu", copy=True) for k, v in replay.outputs.items()}
        return self.about.prediction(outputs)

    def _context(self) -> Any:
        """Make an execution context; TensorRT-RTX compiles its kernels before they are captured.

        Raises:
            NotRunnableError: there is no memory for it.
        """
        if self.backend == "tensorrt-rtx":
            options = self.engine.create_runtime_config()
            # Its default runs fallback kernels while it compiles: a graph would keep those.
            strategies = self.trt.DynamicShapesKernelSpecializationStrategy
            options.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
            context = self.engine.create_execution_context(options)
        else:
            context = self.engine.create_execution_context()
        if context is None:
            raise NotRunnableError(
                f"{self.backend} ran out of memory for another execution context; use smaller "
                "batches"
            )
        return context

    def _bind(self, context: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give a context its inputs, and tensors for its outputs.

        Raises:
            ValueError: an input is larger than the engine was built for.
        """
        for name, fed in inputs.items():
            if context.set_input_shape(name, tuple(fed.shape)) is False:
                raise ValueError(
                    f"{name} of shape {tuple(fed.shape)} is outside the engine's range; build it "
                    "again with larger --tasks, --classes or --image-size"
                )
            context.set_tensor_address(name, fed.data_ptr())
        outputs = {}
        for index in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(index)
            if name not in inputs:
                kind = torch.int32 if name == "mask" else torch.float32
                shape = tuple(context.get_tensor_shape(name))
                outputs[name] = torch.empty(shape, dtype=kind, device=self.device)
                context.set_tensor_address(name, outputs[name].data_ptr())
        return outputs

    def _capture(self, size: int) -> Replay:
        """Allocate for a batch size and capture the engine's work on it."""
        context, side = self._context(), self.about.preprocess.size
        pinned = self.device.type == "cuda"
        blank = self.about.image(torch.zeros(1, 3, side, side, dtype=torch.uint8))
        shape = (size, *blank.shape[1:])
        hosts = {"image": torch.zeros(shape, dtype=blank.dtype, pin_memory=pinned)}
        if self.about.tasks:
            hosts["task"] = torch.zeros(size, dtype=torch.int64, pin_memory=pinned)
        inputs = {name: host.to(self.device, copy=True) for name, host in hosts.items()}
        outputs = self._bind(context, inputs)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            # The first run allocates and, in TensorRT-RTX, compiles; it cannot be captured.
            self._enqueue(context, stream)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on allocating.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._enqueue(context, stream)
        return Replay(context, hosts, inputs, outputs, graph)

    def _enqueue(self, context: Any, stream: torch.cuda.Stream) -> None:
        if not context.execute_async_v3(stream.cuda_stream):
            raise NotRunnableError(
                f"{self.backend} failed to run the engine; see its messages above"
            )


def filled(tensor: Tensor, least: int) -> Tensor:
    """Fill a batch up with zeros to at least so many."""
    missing = max(least - len(tensor), 0)
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor


def padded_size(count: int, batch: tuple[int, int, int]) -> int:
    """Return the size that a batch is padded to: the smallest one, doubled as often as it takes.

    So at most nine sizes are kept for a profile of 1 to 256 images, with less than twice the work.
    """
    size = batch[0]
    while size < count:
        size = min(2 * size, batch[2])
    return size
