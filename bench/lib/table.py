"""Output of benches: rows as a table, a chart and a file."""

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import matplotlib as mpl
import torch
import tyro
from matplotlib.figure import Figure

from adavipro_fast.errors import VerificationError
from adavipro_fast.files.whole import write_whole
from lib.machine import machine, peak_host_mib

# Columns that a narrow terminal leaves out, in this order.
SPARE = ("iqr_ms", "build_s", "p99_ms", "calls", "provider", "p90_ms", "ratio_high", "ratio_low")

MARKERS = {"torch": "^", "onnx": "o", "openvino": "s"}

# Options of several benches.
Json = Annotated[Path | None, tyro.conf.arg(help="file for the rows")]
Append = Annotated[bool, tyro.conf.arg(help="keep the rows that the file has already")]
Plot = Annotated[Path | None, tyro.conf.arg(help="picture of the rows, PNG or SVG")]


def show(rows: list[dict[str, Any]], title: str, hidden: Collection[str] = ()) -> None:
    """Print the rows on stderr as a table, no wider than the terminal."""
    width = shutil.get_terminal_size().columns
    measured = [row for row in rows if "skipped" not in row]
    lines = wrapped(title, width)
    if measured:
        lines += table(measured, hidden, width)
    lines += skipped([row for row in rows if "skipped" in row], width)
    print("\n".join(lines), file=sys.stderr)


def table(rows: list[dict[str, Any]], hidden: Collection[str], width: int) -> list[str]:
    """Format rows in columns; columns that do not fit into `width` are listed below."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in hidden]
    columns = {key: [key, *(cell(row.get(key, "")) for row in rows)] for key in keys}
    sizes = {key: max(map(len, column)) for key, column in columns.items()}
    left_out = []
    while sum(sizes.values()) + 2 * (len(sizes) - 1) > width and len(sizes) > 1:
        left_out.append(next((key for key in SPARE if key in sizes), list(sizes)[-1]))
        del sizes[left_out[-1]]
    lines = [
        "  ".join(
            columns[key][line].ljust(size) if key == "name" else columns[key][line].rjust(size)
            for key, size in sizes.items()
        )
        for line in range(len(rows) + 1)
    ]
    lines.insert(1, "  ".join("-" * size for size in sizes.values()))
    lines = [line[:width].rstrip() for line in lines]
    if left_out:
        lines += wrapped(f"no room for {', '.join(left_out)}: they are in the JSON", width)
    return lines


def skipped(rows: list[dict[str, Any]], width: int) -> list[str]:
    """List the skipped rows, grouped by reason."""
    names: dict[str, dict[str, None]] = {}
    for row in rows:
        # All reasons that begin with --quick are grouped together.
        reason = "--quick" if row["skipped"].startswith("--quick") else row["skipped"]
        names.setdefault(reason, {})[row["name"]] = None
    named = "; ".join(f"{', '.join(some)} ({reason})" for reason, some in names.items())
    return wrapped(f"skipped: {named}", width) if rows else []


def wrapped(line: str, width: int) -> list[str]:
    """Break a line between words."""
    return textwrap.wrap(line, width, subsequent_indent="  ", break_on_hyphens=False)


def cell(value: object) -> str:
    """Format a figure with a suitable number of digits."""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def draw(rows: list[dict[str, Any]], path: Path, *, value: str, label: str) -> None:
    """Draw one figure of the rows as bars, labelled with their ratios.

    Args:
        rows: rows without the figure are left out.
        path: PNG or SVG.
        value: the figure's name.
        label: label of the axis.
    """
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
    save(figure, path)


def scatter(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy over images/s, with one marker per backend: PNG or SVG."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        if "images_per_s" not in row:
            continue
        point, name = (row["images_per_s"], row["top1"]), row["name"].removesuffix("_uint8")
        axes.plot(*point, MARKERS[name.partition("_")[0]])
        axes.annotate(name, point, textcoords="offset points", xytext=(6, 4), fontsize=7)
    axes.set(xlabel="images/s", ylabel="top-1 on test, %", xlim=(0, None))
    axes.margins(x=0.3, y=0.3)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a picture reproducibly."""
    with mpl.rc_context({"svg.hashsalt": "adavipro_fast"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


Result = TypeVar("Result")


class Rows(list[dict[str, Any]]):
    """Rows that are saved as soon as they are measured, since a time limit may end a bench.

    Args:
        device: that they are measured on.
        path: file for the rows and the machine's description, if any.
        append: keep the rows that are already in the file.
    """

    def __init__(self, device: torch.device, path: Path | None, *, append: bool = False) -> None:
        kept = append and path is not None and path.exists()
        super().__init__(json.loads(path.read_text())["rows"] if kept and path else [])
        self.device, self.path, self.kept = device, path, len(self)
        self.machine = machine(device)

    def append(self, row: dict[str, Any]) -> None:
        """Add a row and write the file."""
        super().append(row)
        self.save()

    def extend(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows one by one, as they are measured."""
        for row in rows:
            self.append(row)

    def __iadd__(self, rows: Iterable[dict[str, Any]]) -> Self:  # type: ignore[misc, override]
        self.extend(rows)
        return self

    def attempt(self, name: str, work: Callable[[], Result]) -> Result | None:
        """Run a step; turn an error into a skipped row and continue.

        Raises:
            VerificationError: a result is wrong.
        """
        try:
            return work()
        except VerificationError:
            raise
        except Exception as error:
            reason = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:600]}"
            self.append({"name": name, "skipped": reason})
            return None

    def save(self) -> None:
        """Write the rows measured so far."""
        if self.path is not None:
            about = self.machine | {"peak_host_mib": peak_host_mib()}
            content = json.dumps({"rows": list(self), "machine": about}, indent=1)
            write_whole(self.path, (content + "\n").encode())

    def published(self, title: str, hidden: Collection[str] = ()) -> dict[str, Any]:
        """Show the new rows as a table, and return all with the machine's description."""
        show(self[self.kept :], title, hidden)
        # Read the clocks again after the work.
        self.machine = machine(self.device)
        self.save()
        return {"rows": list(self), "machine": self.machine | {"peak_host_mib": peak_host_mib()}}


def publish(
    rows: list[dict[str, Any]],
    device: torch.device,
    path: Path | None,
    title: str,
    hidden: Collection[str] = (),
) -> dict[str, Any]:
    """Show the rows, write them if requested, and return them with the machine's description.

    Args:
        rows: the measurements.
        device: that they were measured on.
        path: file for rows and description, if any.
        title: of the table.
        hidden: figures to leave out of the table.
    """
    found = Rows(device, None)
    found += rows
    found.path = path
    return found.published(title, hidden)
