"""The published results of this machine, and Markdown tables of them."""

import json
import statistics
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from lib.machine import ROOT

RESULTS = ROOT / "bench" / "results"
CPU = RESULTS / "cpu-2-cores"
RATIO = "{ratio:.3f} ({ratio_low:.3f} to {ratio_high:.3f})"
Row = dict[str, Any]
# Reasons why a combination was not tried, which say nothing about the combination itself.
NEEDS_GPU = "TensorRT builds on the GPU that will run it"
NOT_INSTALLED = "TensorRT is not installed on this machine"


@cache
def rows(name: str) -> tuple[Row, ...]:
    """Read the rows of a file under the results."""
    return tuple(json.loads((CPU / f"{name}.json").read_text())["rows"])


def named(name: str) -> dict[str, Row]:
    """Return the measured rows of a file by name."""
    return {row["name"]: row for row in rows(name) if "skipped" not in row}


def table(head: list[str], body: list[list[str]]) -> str:
    """Write a Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def columns(found: Iterable[Row], forms: Mapping[str, str]) -> str:
    """Write a Markdown table with one line per row; `forms` maps column titles to formats."""
    return table(list(forms), [[form.format_map(row) for form in forms.values()] for row in found])


def mean(found: list[Row], figure: str, digits: int = 1) -> str:
    """Average a figure over runs."""
    if not found:
        return ""
    return f"{statistics.mean(row[figure] for row in found):.{digits}f}"
