"""Train and export from Python: the `train` and `to_onnx` commands as functions."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adavipro_fast.files.checked import read

Checkpoint = str | Path


def fit(data: str | Path, **settings: Any) -> dict[str, Any]:
    """Train a prompt, as `python -m adavipro_fast.train` does.

        fit("my_images", model="ViT-B-32", pretrained="openai", head="linear", epochs=4)

    Args:
        data: folder of images, or the name of a data set.
        settings: the command's flags, with underscores: `model`, `pretrained`, `head`, `epochs`,
            `prompt_size`, `seed`, `output`, ...

    Returns:
        The command's result: `checkpoint` (path of the best model), `val_top1`, `test_top1`, ...

    Raises:
        TypeError: a setting does not exist.
        ValueError: a setting is invalid, or the output folder already contains a run.
        FileNotFoundError: the data are missing.
    """
    # Imported here so that importing the package does not load the trainer.
    from adavipro_fast.training.config import TrainConfig, recipe, stored
    from adavipro_fast.training.run import start_run

    leading = {name: settings[name] for name in ("prompt_size", "head") if name in settings}
    start = recipe(settings.get("recipe", TrainConfig.recipe), **leading)
    values = changed("fit", stored(start), {**settings, "data": str(data)})
    return start_run(read(TrainConfig, values))


def to_onnx(
    checkpoint: Checkpoint | Sequence[Checkpoint], output: str | Path, **settings: Any
) -> dict[str, Any]:
    """Export checkpoints as one verified ONNX file, as `export/to_onnx.py` does.

        to_onnx("runs/mine/checkpoint.safetensors", "mine.onnx", input="uint8")

    Args:
        checkpoint: one, or several of the same encoder; each becomes a task.
        output: the file to write.
        settings: the command's flags, with underscores: `input`, `precision`, `task`, `images`, ...

    Returns:
        The command's result: `path`, `verified`, `mask_agreement`, ...

    Raises:
        TypeError: a setting does not exist.
        ValueError: checkpoints and settings do not fit together.
        VerificationError: the file's output differs from PyTorch's, or it loses accuracy.
    """
    from adavipro_fast.cli import on_disk
    from adavipro_fast.export.onnx_export import OnnxConfig, export

    several = [checkpoint] if isinstance(checkpoint, str | Path) else list(checkpoint)
    first, *more = map(Path, several)
    default = vars(OnnxConfig(first, Path(output), tuple(more)))
    if isinstance(settings.get("images"), str | Path):
        settings["images"] = (settings["images"],)
    return export(on_disk(read(OnnxConfig, changed("to_onnx", default, settings))))


def changed(name: str, values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Override the nested values of a configuration with settings.

    Raises:
        TypeError: a setting does not exist.
    """
    known: set[str] = set()

    def filled(values: Mapping[str, Any]) -> dict[str, Any]:
        known.update(key for key, value in values.items() if not isinstance(value, Mapping))
        return {
            key: filled(value) if isinstance(value, Mapping) else settings.get(key, value)
            for key, value in values.items()
        }

    result = filled(values)
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"{name} has no setting {key!r}{hint}")
    return result
