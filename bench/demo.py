"""Train the embedded demo, export it, evaluate and time what was exported: `make demo`.

The last line is one JSON object: the figures of training, and those of later steps under `onnx`,
`engine` and `latency`.
"""

import os
import sys
from pathlib import Path
from typing import Any

import latency

from adavipro_fast import cli, evaluate, train
from adavipro_fast.export import onnx_export, to_onnx, to_tensorrt
from adavipro_fast.training.config import recipe
from adavipro_fast.training.run import start_run

# The paper's RTX 3090; TensorRT-RTX can build for it without a GPU.
COMPUTE_CAPABILITY = "8.6"


def main() -> None:
    """Train, export, evaluate, print."""
    cli.run(demo, summary)


def demo() -> dict[str, Any]:
    """Run the complete workflow on the built-in demo."""
    say("1/4 train a prompt for the embedded task")
    result = start_run(recipe("best"))
    say(train.summary(result))
    checkpoint = Path(result["checkpoint"])
    return result | {
        "onnx": export_onnx(checkpoint),
        "engine": build_engine(checkpoint),
        "latency": time_it(),
    }


def export_onnx(checkpoint: Path) -> dict[str, Any]:
    """Export the checkpoint as ONNX and evaluate the file."""
    say("\n2/4 export to ONNX, and evaluate the file")
    path = checkpoint.with_name("demo.onnx")
    exported = onnx_export.export(onnx_export.OnnxConfig(checkpoint, path, input="uint8"))
    say(to_onnx.summary(exported))
    evaluated = evaluate.command(evaluate.EvaluateConfig(path))
    say(evaluate.summary(evaluated))
    return exported | {"evaluate": evaluated}


def build_engine(checkpoint: Path) -> dict[str, Any]:
    """Build a TensorRT-RTX engine if TensorRT-RTX is installed."""
    say(f"\n3/4 build a TensorRT-RTX engine for compute capability {COMPUTE_CAPABILITY}")
    config = to_tensorrt.TensorRtConfig(
        checkpoint,
        checkpoint.with_name("demo.engine"),
        runtime="tensorrt-rtx",
        compute_capability=(COMPUTE_CAPABILITY,),
    )
    try:
        built = to_tensorrt.command(config)
    except ImportError as error:
        say(f"skipped: {error}")
        return {"skipped": str(error)}
    say(to_tensorrt.summary(built))
    return built


def time_it() -> dict[str, Any]:
    """Time the demo's encoder with and without a prompt, in every installed runtime."""
    say("\n4/4 measure latency")
    return latency.command(latency.LatencyConfig("demo", quick=True))


def summary(result: dict[str, Any]) -> str:
    """Format the accuracy, the files and the next commands."""
    onnx, folder = result["onnx"], Path(result["checkpoint"]).parent
    rows = {row["name"]: row for row in result["latency"]["rows"]}
    folded = rows["onnx_folded"]
    engine = ", demo.engine" if "path" in result["engine"] else ""
    python = os.path.relpath(sys.executable)
    images = folder / "images"
    return (
        f"reached: top-1 {onnx['evaluate']['top1']:.1f} % by the ONNX file, zero-shot "
        f"{result['zero_shot_top1']:.1f} %; trained in {result['seconds']:.0f} s\n"
        f"latency: {folded['p50_ms']:.1f} ms with the prompt, {folded['ratio']:.2f} "
        f"({folded['ratio_low']:.2f} to {folded['ratio_high']:.2f}) times the encoder alone\n"
        f"files:   {folder}/ has checkpoint.safetensors, demo.onnx{engine}, and to look at\n"
        f"         masks.png and curves.png\n"
        f"next:    {python} -m adavipro_fast.demo images --output {images}\n"
        f"         {python} -m adavipro_fast.predict {onnx['path']} \\\n"
        f"             {images}/test/*/000?.png --picture {folder / 'predictions.png'}\n"
        f"         docs/pages/quickstart.md: the same on your own images"
    )


def say(line: str) -> None:
    """Print a line on stderr."""
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
