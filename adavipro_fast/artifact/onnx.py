"""Run exported graphs with ONNX Runtime; a file that is not what was exported is refused."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adavipro_fast.artifact.artifact import GraphArtifact, NotRunnableError
from adavipro_fast.cores import threads
from adavipro_fast.device import torch_device
from adavipro_fast.files.about import Description
from adavipro_fast.method.config import ExportPrecision

# Official builds of ONNX Runtime send events about their use to its publisher from 1.29 on. Read
# when it is imported; a user's own setting stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


@dataclass(frozen=True)
class OnnxArtifact(GraphArtifact):
    """An exported graph run by ONNX Runtime."""

    session: Any
    about: Description
    device: torch.device
    provider: str
    backend: str = "onnxruntime"

    @classmethod
    def of(cls, path: Path, about: Description, device: str = "auto") -> "OnnxArtifact":
        """Load a file on the CPU or a CUDA device; never on another one than asked for.

        Args:
            path: of the file.
            about: from `describe_onnx`.
            device: auto, cpu, cuda, ...

        Raises:
            ImportError: ONNX Runtime is not installed.
            NotRunnableError: ONNX Runtime cannot run it there.
            ValueError: the graph does not fit its description.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(
                "running .onnx files needs ONNX Runtime: pip install onnxruntime-gpu (Linux, "
                "Windows) or onnxruntime"
            ) from error
        place = torch_device(device)
        options = session_options(about.precision)
        provider: Any = "CPUExecutionProvider"
        if place.type == "cuda":
            # Without this, what CUDA cannot run would silently run on the CPU.
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            # TF32 would turn decisions near 0.
            provider = ("CUDAExecutionProvider", {"device_id": place.index, "use_tf32": "0"})
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        except Exception as error:  # ONNX Runtime's exceptions have no common public base.
            raise NotRunnableError(f"ONNX Runtime cannot run {path} on {place}: {error}") from error
        used = session.get_providers()[0]
        if place.type == "cuda" and used != "CUDAExecutionProvider":
            raise NotRunnableError(
                f"ONNX Runtime runs {path} with {used} instead of CUDA; check its CUDA installation"
            )
        shapes = {part.name: part.shape for part in session.get_inputs() + session.get_outputs()}
        about.check_shapes(shapes, path)
        return cls(session, about, place, used)

    @property
    def inputs(self) -> dict[str, list[Any]]:
        """Shapes of the graph's inputs by name; dynamic axes are strings."""
        return {part.name: part.shape for part in self.session.get_inputs()}

    def run_on(self, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph on all its inputs, which lie on the artifact's device."""
        names = [output.name for output in self.session.get_outputs()]
        feeds = {name: fed.contiguous() for name, fed in feeds.items()}
        if self.device.type == "cpu":
            arrays = self.session.run(names, {name: fed.numpy() for name, fed in feeds.items()})
            tensors = [torch.from_numpy(array) for array in arrays]
        else:
            tensors = self._bound(feeds, names)
        return dict(zip(names, tensors, strict=True))

    def _bound(self, feeds: dict[str, Tensor], names: list[str]) -> list[Tensor]:
        """Run on tensors that lie on the device, without copies through the host."""
        binding, index = self.session.io_binding(), self.device.index or 0
        torch.cuda.current_stream(self.device).synchronize()
        for name, fed in feeds.items():
            # NumPy has no name for bf16; ONNX has a number.
            kind: Any = 16 if fed.dtype == torch.bfloat16 else str(fed.dtype).split(".")[1]
            binding.bind_input(name, "cuda", index, kind, tuple(fed.shape), fed.data_ptr())
        for name in names:
            binding.bind_output(name, "cuda", index)
        self.session.run_with_iobinding(binding)
        return [torch.from_numpy(array) for array in binding.copy_outputs_to_cpu()]


def session_options(precision: ExportPrecision) -> Any:
    """Return ONNX Runtime's options for a graph in this precision."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads()
    # Its threads would go on spinning and take the cores from what runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if precision in ("fp16", "bf16"):
        # The last level crashes on half-precision ViTs (ONNX Runtime 1.31, CPU).
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_EXTENDED
    if precision == "fp8":
        # The CPU has no products of fp8: it rounds to them, and multiplies in fp32.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options
