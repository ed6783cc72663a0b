"""Accuracy over images/s: exported files of one checkpoint in each runtime of the CPU.

    python bench/precisions.py fp32.onnx int8.onnx --data my_images --plot docs/pages/precisions.svg

Files are timed in turn on the same batch; without `--data` nothing is said about accuracy.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import torch
import tyro
from matplotlib.figure import Figure

from adavipro_fast import cli, open_artifact
from adavipro_fast.artifact.description import Artifact, Runtime
from adavipro_fast.data.sets import DataConfig, load_test
from adavipro_fast.data.split import Split
from adavipro_fast.evaluate import evaluate_artifact
from adavipro_fast.export.verify import sample_batches
from lib.table import Json, Plot, publish
from lib.timing import compared, percentiles, until_steady

RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "openvino")
EVALUATED_IN = 32
CPU = torch.device("cpu")


@dataclass(frozen=True)
class PrecisionsConfig:
    """Measure files of one checkpoint, the first one in ONNX Runtime being what others are to."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """.onnx files, such as --precision fp32 and int8"""
    data: str | None = None
    """labelled images whose test split is classified"""
    batch: int = 16
    """images of a timed call"""
    seconds: float = 20.0
    """time for each file in each runtime"""
    json: Json = None
    plot: Plot = None


def command(config: PrecisionsConfig) -> dict[str, Any]:
    """Open each file in each runtime, classify the test images, time a batch."""
    if not config.files:
        raise ValueError("no file was named; use precisions FILE.onnx [FILE.onnx ...]")
    opened = {
        f"{path.stem}, {runtime}": open_artifact(path, device="cpu", runtime=runtime)
        for path in config.files
        for runtime in RUNTIMES
    }
    first, *others = opened
    about = opened[first].about
    pixels = torch.cat(sample_batches(about.preprocess, None))
    batch = pixels[torch.arange(config.batch) % len(pixels)]
    test = None
    if config.data is not None:
        names, test = load_test(DataConfig(config.data), about.preprocess)
        if names != about.class_names:
            raise ValueError(f"{config.data} has other classes than {config.files[0]}")
    rows = [described(name, artifact, test) for name, artifact in opened.items()]
    works = {name: partial(artifact, batch) for name, artifact in opened.items()}
    bases = dict.fromkeys(others, first)
    times = until_steady(works, CPU, seconds=config.seconds, bases=bases)
    for row in rows:
        own = times[row["name"]]
        row.update(percentiles(own))
        row["images_per_s"] = 1e3 * config.batch / row["p50_ms"]
        if row["name"] != first:
            row.update(compared(own, times[first]))
    if config.plot is not None and test is not None:
        draw(rows, config.plot)
    return publish(rows, CPU, config.json, f"batch {config.batch}, bytes in")


def described(name: str, artifact: Artifact, test: Split | None) -> dict[str, Any]:
    """Return a file's row, with its accuracy where there are images."""
    row = {"name": name, "precision": artifact.about.precision, "backend": artifact.backend}
    if test is None:
        return row
    found = evaluate_artifact(artifact, test, EVALUATED_IN)
    return row | {"top1": found.top1, "images": len(test)}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy over images/s."""
    mpl.rcParams["svg.hashsalt"] = "adavipro_fast"
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        point = (row["images_per_s"], row["top1"])
        axes.plot(*point, "o" if row["backend"] == "onnxruntime" else "s")
        axes.annotate(row["name"], point, textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set(xlabel="images/s", ylabel="top-1 on test, %", xlim=(0, None))
    axes.margins(x=0.3, y=0.3)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Parse, run, print."""
    cli.main(PrecisionsConfig, command)


if __name__ == "__main__":
    main()
