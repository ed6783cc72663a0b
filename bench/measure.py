"""What every bench shares: interleaved timing, medians, the machine's description, the output."""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from adavipro_fast.checkpoint import write_whole

ROOT = Path(__file__).parents[1]


def synchronise(device: torch.device) -> None:
    """Wait for a GPU's work; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved_ms(
    variants: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    warm_up: int = 2,
) -> dict[str, list[float]]:
    """Time variants in turn, so that a drift of the machine meets all alike.

    Args:
        variants: name to work.
        device: where the work runs.
        rounds: timed calls of each.
        warm_up: calls of each before, not timed.

    Returns:
        Milliseconds of each timed call, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in tqdm(range(warm_up + rounds), "measure", leave=False):
        for name, work in variants.items():
            synchronise(device)
            began = time.perf_counter()
            work()
            synchronise(device)
            if turn >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - began))
    return times


def summary(times_ms: list[float]) -> dict[str, float]:
    """Median and interquartile range, ms."""
    low, middle, high = statistics.quantiles(times_ms, n=4)
    return {"median_ms": middle, "iqr_ms": high - low}


def paired_ratio(times_ms: list[float], base_ms: list[float]) -> float:
    """Median over rounds of the ratio to the base timed in the same round."""
    return statistics.median(t / b for t, b in zip(times_ms, base_ms, strict=True))


def machine(device: torch.device) -> dict[str, Any]:
    """Describe what was measured on: device, versions, commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def publish(rows: list[dict[str, Any]], device: torch.device, path: Path | None) -> None:
    """Print the rows, write them where asked, and end with one JSON line."""
    for row in rows:
        figures = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
        print("  ".join(figures), file=sys.stderr)
    result = {"rows": rows, "machine": machine(device)}
    if path is not None:
        write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result))
