"""Run exported graphs with OpenVINO on the CPU, in fp32 whatever the CPU offers."""

import threading
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adavipro_fast.artifact.artifact import GraphArtifact, NotRunnableError
from adavipro_fast.cores import threads
from adavipro_fast.device import torch_device
from adavipro_fast.files.about import Description
from adavipro_fast.files.task import TABLES
from adavipro_fast.method.config import QUANTISED

CPU = torch.device("cpu")
INSTALL = "pip install 'adavipro_fast[openvino]'"
OTHERWISE = "use runtime onnxruntime"
SETTINGS = {
    # Where the CPU has bf16, OpenVINO takes it by itself, which turns decisions near 0.
    "INFERENCE_PRECISION_HINT": "f32",
    "PERFORMANCE_HINT": "LATENCY",
    # A pinned thread waits for its own core, whatever else is idle.
    "ENABLE_CPU_PINNING": False,
}
NAMES = ("image", "task", *TABLES, "logits", "mask", "embedding")


@dataclass(frozen=True)
class OpenVinoArtifact(GraphArtifact):
    """An exported graph run by OpenVINO."""

    request: Any
    about: Description
    provider: str
    backend: str = "openvino"
    device: torch.device = CPU
    lock: Any = field(default_factory=threading.Lock)
    """a request holds the memory of one call; compiled for latency, one call takes all cores"""

    @classmethod
    def of(cls, path: Path, about: Description, device: str = "auto") -> "OpenVinoArtifact":
        """Load a file on the CPU; arguments are `OnnxArtifact.of`'s.

        Raises:
            ImportError: OpenVINO is not installed.
            NotRunnableError: OpenVINO cannot run it.
            ValueError: of a form that it does not run, or a device other than the CPU was asked
                for.
        """
        place = torch_device("cpu" if device == "auto" else device)
        if obstacle := openvino_obstacle(about, place):
            raise ValueError(f"OpenVINO does not run {path}: {obstacle}; {OTHERWISE}")
        try:
            import openvino
        except ImportError as error:
            raise ImportError(
                f"OpenVINO is not installed or cannot be loaded ({error}); {INSTALL}, or "
                f"{OTHERWISE}"
            ) from error
        settings = SETTINGS | {"INFERENCE_NUM_THREADS": threads()}
        try:
            compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        except Exception as error:  # What it raises for a graph that it does not know is open.
            reason = " ".join(str(error).split())
            raise NotRunnableError(f"OpenVINO cannot run {path}: {reason}; {OTHERWISE}") from error
        parts = compiled.inputs + compiled.outputs
        about.check_shapes({name_of(part): shape_of(part) for part in parts}, path)
        provider = "CPU, int8" if about.precision == "int8" else "CPU, fp32"
        return cls(compiled.create_infer_request(), about, provider)

    @property
    def inputs(self) -> dict[str, list[Any]]:
        """Shapes of the graph's inputs by name; dynamic axes are strings."""
        return {name_of(part): shape_of(part) for part in self.request.model_inputs}

    def run_on(self, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph on all its inputs, which lie on the CPU."""
        arrays = {name: array_of(fed) for name, fed in feeds.items()}
        with self.lock:
            # Outputs are copied: the next call writes where they lie.
            found = self.request.infer(arrays, share_inputs=True, share_outputs=False)
        return {name_of(part): torch.from_numpy(array) for part, array in found.items()}


def openvino_obstacle(about: Description, place: torch.device) -> str | None:
    """Say what keeps OpenVINO from running a file on a device."""
    if place.type != "cpu":
        return f"it only runs on the CPU, not on {place}"
    if about.precision == "fp8":
        # Its answers are further from ONNX Runtime's, which were judged, than rounding explains.
        return "its fp8 rounding does not follow the file"
    return None


def preferred(about: Description, place: torch.device) -> bool:
    """Tell whether `auto` takes OpenVINO: on a CPU, where it is installed and the file runs in it.

    Quantised files stay with the runtime that their accuracy was judged in, and tasks as data with
    ONNX Runtime: OpenVINO compiles again for each new number of tasks or classes in a call.
    """
    kept = about.precision in QUANTISED or about.open_for is not None
    able = openvino_obstacle(about, place) is None and not kept
    return able and find_spec("openvino") is not None


def array_of(tensor: Tensor) -> Any:
    """Give OpenVINO a tensor on the CPU without a copy; NumPy has no name for bf16."""
    tensor = tensor.contiguous()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    import openvino

    bits = tensor.view(torch.int16).numpy()
    return openvino.Tensor(bits, list(tensor.shape), openvino.Type.bf16)


def name_of(part: Any) -> str:
    """Return which input or output it is.

    What optimisation removes leaves its names on its neighbours: a part may have several.
    """
    return next((name for name in NAMES if name in part.get_names()), "")


def shape_of(part: Any) -> list[int | str]:
    """Return the shape of an input or output; dynamic axes are `?`."""
    return ["?" if size.is_dynamic else size.get_length() for size in part.partial_shape]
