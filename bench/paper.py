"""Rerun the paper's tables and figures: `python bench/paper.py --table 2` or `--figure 4`.

`--evidence` compares the two recipes with each other and, under the better one, with a fixed
prompt, with images shrunk by a margin, and with masks shuffled between images.

By default: the nine data sets under --data-root, OpenAI's CLIP ViT-B/32, and the paper's recipe and
budget, which need a GPU. Any other encoder, folder and budget can be chosen:

    python bench/paper.py --table 1 --model local-dir:my_clip --data my_images --epochs 3

A cell is one training run in its own folder. Finished cells are kept, and an interrupted one is
resumed (full fine-tuning: started again), so the command can be stopped at any time.
"""

import csv
import io
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from PIL import Image

from adavipro_fast import cli, pictures
from adavipro_fast.files.whole import write_whole
from lib.cells import PUBLISHED, Lines, Sweep, cells_of, opened, run_cells, shuffle_masks
from lib.machine import ROOT

SIZES = (5, 30, 60, 90, 112)

# The lines of each table: their names and flags.
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

# Recipe paper uses batches of 128: with its default of 256, short runs would have half the steps.
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


@dataclass(frozen=True)
class PaperConfig:
    """Rerun a table or a figure of the paper."""

    table: Literal[1, 2, 3, 4, 5, 6, 7] | None = None
    """1 methods, 2 prompt sizes, 3 parameters, 4 edges, 5 temperature decay, 6 regions, 7 D"""
    figure: Literal[2, 4] | None = None
    """2 accuracy over prompt size, 4 images with their masks"""
    evidence: bool = False
    """recipe best, its controls and recipe paper, at sizes 30 and 112: best.csv"""
    sweep: Sweep = field(default_factory=Sweep)
    output: Path = ROOT / "bench" / "results" / "paper"
    """folder of tables and figures"""


def mean_of(rows: Sequence[dict[str, Any]], data: str, line: str, figure: str) -> float:
    """Average a figure of a cell over its seeds."""
    found = [float(row[figure]) for row in rows if row["data"] == data and row["line"] == line]
    return statistics.mean(found)


def markdown(rows: Sequence[dict[str, Any]], figure: str) -> str:
    """Format a table of lines by data sets, with the paper's figures, if known, in brackets."""
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


def compare_recipes(config: PaperConfig) -> dict[str, Any]:
    """Run the evidence for recipe best, including shuffled masks, and write best.csv."""
    cells = cells_of(EVIDENCE, config.sweep)
    rows = run_cells(cells, config.sweep)
    for cell, row in zip(cells, list(rows), strict=True):
        if cell.line.startswith("best adavipro"):
            top1 = shuffle_masks(cell, config.sweep)
            rows.append(row | {"line": f"{cell.line}, masks shuffled", "test_top1": top1})
    return write_rows(rows, "best", config)


def write_table(number: int, config: PaperConfig) -> dict[str, Any]:
    """Run a table's cells and write it."""
    rows = run_cells(cells_of(LINES[number], config.sweep), config.sweep)
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
    rows = run_cells(cells_of(LINES[2], config.sweep), config.sweep)
    sets = list(dict.fromkeys(row["data"] for row in rows))
    figure = Figure(figsize=(3.4 * len(sets), 3), layout="constrained")
    # The same scale for all sets, so that noise does not look like a difference.
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
    """Draw Figure 4: test images with VP and AdaViPro at sizes 30 and 60, in rows."""
    wanted = {f"{method} {size}" for method in ("vp", "adavipro") for size in (30, 60)}
    cells = [c for c in cells_of(LINES[2], config.sweep) if c.line in wanted and c.seed == 0]
    run_cells(cells, config.sweep)
    strips = []
    for cell in cells:
        model, test = opened(cell, config.sweep)
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
    """Make the requested table or figure.

    Raises:
        ValueError: none or several are requested.
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
    cli.main(PaperConfig, command)


if __name__ == "__main__":
    main()
