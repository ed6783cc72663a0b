"""Open any file that can classify images."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from adavipro_fast.artifact.artifact import Artifact, GraphArtifact
from adavipro_fast.artifact.onnx import OnnxArtifact
from adavipro_fast.artifact.open_tasks import OpenArtifact
from adavipro_fast.artifact.openvino import OpenVinoArtifact, preferred
from adavipro_fast.artifact.tensorrt import EngineArtifact
from adavipro_fast.device import torch_device
from adavipro_fast.files.about import Tasks
from adavipro_fast.files.hub import on_disk
from adavipro_fast.files.sealed import describe_onnx
from adavipro_fast.method.config import Precision, Runtime
from adavipro_fast.method.model import Prediction
from adavipro_fast.method.preprocess import Decode

if TYPE_CHECKING:
    # open_clip takes seconds to import, and exported files do without it.
    from adavipro_fast.artifact.torch import TorchArtifact


class OneTask(Artifact):
    """One task of an artifact that holds several, as an artifact of its own.

    Args:
        holder: of several tasks.
        name: of one of them.

    Raises:
        ValueError: no such task.
    """

    def __init__(self, holder: Artifact, name: str) -> None:
        self.holder, self.name = holder, name
        self.about = holder.about.of_task(name)
        self.backend, self.provider = holder.backend, holder.provider

    def __call__(self, pixels: Tensor, task: Tasks | None = None) -> Prediction:
        """Classify (B, 3, S, S) uint8 RGB pixels as this task's.

        Raises:
            ValueError: another task is named.
        """
        named = {task} if isinstance(task, str) else set(task or ())
        if named - {self.name}:
            raise ValueError(f"only task {self.name!r} was opened; open the file without a task")
        logits, mask, embedding = self.holder(pixels, self.name)
        return Prediction(logits[:, : len(self.about.class_names)], mask, embedding)


def open_artifact(
    path: str | Path,
    *,
    model: str | None = None,
    pretrained: str | None = None,
    precision: Precision = "fp32",
    device: str = "auto",
    runtime: Runtime = "auto",
    task: str | None = None,
    decode: Decode | None = None,
) -> Artifact:
    """Open a trained prompt for inference.

    Args:
        path: `checkpoint.safetensors`, `.onnx`, `.engine`, or a baseline's file; on the Hub,
            `hub:owner/name`, with `@revision` or `/FILE` behind it.
        model: where a checkpoint's encoder now lies; its hash must match.
        pretrained: open_clip tag or path of the encoder's weights.
        precision: of a checkpoint's encoder.
        device: auto, cpu, cuda, ...
        runtime: of an .onnx file; auto takes OpenVINO on a CPU where it is installed and the file
            is not quantised and has its tasks in it, else ONNX Runtime.
        task: one of a file that holds several; a `.task` file where tasks are data.
        decode: full, fast or scaled, see `Preprocess.decode` (default: as in training).

    Raises:
        FileNotFoundError: no such file.
        OSError: it cannot be fetched from the Hub, with the reason.
        ValueError: not one of ours, damaged, of another encoder, or not runnable here.
    """
    path = on_disk(Path(path))
    if path.suffix != ".onnx" and runtime != "auto":
        raise ValueError(
            f"runtime {runtime} only runs .onnx files, and {path} is not one; leave runtime out"
        )
    opened: OnnxArtifact | OpenVinoArtifact | TorchArtifact | EngineArtifact
    if path.suffix == ".onnx":
        opened = open_onnx(path, device, runtime)
    elif path.suffix == ".engine":
        opened = EngineArtifact.open(path, device)
    else:
        opened = open_checkpoint(path, model, pretrained, precision, device)
    if decode is not None:
        preprocess = replace(opened.about.preprocess, decode=decode)
        opened = replace(opened, about=replace(opened.about, preprocess=preprocess))
    if opened.about.open_for is None:
        return opened if task is None else OneTask(opened, task)
    assert isinstance(opened, GraphArtifact)
    holder = OpenArtifact(opened)
    if task is None:
        return holder
    return OneTask(holder, holder.add(task) if task.endswith(".task") else task)


def open_onnx(path: Path, device: str, runtime: Runtime) -> OnnxArtifact | OpenVinoArtifact:
    """Open an .onnx file in the runtime asked for; arguments and errors are `open_artifact`'s."""
    about = describe_onnx(path)
    if runtime == "openvino" or (runtime == "auto" and preferred(about, torch_device(device))):
        return OpenVinoArtifact.of(path, about, device)
    return OnnxArtifact.of(path, about, device)


def open_checkpoint(
    path: Path, model: str | None, pretrained: str | None, precision: Precision, device: str
) -> "TorchArtifact":
    """Open a checkpoint with PyTorch; arguments and errors are `open_artifact`'s."""
    runner = import_module("adavipro_fast.artifact.torch")
    opened: TorchArtifact = runner.TorchArtifact.open(
        path, model=model, pretrained=pretrained, precision=precision, device=device
    )
    return opened
