"""Where a prompt pays beside a probe: learned heads with and without prompts, masks shuffled.

    python bench/heads.py --data far_images --model local-dir:my_clip --pretrained "" --seeds 3

Cells are training runs that are kept and resumed, as those of bench/paper.py.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from adavipro_fast import cli
from adavipro_fast.files.whole import write_whole
from lib.cells import Lines, Sweep, cells_of, run_cells, shuffle_masks
from lib.table import Json, publish

LINEAR: dict[str, object] = {"head": "linear"}
GENTLE: dict[str, object] = {"lr-prompt": 0.4, "lr-head": 3e-4}
LINES: Lines = [
    ("linear probe", {"method": "linear_probe"}),
    ("adavipro", LINEAR),
    ("vp", {"method": "vp", **LINEAR}),
    ("adavipro, gentle", LINEAR | GENTLE),
    ("vp, gentle", {"method": "vp", **LINEAR, **GENTLE}),
    ("adavipro, margin 30", {"margin": 30, **LINEAR}),
    ("adavipro 112", {"prompt-size": 112, **LINEAR}),
    ("adavipro, text head", {}),
]


@dataclass(frozen=True)
class HeadsConfig:
    """Train prompts with learned heads beside a linear probe."""

    sweep: Sweep = field(default_factory=Sweep)
    line: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """which runs, by their names in LINES; repeatable (default: all)"""
    json: Json = None


def command(config: HeadsConfig) -> dict[str, Any]:
    """Run the cells, then those of them that decide once more with masks of other images.

    Raises:
        ValueError: a line that is not there.
        VerificationError: a run failed; the finished ones are kept.
    """
    known = dict(LINES)
    unknown = [name for name in config.line if name not in known]
    if unknown:
        raise ValueError(f"no line {unknown[0]!r}; there are {', '.join(known)}")
    lines = [(name, known[name]) for name in config.line or known]
    cells = cells_of(lines, config.sweep)
    rows = run_cells(cells, config.sweep)
    for cell, row in zip(cells, rows, strict=True):
        if cell.line.startswith("adavipro"):
            row["shuffled_test_top1"] = shuffle_masks(cell, config.sweep)
    summary = [
        differences(rows, Path(data).name, name)
        for data in config.sweep.data
        for name, _ in lines
        if name != LINES[0][0]
    ]
    device = torch.device("cpu")
    published = publish(rows, device, None, "learned heads", hidden=("published", "recipe"))
    result = published | {"beside_probe": [row for row in summary if row]}
    if config.json is not None:
        write_whole(config.json, (json.dumps(result, indent=1) + "\n").encode())
    return result


def differences(rows: Sequence[dict[str, Any]], data: str, line: str) -> dict[str, Any]:
    """Compare a line with the probe of the same seed: points of test top-1, mean over seeds.

    Returns:
        Nothing where there is no such pair.
    """
    own, probe = (
        {
            row["seed"]: row["test_top1"]
            for row in rows
            if (row["data"], row["line"]) == (data, name)
        }
        for name in (line, LINES[0][0])
    )
    points = [own[seed] - probe[seed] for seed in own if seed in probe]
    if not points:
        return {}
    error = statistics.stdev(points) / math.sqrt(len(points)) if len(points) > 1 else math.nan
    return {
        "data": data,
        "line": line,
        "seeds": len(points),
        "points": statistics.mean(points),
        "standard_error_of_seeds": error,
    }


def main() -> None:
    """Parse, run, print."""
    cli.main(HeadsConfig, command)


if __name__ == "__main__":
    main()
