"""A bench's output: its rows as a table, a chart and a file."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from adavipro_fast.files.whole import write_whole
from lib.machine import machine, peak_host_mib

PLAIN_WIDTH = 160

# Options of several benches.
Json = Annotated[Path | None, tyro.conf.arg(help="file for the rows")]
Plot = Annotated[Path | None, tyro.conf.arg(help="picture of the rows, PNG or SVG")]


def show(rows: list[dict[str, Any]], title: str, hidden: Collection[str] = ()) -> None:
    """Print the rows as a table on stderr, and below it why the others have no figures."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    measured = [row for row in rows if "skipped" not in row]
    keys = dict.fromkeys(key for row in measured for key in row)
    columns = [key for key in keys if key not in hidden]
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name == "name" else "right")
    for row in measured:
        table.add_row(*(cell(row.get(name, "")) for name in columns))
    console.print(table)
    for row in rows:
        if "skipped" in row:
            console.print(f"{row['name']}: {row['skipped']}", markup=False)


def cell(value: object) -> str:
    """Write a figure with the digits that it deserves."""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def draw(rows: list[dict[str, Any]], path: Path, *, value: str, label: str) -> None:
    """Draw a figure of the rows as bars, their ratios beside them.

    Args:
        rows: those without the figure are left out.
        path: PNG or SVG.
        value: the figure's name.
        label: what the axis says.
    """
    mpl.rcParams["svg.hashsalt"] = "adavipro_fast"
    drawn = [row for row in rows if value in row]
    figure = Figure(figsize=(8, 0.8 + 0.3 * len(drawn)), layout="constrained")
    axes = figure.subplots()
    places = range(len(drawn))
    bars = axes.barh(places, [row[value] for row in drawn])
    axes.set_yticks(places, [row["name"] for row in drawn])
    labels = [f"{row['ratio']:.2f}x" if "ratio" in row else "" for row in drawn]
    axes.bar_label(bars, labels, padding=3)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def publish(
    rows: list[dict[str, Any]],
    device: torch.device,
    path: Path | None,
    title: str,
    hidden: Collection[str] = (),
) -> dict[str, Any]:
    """Show the rows, write them where asked, and return them with the machine's description.

    Args:
        rows: what was measured.
        device: where.
        path: file for all of it.
        title: of the table.
        hidden: figures that the table has no room for.
    """
    show(rows, title, hidden)
    result = {"rows": rows, "machine": machine(device) | {"peak_host_mib": peak_host_mib()}}
    if path is not None:
        write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
    return result
