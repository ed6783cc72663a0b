"""Rerun the paper's tables and figures: `python bench/paper.py --table 2` or `--figure 4`.

`--evidence` compares the two recipes with each other, with a fixed prompt under the better one,
with images shrunk by a margin, and with masks shuffled between images.

Without other flags: the nine data sets under --data-root, CLIP ViT-B/32 of OpenAI, the paper's
recipe and budget, which takes a GPU. Any encoder, folder and budget can be named instead:

    python bench/paper.py --table 1 --model local-dir:my_clip --data my_images --epochs 3

A cell is one training run in a folder of its own. Finished cells are kept, and an interrupted one
is resumed (full fine-tuning: started again), so that the command can be stopped at any time.
"""

import csv
import hashlib
import io
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any, Literal

import matplotlib as mpl
import torch
import tyro
from matplotlib.figure import Figure
from measure import ROOT
from PIL import Image

from adavipro_fast import AdaViPro, cli
from adavipro_fast.artifact.torch import TorchArtifact
from adavipro_fast.data.metrics import evaluate
from adavipro_fast.data.sets import DataConfig, load_test
from adavipro_fast.data.split import Split
from adavipro_fast.errors import VerificationError
from adavipro_fast.files.whole import write_whole
from adavipro_fast.method.functional import apply_prompt
from adavipro_fast.training import pictures
from adavipro_fast.training.config import recipe
from adavipro_fast.training.trainer import EVAL_BATCH

NINE = (
    *("cifar100", "cifar10", "flowers102", "food101", "eurosat", "sun397", "ucf101", "pets", "dtd"),
)
SIZES = (5, 30, 60, 90, 112)
Flags = tuple[tuple[str, str], ...]
Lines = list[tuple[str, dict[str, object]]]

# What a table compares: the name of each line and the flags that make it.
LINES: dict[int, Lines] = {
    1: [
        (method, {"method": method})
        for method in ("zero_shot", "linear_probe", "vp", "adavipro", "full_finetune")
    ],
    2: [
        (f"{method} {size}", {"method": method, "prompt-size": size})
        for size in SIZES
        for method in ("vp", "adavipro")
    ],
    4: [
        ("default edges", {}),
        ("sobel", {"edge": "sobel"}),
        ("without edges", {"edge": "none"}),
    ],
    5: [(f"decay {decay}", {"tau-decay": decay}) for decay in (0.9, 0.94, 0.98, 0.99)],
    6: [(f"region {region}", {"region-size": region}) for region in (8, 16, 32, 56)],
    7: [(f"D {width}", {"embed-dim": width}) for width in (8, 16, 32, 64)],
}
LINES[3] = LINES[1] + [("adavipro, D 8", {"method": "adavipro", "embed-dim": 8})]

# Recipe paper gets 128: at its own 256 short runs would have half as many steps.
EVIDENCE: Lines = [
    (line.format(size), {"prompt-size": size, "recipe": line.split()[0], **flags})
    for size in (30, 112)
    for line, flags in (
        ("best adavipro {}", {}),
        ("best vp {}", {"method": "vp"}),
        ("best adavipro {}, margin 30", {"margin": 30}),
        ("best vp {}, margin 30", {"method": "vp", "margin": 30}),
        ("paper adavipro {}", {"batch-size": 128}),
    )
]

FROM_FLAGS = ("recipe", "batch_size", "prompt_size")

# Figures that the paper's text gives, percent; its tables are not available.
PUBLISHED = {
    ("cifar10", "adavipro"): 95.4,
    ("eurosat", "adavipro"): 96.8,
    ("dtd", "vp 112"): 38.4,
    ("ucf101", "vp 112"): 54.5,
    ("ucf101", "region 56"): 70.9,
}


@dataclass(frozen=True)
class PaperConfig:
    """Rerun a table or a figure of the paper."""

    table: Literal[1, 2, 3, 4, 5, 6, 7] | None = None
    """1 methods, 2 prompt sizes, 3 parameters, 4 edges, 5 temperature decay, 6 regions, 7 D"""
    figure: Literal[2, 4] | None = None
    """2 accuracy over prompt size, 4 images with their masks"""
    evidence: bool = False
    """recipe best, its controls and recipe paper, at sizes 30 and 112: best.csv"""
    model: str = "ViT-B-32-quickgelu"
    """open_clip name or local-dir:PATH"""
    pretrained: str = "openai"
    """open_clip tag of the weights; leave empty with local-dir"""
    data: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """data-set name or folder; repeatable (default: the paper's nine)"""
    data_root: Path = Path("data")
    """where named data sets lie"""
    epochs: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """passes over the training images, one for all or one a data set (default: 1000)"""
    batch_size: int | None = None
    """images per step (default: the recipe's)"""
    prompt_size: int = 30
    """of tables 1 and 3 to 7"""
    recipe: Literal["paper", "best"] = "paper"
    """defaults of training"""
    seeds: int = 1
    """runs of each cell"""
    jobs: int = 1
    """cells at once; with several GPUs each job takes its own"""
    cells: Path = Path("runs") / "paper"
    """folder of the cells"""
    output: Path = ROOT / "bench" / "results" / "paper"
    """folder of tables and figures"""


@dataclass(frozen=True)
class Cell:
    """One training run."""

    data: str
    line: str
    seed: int
    epochs: int
    flags: Flags = field(default=())

    @property
    def key(self) -> str:
        """Folder name: the same settings are the same cell, whichever table asks for it."""
        flags = dict(self.flags)
        defaults = recipe(flags["recipe"], int(flags["prompt-size"]))
        text = json.dumps([self.flags, asdict(defaults.prompt), asdict(defaults.optimiser)])
        return f"{Path(self.data).name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def cells_of(lines: Lines, config: PaperConfig) -> list[Cell]:
    """List the runs that a table with these lines needs."""
    data = config.data or NINE
    epochs = config.epochs or (1000,)
    if len(epochs) == 1:
        epochs *= len(data)
    if len(epochs) != len(data):
        raise ValueError(
            f"{len(epochs)} --epochs for {len(data)} --data; give one, or one for each"
        )
    found = []
    for name, passes in zip(data, epochs, strict=True):
        for line, flags in lines:
            settings = recipe(str(flags.get("recipe", config.recipe)))
            for seed in range(config.seeds):
                values = {
                    "model": config.model,
                    "pretrained": config.pretrained,
                    "data": name,
                    "data-root": config.data_root,
                    "recipe": config.recipe,
                    "epochs": passes,
                    "batch-size": config.batch_size or settings.optimiser.batch_size,
                    "prompt-size": config.prompt_size,
                    "method": "adavipro",
                    "seed": seed,
                } | flags
                pairs = tuple(sorted((k, str(v)) for k, v in values.items() if v != ""))
                found.append(Cell(name, line, seed, passes, pairs))
    return found


def run_cell(cell: Cell, config: PaperConfig, devices: "SimpleQueue[str]") -> dict[str, Any]:
    """Return a cell's figures; train where they are not there yet.

    Raises:
        VerificationError: training failed.
    """
    folder = config.cells / cell.key
    kept = folder / "result.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    device = devices.get()
    try:
        flags = [part for name, value in cell.flags for part in (f"--{name}", value)]
        start = [*flags, "--output", str(folder), "--device", device]
        if (folder / "last.safetensors").exists():
            where = ["--device", device, "--accept-change", "device"]
            start = ["--resume", str(folder), *where]
        else:
            # What a run that cannot be resumed left behind.
            shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "adavipro_fast.train", *start]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    finally:
        devices.put(device)
    if done.returncode:
        raise VerificationError(f"cell failed: {' '.join(command)}")
    result = dict(json.loads(done.stdout.splitlines()[-1]))
    write_whole(kept, json.dumps(result, indent=1).encode())
    return result


def run_cells(cells: Sequence[Cell], config: PaperConfig) -> list[dict[str, Any]]:
    """Run cells side by side; return one row each."""
    devices: SimpleQueue[str] = SimpleQueue()
    for job in range(config.jobs):
        gpus = torch.cuda.device_count()
        devices.put(f"cuda:{job % gpus}" if gpus else "cpu")
    with ThreadPoolExecutor(config.jobs) as pool:
        results = list(pool.map(lambda cell: run_cell(cell, config, devices), cells))
    figures = ("zero_shot_top1", "val_top1", "test_top1", "last_test_top1", "trainable_params")
    masks = ("mask_density", "mask_adaptivity", "mask_placement")
    return [
        {
            "data": Path(cell.data).name,
            "line": cell.line,
            "seed": cell.seed,
            "epochs": cell.epochs,
            **{n: dict(cell.flags)[n.replace("_", "-")] for n in FROM_FLAGS},
            "published": PUBLISHED.get((cell.data, cell.line), ""),
            **{name: result[name] for name in (*figures, *masks)},
        }
        for cell, result in zip(cells, results, strict=True)
    ]


def mean_of(rows: Sequence[dict[str, Any]], data: str, line: str, figure: str) -> float:
    """Average a figure of a cell over its seeds."""
    found = [float(row[figure]) for row in rows if row["data"] == data and row["line"] == line]
    return statistics.mean(found)


def markdown(rows: Sequence[dict[str, Any]], figure: str) -> str:
    """Write a table: lines by data sets, the paper's figure in brackets where its text has one."""
    sets = list(dict.fromkeys(row["data"] for row in rows))
    text = ["| | " + " | ".join(sets) + " |", "|---" * (len(sets) + 1) + "|"]
    for line in dict.fromkeys(row["line"] for row in rows):
        cells = []
        for data in sets:
            value = mean_of(rows, data, line, figure)
            published = PUBLISHED.get((data, line))
            said = f" ({published})" if published and figure == "test_top1" else ""
            cells.append(
                (f"{value:,.0f}" if figure == "trainable_params" else f"{value:.1f}") + said
            )
        text.append(f"| {line} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def shuffle_masks(cell: Cell, config: PaperConfig) -> float:
    """Return a cell's test top-1, percent, with each image under the mask of another one."""
    model, test = opened(cell, config)
    batches = test.batches(EVAL_BATCH, torch.device("cpu"))
    with torch.no_grad():
        masks = torch.cat([model.prompt(pixels).mask for pixels, _ in batches])
        generator = torch.Generator().manual_seed(cell.seed)
        shuffled = masks[torch.randperm(len(masks), generator=generator)].split(EVAL_BATCH)
        others = iter(shuffled)

        def predict(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mask, images = next(others), model.prompt.normalised(pixels)
            assert model.prompt.template is not None
            return model.classify(apply_prompt(images, model.prompt.template(), mask), mask)[:2]

        return evaluate(predict, test.batches(EVAL_BATCH, torch.device("cpu"))).top1


def opened(cell: Cell, config: PaperConfig) -> tuple[AdaViPro, Split]:
    """Open a finished cell's best prompt and its test images."""
    checkpoint = config.cells / cell.key / "checkpoint.safetensors"
    artifact = TorchArtifact.open(
        checkpoint, model=config.model, pretrained=config.pretrained, device="cpu"
    )
    source = DataConfig(cell.data, config.data_root)
    return artifact.model, load_test(source, artifact.about.preprocess)[1]


def compare_recipes(config: PaperConfig) -> dict[str, Any]:
    """Run the evidence for recipe best, its shuffled masks included, and write best.csv."""
    cells = cells_of(EVIDENCE, config)
    rows = run_cells(cells, config)
    for cell, row in zip(cells, list(rows), strict=True):
        if cell.line.startswith("best adavipro"):
            top1 = shuffle_masks(cell, config)
            rows.append(row | {"line": f"{cell.line}, masks shuffled", "test_top1": top1})
    return write_rows(rows, "best", config)


def write_table(number: int, config: PaperConfig) -> dict[str, Any]:
    """Run a table's cells and write it."""
    rows = run_cells(cells_of(LINES[number], config), config)
    figure = "trainable_params" if number == 3 else "test_top1"
    return write_rows(rows, f"table{number}", config, figure)


def write_rows(
    rows: Sequence[dict[str, Any]], name: str, config: PaperConfig, figure: str = "test_top1"
) -> dict[str, Any]:
    """Write CSV and Markdown, and print the latter."""
    content = io.StringIO()
    writer = csv.DictWriter(content, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    path = config.output / f"{name}.csv"
    write_whole(path, content.getvalue().encode())
    text = markdown(rows, figure)
    write_whole(path.with_suffix(".md"), text.encode())
    print(text, file=sys.stderr)
    return {"path": str(path), "cells": len(rows), "rows": rows}


def draw_sizes(config: PaperConfig) -> dict[str, Any]:
    """Draw Figure 2: accuracy over prompt size, VP against AdaViPro."""
    rows = run_cells(cells_of(LINES[2], config), config)
    sets = list(dict.fromkeys(row["data"] for row in rows))
    mpl.use("Agg")
    figure = Figure(figsize=(3.4 * len(sets), 3), layout="constrained")
    # One scale for all sets, so that noise does not look like a difference.
    columns = figure.subplots(1, len(sets), squeeze=False, sharey=True)[0]
    for axes, data in zip(columns, sets, strict=True):
        for method in ("vp", "adavipro"):
            top1 = [mean_of(rows, data, f"{method} {size}", "test_top1") for size in SIZES]
            axes.plot(SIZES, top1, "o-", label=method)
        zero_shot = mean_of(rows, data, "vp 30", "zero_shot_top1")
        axes.axhline(zero_shot, color="grey", linestyle="--", label="zero-shot")
        axes.set(title=data, xlabel="prompt size, pixels", ylabel="top-1, %", xticks=SIZES)
        axes.legend(fontsize=7)
    path = config.output / "figure2.png"
    pictures.save(figure, path)
    return {"path": str(path), "cells": len(rows)}


def draw_masks(config: PaperConfig) -> dict[str, Any]:
    """Draw Figure 4: test images under VP and AdaViPro at 30 and 60, one below the other."""
    wanted = {f"{method} {size}" for method in ("vp", "adavipro") for size in (30, 60)}
    cells = [c for c in cells_of(LINES[2], config) if c.line in wanted and c.seed == 0]
    run_cells(cells, config)
    strips = []
    for cell in cells:
        model, test = opened(cell, config)
        chosen = torch.linspace(0, len(test) - 1, 8).long()
        pixels, _ = test.batch(chosen, torch.device("cpu"))
        titles = [f"{Path(cell.data).name}: {cell.line}"] + [""] * 7
        content = io.BytesIO()
        grid = pictures.mask_grid(model, pixels, titles)
        grid.savefig(content, format="png", bbox_inches="tight", dpi=60)
        strips.append(Image.open(content).convert("RGB"))
    whole = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    for number, strip in enumerate(strips):
        whole.paste(strip, (0, sum(s.height for s in strips[:number])))
    stored = io.BytesIO()
    whole.quantize(128).save(stored, "PNG", optimize=True)
    path = config.output / "figure4.png"
    write_whole(path, stored.getvalue())
    return {"path": str(path), "cells": len(cells)}


def command(config: PaperConfig) -> dict[str, Any]:
    """Make the table or figure that was asked for.

    Raises:
        ValueError: none was named, or both.
        VerificationError: a cell failed; the finished ones are kept.
    """
    if (config.table is not None) + (config.figure is not None) + config.evidence != 1:
        raise ValueError("name one of --table 1 to 7, --figure 2 or 4, and --evidence")
    if config.evidence:
        return compare_recipes(config)
    if config.table is not None:
        return write_table(config.table, config)
    return draw_sizes(config) if config.figure == 2 else draw_masks(config)


def main() -> None:
    """Parse, run, print."""
    config = cli.parse(PaperConfig)
    cli.run(lambda: command(config))


if __name__ == "__main__":
    main()
