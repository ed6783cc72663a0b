"""Where a training step's time goes, how fast epochs are, and when an accuracy is reached.

    python bench/training.py --model ViT-B-32 --batch 32 --json FILE

Rows vp, vp_stock_attention (under PyTorch's own attention), adavipro_paper_form (the generator as
the paper writes it) and adavipro (the default path), interleaved in one process; peak memory comes
from a process of its own per row. The parts of a step are timed in steps of their own.
`epoch_first` decodes JPEG files, `epoch_cached` reads the cache; `to_accuracy_*` trains the
embedded demo.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from adavipro_fast import AdaViPro, cli, load_encoder
from adavipro_fast.device import full_fp32, torch_device
from adavipro_fast.method.config import Method, Precision
from adavipro_fast.method.encoder import FrozenEncoder
from adavipro_fast.method.prompt import Prompted
from adavipro_fast.training.config import recipe
from adavipro_fast.training.start import start_run
from lib.loader import jpeg_folder, loaded, loader_rows
from lib.machine import peak_host_mib
from lib.paper_form import in_paper_form
from lib.process import result_of
from lib.table import Json, publish
from lib.timing import compared, interleaved_ms, summary, synchronise, timed_ms

NAMES = ("vp", "vp_stock_attention", "adavipro_paper_form", "adavipro")
CLASSES = 100
PARTS_ROUNDS = 5
DEMO_EPOCHS = 20
# They take gigabytes, and the step after them pays: in turn with vp, but not with the others.
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
    device: cli.Device = "auto"
    only: str | None = None
    """run one row's step three times and print its peak memory"""
    json: Json = None


class Step:
    """One training step, whole or part by part.

    Args:
        name: of the row.
        encoder: in the precision of training, on its device.
        config: of the bench.
    """

    def __init__(self, name: str, encoder: FrozenEncoder, config: TrainingConfig) -> None:
        self.device = torch_device(config.device)
        encoder = encoder.with_(precision=config.precision, lean=name != "vp_stock_attention")
        side = encoder.preprocess.size
        with torch.no_grad():
            width = encoder(torch.zeros(1, 3, side, side, device=self.device)).shape[1]
        embeddings = F.normalize(torch.randn(CLASSES, width), dim=-1)
        method: Method = "vp" if name.startswith("vp") else "adavipro"
        prompt = replace(recipe("best").prompt, method=method)
        model = AdaViPro(encoder, embeddings, prompt).to(self.device).train()
        self.model = in_paper_form(model) if name == "adavipro_paper_form" else model
        if name == "adavipro_plain":
            self.model.prompt.kernel = "plain"
        self.optimiser = torch.optim.SGD(self.model.prompt.parameters(), lr=1e-3, momentum=0.9)
        shape = (config.batch, 3, side, side)
        self.pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
        self.labels = torch.randint(0, CLASSES, (config.batch,))
        self.images, self.targets = self.pixels, self.labels
        self.prompted = Prompted(*3 * [self.pixels])
        self.loss = torch.zeros(())

    def data(self) -> None:
        """Gather a batch and bring it to the device."""
        order = torch.randperm(len(self.pixels))
        self.images = self.pixels[order].to(self.device)
        self.targets = self.labels[order].to(self.device)

    def prompt(self) -> None:
        """Prompt the images."""
        self.prompted = self.model.prompt(self.images, tau=1.0)

    def encoder(self) -> None:
        """Run the frozen encoder and the loss."""
        logits = self.model.classify(self.prompted.images, self.prompted.mask).logits
        self.loss = F.cross_entropy(logits, self.targets)

    def backward(self) -> None:
        """Differentiate encoder and prompt."""
        self.optimiser.zero_grad()
        self.loss.backward()

    def optimise(self) -> None:
        """Update the prompt."""
        self.optimiser.step()

    @property
    def parts(self) -> dict[str, Callable[[], None]]:
        """The parts in order."""
        return {
            "data_ms": self.data,
            "prompt_ms": self.prompt,
            "encoder_ms": self.encoder,
            "backward_ms": self.backward,
            "optimiser_ms": self.optimise,
        }

    def __call__(self) -> None:
        """Run all parts."""
        for part in self.parts.values():
            part()

    def timed_parts(self, rounds: int) -> dict[str, float]:
        """Return each part's median, ms."""
        times: dict[str, list[float]] = {name: [] for name in self.parts}
        for _ in range(rounds):
            for name, part in self.parts.items():
                times[name].append(timed_ms(part, self.device))
        return {name: median(values) for name, values in times.items()}


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
    rows = step_rows(encoder, config)
    count = config.batch * (2 if config.quick else 8)
    rows += loader_rows(encoder.preprocess, device, count=count, batch=config.batch)
    if config.quick:
        names = ("epoch_first", "epoch_cached")
        rows += [{"name": name, "skipped": "--quick: no epochs"} for name in names]
    else:
        rows += epoch_rows(encoder, config, count)
    if config.to_accuracy:
        rows += [accuracy_row(method, config) for method in ("vp", "adavipro")]
    else:
        reason = "--quick: no accuracy" if config.quick else "--to-accuracy 0"
        rows += [{"name": f"to_accuracy_{m}", "skipped": reason} for m in ("vp", "adavipro")]
    title = f"training: {config.model}, {config.precision}, batch {config.batch}, {device}"
    hidden = ("iqr_ms", "ratio_to_decode", "ratio_to_first", "val_top1", "epochs", "seconds")
    return publish(rows, device, config.json, title, hidden)


def step_rows(encoder: FrozenEncoder, config: TrainingConfig) -> list[dict[str, Any]]:
    """Time the step of every variant in turn."""
    device = torch_device(config.device)
    steps = {name: Step(name, encoder, config) for name in NAMES}
    fused = steps["adavipro"].model.prompt.path(device) == "fused"
    if fused:
        steps["adavipro_plain"] = Step("adavipro_plain", encoder, config)
    times, base = {}, {}
    for group in (steps.keys() - APART, APART):
        some = {name: step for name, step in steps.items() if name in group | {"vp"}}
        warm_up = 0 if config.quick else 1
        measured = interleaved_ms(some, device, rounds=config.rounds, warm_up=warm_up)
        for name in group:
            times[name], base[name] = measured[name], measured["vp"]
    rows = [
        {"name": name, **step_figures(times[name], base[name], config)}
        | ({} if config.quick else {"peak_mib": peak_mib(name, config)})
        | step.timed_parts(1 if config.quick else PARTS_ROUNDS)
        for name, step in steps.items()
    ]
    if not fused:
        reason = "the fused kernel needs a CUDA device; adavipro took the collapsed PyTorch path"
        rows.append({"name": "adavipro_fused", "skipped": reason})
    return rows


def step_figures(
    times_ms: list[float], base_ms: list[float], config: TrainingConfig
) -> dict[str, Any]:
    """Return a step's time, its ratio to that of vp, and the images that it makes a second."""
    figures = summary(times_ms)
    return {
        "step_ms": figures["median_ms"],
        "iqr_ms": figures["iqr_ms"],
        **compared(times_ms, base_ms, "ratio_to_vp"),
        "images_per_s": 1e3 * config.batch / figures["median_ms"],
    }


def peak_mib(name: str, config: TrainingConfig) -> float:
    """Run a row alone in a new process and return its peak memory, MiB."""
    result = result_of(
        *(__file__, "--model", config.model, "--batch", config.batch, "--device", config.device),
        *("--precision", config.precision, "--only", name),
    )
    return float(result["peak_mib"])


def own_peak_mib(config: TrainingConfig) -> float:
    """Run a row's step here and return the peak memory of this process or of its GPU, MiB."""
    assert config.only is not None
    device = torch_device(config.device)
    encoder = load_encoder(config.model).to(device)
    step = Step(config.only, encoder, config)
    for _ in range(3):
        step()
    synchronise(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return peak_host_mib()


def epoch_rows(encoder: FrozenEncoder, config: TrainingConfig, count: int) -> list[dict[str, Any]]:
    """Time whole epochs of adavipro on `count` images, from files and from the cache."""
    device = torch_device(config.device)
    step = Step("adavipro", encoder, config)
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
    """Train the demo until an epoch's validation accuracy reaches what was asked for."""
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
