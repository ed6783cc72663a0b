"""Export a checkpoint as one verified ONNX file: `python export/to_onnx.py CHECKPOINT --output F`.

Inputs and outputs: image (B, 3, S, S) to logits (B, K), mask (B, G, G) int32 and embedding (B, E).
"""

from pathlib import Path
from typing import Any

from adavipro_fast import cli
from adavipro_fast.export.onnx_export import OnnxConfig, export
from adavipro_fast.files.sealed import describe_onnx
from adavipro_fast.method.config import QUANTISED

# With fewer held-out images a warning is printed.
FEW = 100


def main() -> None:
    """Parse, export, print."""
    cli.main(OnnxConfig, export, summary)


def summary(result: dict[str, Any]) -> str:
    """Format the file, its difference from PyTorch, and the next commands."""
    path, error = result["path"], result["max_abs_error"]
    checked = (
        f"verified: embeddings within {error:.1e} of PyTorch"
        if result["verified"]
        else (f"not verified: {result['reason']}")
    )
    quantised = ""
    if result["precision"] in QUANTISED:
        quantised = (
            f"{result['loss_points']:.1f} points of {result['measure']} lost on "
            f"{result['judged_images']} images, {len(result['wide'])} of {result['products']} "
            "products left in fp32\n"
        )
        if result["judged_images"] < FEW:
            quantised += "warning: so few images say little about accuracy; use some hundred\n"
    task = ""
    if describe_onnx(Path(path)).open_for is not None:
        task = " --task F.task"
        checked += "\nadd tasks: adavipro-to-task CHECKPOINT --output F.task"
    return (
        f"{path}: {result['graph']}, {result['precision']}, {result['input']} input, "
        f"{result['bytes'] / 1e6:.1f} MB\n{quantised}{checked}\n"
        f"measure:  adavipro-evaluate {path}{task}\n"
        f"classify: adavipro-predict {path} IMAGE{task}"
    )


if __name__ == "__main__":
    main()
