"""Train the embedded demo, export it, evaluate and time what was exported: `make demo`.

The last line is one JSON object: training's figures, and the later steps' under `onnx`, `engine`
and `latency`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import latency

from adavipro_fast import cli, evaluate
from adavipro_fast.export import to_onnx, to_tensorrt
from adavipro_fast.training.config import recipe
from adavipro_fast.training.start import start_run

# TensorRT-RTX builds for a GPU that is not here; this is the RTX 3090 of the paper.
COMPUTE_CAPABILITY = "8.6"


def main() -> None:
    """Train, export, evaluate, print."""
    cli.run(demo)


def demo() -> dict[str, Any]:
    """Run the product's main job from end to end on its embedded default."""
    result = start_run(recipe("best"))
    checkpoint = Path(result["checkpoint"])
    return result | {
        "onnx": export_onnx(checkpoint),
        "engine": build_engine(checkpoint),
        "latency": time_it(),
    }


def export_onnx(checkpoint: Path) -> dict[str, Any]:
    """Export the checkpoint as ONNX and evaluate the file."""
    say("exporting to ONNX")
    path = checkpoint.with_name("demo.onnx")
    exported = to_onnx.command(to_onnx.OnnxConfig(checkpoint, path, input="uint8"))
    say(json.dumps(exported))
    return exported | {"evaluate": evaluate.command(evaluate.EvaluateConfig(path))}


def build_engine(checkpoint: Path) -> dict[str, Any]:
    """Build a TensorRT-RTX engine, where it can be installed."""
    say(f"building a TensorRT-RTX engine for compute capability {COMPUTE_CAPABILITY}")
    config = to_tensorrt.TensorRtConfig(
        checkpoint,
        checkpoint.with_name("demo.engine"),
        runtime="tensorrt-rtx",
        compute_capability=(COMPUTE_CAPABILITY,),
    )
    try:
        return to_tensorrt.command(config)
    except ImportError as error:
        return {"skipped": str(error)}


def time_it() -> dict[str, Any]:
    """Time the demo's encoder with and without a prompt, in every runtime at hand."""
    say("measuring latency")
    return latency.command(latency.LatencyConfig("demo", quick=True))


def say(line: str) -> None:
    """Tell what happens next."""
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
