"""Tables of GPU measurements, from the folders written by `bench/gpu_check.py`."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lib.published import RATIO, Row, columns

NONE = (
    "No figure of this project was measured on a GPU yet; `python bench/gpu_check.py` measures "
    "all of them in one command."
)
LIMIT = (
    "- No figure comes from a GPU yet: the kernel ran in Triton's interpreter and as CPU code; "
    "engines were built, not run. `python bench/gpu_check.py` measures both."
)
KERNELS = {
    "kernel": "`{name}`",
    "batch": "{batch}",
    "region": "{region}",
    "images": "{dtype}",
    "ms": "{median_ms:.3f}",
    "GB/s": "{gb_s:.0f}",
    "share of a copy's GB/s": "{share_of_copy:.2f}",
}
FORMS = {
    "form": "`{name}`",
    "ms": "{median_ms:.3f}",
    "ratio to the fused kernel": "{ratio_to_fused:.2f}",
}
STEPS = {
    "encoder": "{model}",
    "batch": "{batch}",
    "row": "`{name}`",
    "step, ms": "{step_ms:.1f}",
    "ratio to vp (95 %)": "{ratio_to_vp:.3f} ({ratio_low:.3f} to {ratio_high:.3f})",
    "peak memory": "{peak_mib:.0f} MiB",
}
LATENCIES = {
    "row": "`{name}`",
    "precision": "{precision}",
    "batch": "{batch}",
    "p50, ms": "{p50_ms:.3f}",
    "ratio to the encoder alone (95 %)": RATIO,
}
PEERS = {
    "alternative": "`{name}`",
    "precision": "{precision}",
    "batch": "{batch}",
    "p50, ms": "{p50_ms:.3f}",
    "ratio to ours (95 %)": RATIO.replace("ratio", "to_other"),
    "compared with": "`{other}`",
}


def devices(results: Path) -> list[Path]:
    """Return the folders of GPU runs, without rehearsals on a CPU."""
    checks = sorted(results.glob("*/check.json"))
    return [
        path.parent for path in checks if not json.loads(path.read_text())["machine"]["rehearsal"]
    ]


def rows_of(folder: Path, name: str) -> list[Row]:
    """Return the measured rows of a file; empty if there is no such file."""
    path = folder / f"{name}.json"
    if not path.exists():
        return []
    return [row for row in json.loads(path.read_text())["rows"] if "skipped" not in row]


def table(rows: Iterable[Row], forms: Mapping[str, str]) -> Iterator[str]:
    """Yield a Markdown table with one line per row; nothing if there are no rows."""
    if found := list(rows):
        yield columns(found, forms)


def about(folder: Path) -> str:
    """Return the machine's name and the missed targets."""
    check = json.loads((folder / "check.json").read_text())
    machine, found = check["machine"], check["targets"]
    missed = [name for name, target in found.items() if not target["met"]]
    line = f"{machine['device']}, torch {machine['versions'].get('torch', '?')}"
    line += f", commit {machine['commit'] or 'unknown'}: {len(found) - len(missed)} of "
    line += f"{len(found)} targets met"
    return line + (f"; missed: {'; '.join(missed)}." if missed else ".")


def tables(folder: Path) -> str:
    """Return a GPU's tables: kernels, forms, training steps, inference, peers."""
    fused, latency = rows_of(folder, "fused"), rows_of(folder, "latency")
    steps = [row for row in rows_of(folder, "training") if "step_ms" in row]
    ours = [row for row in latency if "ratio" in row and row["contract"] == "prompt + encoder"]
    return "\n\n".join(
        [
            about(folder),
            *table((row for row in fused if "share_of_copy" in row), KERNELS),
            *table((row for row in fused if "ratio_to_fused" in row), FORMS),
            *table(steps, STEPS),
            *table(ours, LATENCIES),
            *table((row for row in latency if "to_other" in row), PEERS),
        ]
    )


def gpu_section(results: Path) -> str:
    """Return the tables of all GPUs, or a note that there are none."""
    found = devices(results)
    if not found:
        return f"**{NONE.partition(';')[0]}**;{NONE.partition(';')[2]}"
    return "\n\n".join(f"### {folder.name}\n\n{tables(folder)}" for folder in found)


def gpu_limit(results: Path) -> str:
    """Return README's line on GPU measurements."""
    found = devices(results)
    if not found:
        return LIMIT
    names = ", ".join(folder.name for folder in found)
    return f"- Measured on {names} ([numbers](docs/pages/numbers.md#on-a-gpu)); on no other GPU."
