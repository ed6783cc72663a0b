"""Targets of a GPU run, and whether its rows reach them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Row = Mapping[str, Any]
# Smallest share of the copy bandwidth, smallest speed-up over torch.compile, and largest ratios.
LEAST_SHARE, LEAST_TIMES_COMPILED, LARGEST_STEP, LARGEST_FOLDED = 0.7, 1.5, 1.02, 1.01


def targets(rows: Mapping[str, Iterable[Row]]) -> dict[str, dict[str, Any]]:
    """Compare the rows of each file with the targets; unmeasured targets are left out."""
    found = {}
    for name, value, goal, least in measured(rows):
        met = value >= goal if least else value <= goal
        found[name] = {
            "value": value,
            "target": goal,
            "at": "least" if least else "most",
            "met": met,
        }
    return found


def measured(rows: Mapping[str, Iterable[Row]]) -> Iterator[tuple[str, float, float, bool]]:
    """Yield name, value, target, and whether the target is a minimum."""
    for row in rows.get("fused", ()):
        name = row["name"]
        if name in ("kernel_forward", "kernel_backward") and row["batch"] >= 256:
            about = f"{name}, batch {row['batch']}, region {row['region']}, {row['dtype']}"
            yield f"{about}: share of copy", row["share_of_copy"], LEAST_SHARE, True
        if name == "masks" and "skipped" not in row:
            yield "masks that differ", row["different"], 0, False
        if name == "collapsed_compiled_both" and "ratio_to_fused" in row:
            yield "times torch.compile", row["ratio_to_fused"], LEAST_TIMES_COMPILED, True
    for row in rows.get("training", ()):
        if row["name"] == "adavipro" and "ratio_to_vp" in row:
            about = f"training step, {row['model']}, batch {row['batch']}"
            yield f"{about}: to vp", row["ratio_to_vp"], LARGEST_STEP, False
    for row in rows.get("latency", ()):
        if "folded" in row["name"] and row["batch"] >= 16 and "ratio" in row:
            about = f"{row['name']}, {row['precision']}, batch {row['batch']}"
            yield f"{about}: to the encoder", row["ratio"], LARGEST_FOLDED, False
