"""Run exported graphs with ONNX Runtime; a file that is not what was exported is refused."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adavipro_fast.artifact.classify import Classifies
from adavipro_fast.artifact.description import Description, NotRunnableError, Tasks
from adavipro_fast.cores import threads
from adavipro_fast.device import torch_device
from adavipro_fast.files.whole import file_sha256
from adavipro_fast.method.config import ExportPrecision
from adavipro_fast.method.model import Prediction

# An .onnx file carries its own sha256, computed with zeros in the place of the digest.
SEAL_KEY, UNSEALED = "content_sha256", "0" * 64
# How protobuf stores the entry: key, then a string of 64 bytes.
SEAL = SEAL_KEY.encode() + b"\x12\x40"


@dataclass(frozen=True)
class OnnxArtifact(Classifies):
    """An exported graph run by ONNX Runtime."""

    session: Any
    about: Description
    device: torch.device
    provider: str
    backend: str = "onnxruntime"

    @classmethod
    def open(cls, path: Path, device: str = "auto") -> "OnnxArtifact":
        """Load a file on the CPU or a CUDA device; never on another one than asked for.

        Raises:
            FileNotFoundError: no such file.
            ImportError: ONNX Runtime is not installed.
            NotRunnableError: ONNX Runtime cannot run it there.
            ValueError: not one of ours, or damaged.
        """
        return cls.of(path, describe_onnx(path), device)

    @classmethod
    def of(cls, path: Path, about: Description, device: str = "auto") -> "OnnxArtifact":
        """Load a file that was described; errors are `open`'s."""
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
            raise NotRunnableError(f"ONNX Runtime runs {path} by {used}, CUDA was asked for")
        shapes = {part.name: part.shape for part in session.get_inputs() + session.get_outputs()}
        about.check_shapes(shapes, path)
        return cls(session, about, place, used)

    def __call__(self, pixels: Tensor, task: Tasks | None = None) -> Prediction:
        """Classify (B, 3, S, S) uint8 RGB pixels."""
        numbers = self.about.numbers(task, len(pixels))
        return self.about.prediction(self.run(self.about.image(pixels.to(self.device)), numbers))

    def run(self, image: Tensor, tasks: Sequence[int] = ()) -> dict[str, Tensor]:
        """Run the graph on its input (B, 3, S, S), on the artifact's device.

        Args:
            image: its input.
            tasks: the number of each image's task, where there are several.
        """
        feeds = {"image": image}
        if tasks:
            feeds["task"] = torch.tensor(tasks, device=image.device)
        return self.run_on(feeds)

    def run_on(self, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph on all its inputs, which lie on the artifact's device."""
        names = [output.name for output in self.session.get_outputs()]
        known = {part.name for part in self.session.get_inputs()}
        # A graph of tasks without a generator takes no kernels.
        feeds = {name: fed.contiguous() for name, fed in feeds.items() if name in known}
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


def seal(content: bytes) -> bytes:
    """Put the content's own sha256 into its metadata."""
    place = content.rindex(SEAL) + len(SEAL)
    digest = hashlib.sha256(content).hexdigest().encode()
    return content[:place] + digest + content[place + len(digest) :]


def describe_onnx(path: Path) -> Description:
    """Read what a file says about itself, once it is found to be as it was exported.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged or not one of ours.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    content = path.read_bytes()
    place = content.rfind(SEAL) + len(SEAL)
    if place < len(SEAL):
        raise ValueError(
            f"{path} is cut short or was not exported by adavipro_fast; export a checkpoint with "
            "adavipro-to-onnx"
        )
    digest = content[place : place + 64]
    unsealed = content[:place] + UNSEALED.encode() + content[place + 64 :]
    if hashlib.sha256(unsealed).hexdigest().encode() != digest:
        raise ValueError(f"{path} is damaged: it is not what was exported; export it again")
    import onnx

    data = path.with_name(path.name + ".data")
    try:
        model = onnx.load_model_from_string(content)
        values = metadata_of(model)
    except Exception as error:  # protobuf's own errors, nesting without end, ...
        raise ValueError(f"{path} is no ONNX file of ours: {error}") from error
    # A file may name any other file as the place of its weights.
    places = {
        entry.value
        for tensor in tensors_of(model)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    if places and (places != {data.name} or "data_sha256" not in values):
        own = next(iter(places))
        renamed = len(places) == 1 and own.endswith(".onnx.data") and own != data.name
        if renamed and Path(own).name == own:
            raise ValueError(
                f"{path} was exported as {own.removesuffix('.data')} with its weights in {own}; "
                "give both files these names again"
            )
        raise ValueError(f"{path} wants weights from elsewhere than {data.name}; refused")
    if places and not data.is_file():
        raise FileNotFoundError(f"{data} is missing; it holds the weights of {path.name}")
    if "data_sha256" in values and values["data_sha256"] != file_sha256(data):
        raise ValueError(f"{data} is damaged: it is not what was exported; export it again")
    return Description.of(values, path)


def metadata_of(model: Any) -> dict[str, Any]:
    """Return what a graph says about itself, without its seal."""
    return {p.key: json.loads(p.value) for p in model.metadata_props if p.key != SEAL_KEY}


def tensors_of(message: Any) -> Iterator[Any]:
    """Yield every tensor inside a protobuf message: weights, constants, those of subgraphs."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if hasattr(value, "ListFields") else value:
            if type(part).__name__ == "TensorProto":
                yield part
            else:
                yield from tensors_of(part)
