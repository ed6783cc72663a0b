"""Open any file that can classify images."""

from pathlib import Path

from adavipro_fast.artifact.description import Artifact, OneTask
from adavipro_fast.artifact.onnx import OnnxArtifact
from adavipro_fast.artifact.open_tasks import OpenArtifact
from adavipro_fast.artifact.torch import TorchArtifact
from adavipro_fast.files.hub import on_disk
from adavipro_fast.method.config import Precision


def open_artifact(
    path: str | Path,
    *,
    model: str | None = None,
    pretrained: str | None = None,
    precision: Precision = "fp32",
    device: str = "auto",
    task: str | None = None,
) -> Artifact:
    """Open a trained prompt for inference.

    Args:
        path: `checkpoint.safetensors`, `.onnx`, `.engine`, or a baseline's file; on the Hub,
            `hub:owner/name`, with `@revision` or `/FILE` behind it.
        model: where a checkpoint's encoder now lies; its hash must match.
        pretrained: open_clip tag or path of the encoder's weights.
        precision: of a checkpoint's encoder.
        device: auto, cpu, cuda, ...
        task: one of a file that holds several; a `.task` file where tasks are data.

    Raises:
        FileNotFoundError: no such file.
        OSError: it cannot be fetched from the Hub, with the reason.
        ValueError: not one of ours, damaged, of another encoder, or not runnable here.
    """
    if task is not None:
        opened = open_artifact(
            path, model=model, pretrained=pretrained, precision=precision, device=device
        )
        if isinstance(opened, OpenArtifact) and task.endswith(".task"):
            task = opened.add(task)
        return OneTask(opened, task)
    path = on_disk(Path(path))
    if path.suffix == ".onnx":
        file = OnnxArtifact.open(path, device)
        return file if file.about.open_for is None else OpenArtifact(file)
    if path.suffix == ".engine":
        from adavipro_fast.artifact.tensorrt import EngineArtifact

        return EngineArtifact.open(path, device)
    return TorchArtifact.open(
        path, model=model, pretrained=pretrained, precision=precision, device=device
    )
