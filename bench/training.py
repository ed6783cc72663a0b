"""Time of training: steps and their parts, epochs, and the time to reach an accuracy.

    python bench/training.py --model ViT-B-32 --batch 32 --json FILE

The rows vp, vp_stock_attention (with PyTorch's own attention), adavipro_paper_form (the generator
as in the paper) and adavipro (the default) are interleaved in one process. Peak memory is measured
in a separate process per row, or on a GPU by torch's allocator. Pixels are on the device, as in
training. The parts of a step are timed in separate steps. `epoch_first` decodes JPEG files,
`epoch_cached` reads the cache, and `to_accuracy_*` trains the demo.
"""

import json
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adavipro_fast import cli, load_encoder
from adavipro_fast.device import full_fp32, torch_device
from adavipro_fast.method.config import Method, Precision
from adavipro_fast.method.encoder import FrozenEncoder
from adavipro_fast.training.config import recipe
from adavipro_fast.training.run import start_run
from lib.loader import jpeg_folder, loaded, loader_rows
from lib.machine import peak_host_mib
from lib.process import result_of
from lib.table import Append, Json, Rows
from lib.timing import compared, interleaved_ms, summary, synchronise
from lib.training_step import TrainingStep

NAMES = ("vp", "vp_stock_attention", "adavipro_paper_form", "adavipro")
PARTS_ROUNDS = 5
# Steps per timed call on a GPU, where the host prepares the next step while the GPU computes.
BLOCK = 10
DEMO_EPOCHS = 20
# These rows need gigabytes, which slows the step after them, so each is timed only with vp.
APART = {"vp_stock_attention", "adavipro_paper_form"}


@dataclass(frozen=True)
class TrainingConfig:
    """Time training: a step and its parts, epochs from files and from the cache, an accuracy."""

    model: str = "ViT-B-32"
    """open_clip model name; random weights"""
    batch: int = 32
    """images per step"""
    precision: Precision = "bf16"
    """of the encoder"""
    rounds: int = 11
    """timed steps of each row"""
    to_accuracy: float = 45.0
    """validation top-1 of the demo whose time is told, percent; 0 leaves the row out"""
    quick: bool = False
    """under a minute: small batches, few rounds, no memory, epochs or accuracy"""
    steps_only: bool = False
    """leave out the loader, epochs and the accuracy"""
    device: cli.Device = "auto"
    only: str | None = None
    """run one row's step three times and print its peak memory"""
    json: Json = None
    append: Append = False


def main() -> None:
    """Parse, measure, print."""
    cli.main(TrainingConfig, command)


@full_fp32()
def command(config: TrainingConfig) -> dict[str, Any]:
    """Measure all rows, or one row's memory."""
    if config.only is not None:
        return {"peak_mib": own_peak_mib(config)}
    if config.quick:
        config = replace(config, rounds=2, to_accuracy=0.0, batch=min(config.batch, 4))
    device = torch_device(config.device)
    encoder = load_encoder(config.model).to(device)
    rows = Rows(device, config.json, append=config.append)
    step_rows(encoder, config, rows)
    if not config.steps_only:
        other_rows(encoder, config, rows)
    title = f"training: {config.model}, {config.precision}, batch {config.batch}, {device}"
    hidden = ("iqr_ms", "ratio_to_decode", "ratio_to_first", "val_top1", "epochs", "seconds")
    return rows.published(title, (*hidden, "model", "batch"))


def other_rows(encoder: FrozenEncoder, config: TrainingConfig, rows: Rows) -> None:
    """Measure the loader, complete epochs and the time to an accuracy."""
    device = torch_device(config.device)
    count = config.batch * (2 if config.quick else 8)
    rows += loader_rows(encoder.preprocess, device, count=count, batch=config.batch)
    if config.quick:
        names = ("epoch_first", "epoch_cached")
        rows += [{"name": name, "skipped": "--quick: no epochs"} for name in names]
    else:
        rows += epoch_rows(encoder, config, count)
    if config.to_accuracy:
        rows += (accuracy_row(method, config) for method in ("vp", "adavipro"))
    else:
        reason = "--quick: no accuracy" if config.quick else "--to-accuracy 0"
        rows += [{"name": f"to_accuracy_{m}", "skipped": reason} for m in ("vp", "adavipro")]


def step_rows(encoder: FrozenEncoder, config: TrainingConfig, rows: Rows) -> None:
    """Time the step of every variant in turn."""
    device = torch_device(config.device)
    names = [*NAMES, "adavipro_plain"] if device.type == "cuda" else list(NAMES)
    steps = {}
    for name in names:
        step = rows.attempt(
            name, partial(TrainingStep, name, encoder, config.batch, config.precision)
        )
        if step is not None:
            steps[name] = step
    times = timed_steps(steps, device, config)
    for name, step in steps.items():
        figures = step_figures(*times[name], config) | memory(name, step, config)
        figures |= step.timed_parts(1 if config.quick else PARTS_ROUNDS)
        if device.type == "cuda":
            figures |= rows.attempt(f"{name}_profile", step.kernel_ms) or {}
        rows.append({"name": name, "model": config.model, "batch": config.batch, **figures})
    if device.type != "cuda":
        reason = "the fused kernel needs a CUDA device; adavipro took the collapsed PyTorch path"
        rows.append({"name": "adavipro_fused", "skipped": reason})


def timed_steps(
    steps: dict[str, TrainingStep], device: torch.device, config: TrainingConfig
) -> dict[str, tuple[list[float], list[float]]]:
    """Return the times of every step, ms, and those of vp in the same rounds."""
    block = BLOCK if device.type == "cuda" else 1
    times = {}
    for group in (steps.keys() - APART, steps.keys() & APART):
        some = {n: s.repeated(block) for n, s in steps.items() if n in group | {"vp"}}
        warm_up = 0 if config.quick else 1
        measured = interleaved_ms(some, device, rounds=config.rounds, warm_up=warm_up)
        for name in group:
            own, base = ([ms / block for ms in measured[n]] for n in (name, "vp"))
            times[name] = own, base
    return times


def step_figures(
    times_ms: list[float], base_ms: list[float], config: TrainingConfig
) -> dict[str, Any]:
    """Return a step's time, its ratio to vp's, and its images per second."""
    figures = summary(times_ms)
    return {
        "step_ms": figures["median_ms"],
        "iqr_ms": figures["iqr_ms"],
        **compared(times_ms, base_ms, "ratio_to_vp"),
        "images_per_s": 1e3 * config.batch / figures["median_ms"],
    }


def memory(name: str, step: TrainingStep, config: TrainingConfig) -> dict[str, float]:
    """Return a row's peak memory; skipped with --quick on a CPU, where it needs a process."""
    if step.device.type == "cuda":
        return {"peak_mib": step.own_device_mib()}
    return {} if config.quick else {"peak_mib": peak_mib(name, config)}


def peak_mib(name: str, config: TrainingConfig) -> float:
    """Run a row alone in a new process and return its peak memory, MiB."""
    result = result_of(
        *(__file__, "--model", config.model, "--batch", config.batch, "--device", config.device),
        *("--precision", config.precision, "--only", name),
    )
    return float(result["peak_mib"])


def own_peak_mib(config: TrainingConfig) -> float:
    """Run a row's step here and return the peak memory of this process, MiB."""
    assert config.only is not None
    device = torch_device(config.device)
    encoder = load_encoder(config.model).to(device)
    step = TrainingStep(config.only, encoder, config.batch, config.precision)
    step.repeated(3)()
    return peak_host_mib()


def epoch_rows(encoder: FrozenEncoder, config: TrainingConfig, count: int) -> list[dict[str, Any]]:
    """Time complete epochs of adavipro on `count` images, from files and from the cache."""
    device = torch_device(config.device)
    step = TrainingStep("adavipro", encoder, config.batch, config.precision)
    seconds = {}
    with jpeg_folder(count) as folder:
        for name in ("epoch_first", "epoch_cached"):
            began = time.perf_counter()
            split = loaded(folder, encoder.preprocess).resident(device)
            for positions in torch.arange(count).split(config.batch):
                step.images, step.targets = split.batch(positions, device)
                for part in (step.prompt, step.encoder, step.backward, step.optimise):
                    part()
            synchronise(device)
            seconds[name] = time.perf_counter() - began
    first = seconds["epoch_first"]
    return [
        {"name": name, "images_per_s": count / taken, "ratio_to_first": first / taken}
        for name, taken in seconds.items()
    ]


def accuracy_row(method: Method, config: TrainingConfig) -> dict[str, Any]:
    """Train the demo until an epoch's validation accuracy reaches the target."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        best = recipe("best")
        start_run(
            replace(
                best,
                prompt=replace(best.prompt, method=method),
                optimiser=replace(best.optimiser, epochs=DEMO_EPOCHS),
                device=config.device,
                output=output,
            )
        )
        lines = (output / "metrics.jsonl").read_text().splitlines()
    seconds, row = 0.0, {"name": f"to_accuracy_{method}", "val_top1": config.to_accuracy}
    for epoch in map(json.loads, lines):
        seconds += epoch["seconds"]
        if epoch["val_top1"] >= config.to_accuracy:
            return row | {"epochs": epoch["epoch"], "seconds": seconds}
    reached = max(json.loads(line)["val_top1"] for line in lines)
    reason = f"{DEMO_EPOCHS} epochs reached {reached:.1f} %, not {config.to_accuracy:.1f} %"
    return {"name": row["name"], "skipped": reason}


if __name__ == "__main__":
    main()
