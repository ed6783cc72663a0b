"""What every bench shares: interleaved timing, medians, the machine's description, the output."""

import json
import math
import platform
import random
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
LEAST_ROUNDS = 11


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
        order = list(variants)
        # What ran before leaves caches and clocks behind: nobody always follows the same one.
        random.Random(turn).shuffle(order)
        for name in order:
            synchronise(device)
            began = time.perf_counter()
            variants[name]()
            synchronise(device)
            if turn >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - began))
    return times


def until_steady(
    variants: Mapping[str, Callable[[], object]], device: torch.device, *, seconds: float
) -> dict[str, list[float]]:
    """Time variants in turn until every median's 95 % interval is within 2 %, or time is over.

    Args:
        variants: name to work.
        device: where the work runs.
        seconds: longest time to measure for.

    Returns:
        Milliseconds of each timed call, by name.
    """
    times = interleaved_ms(variants, device, rounds=LEAST_ROUNDS)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and not all(map(steady, times.values())):
        more = interleaved_ms(variants, device, rounds=5, warm_up=0)
        times = {name: times[name] + more[name] for name in variants}
    return times


def steady(times_ms: list[float]) -> bool:
    """Tell whether the 95 % interval of the median is within 2 % of it (order statistics)."""
    ordered = sorted(times_ms)
    reach = 0.98 * len(ordered) ** 0.5
    low = ordered[max(0, math.floor(len(ordered) / 2 - reach))]
    high = ordered[min(len(ordered) - 1, math.ceil(len(ordered) / 2 + reach))]
    return bool(high - low < 0.02 * statistics.median(ordered))


def summary(times_ms: list[float]) -> dict[str, float]:
    """Median and interquartile range, ms."""
    low, middle, high = statistics.quantiles(times_ms, n=4)
    return {"median_ms": middle, "iqr_ms": high - low}


def percentiles(times_ms: list[float]) -> dict[str, float]:
    """p50, p90, p99 and interquartile range, ms."""
    cut = statistics.quantiles(times_ms, n=100, method="inclusive")
    return {
        "p50_ms": cut[49],
        "p90_ms": cut[89],
        "p99_ms": cut[98],
        "iqr_ms": cut[74] - cut[24],
        "calls": len(times_ms),
    }


def paired_ratio(times_ms: list[float], base_ms: list[float]) -> float:
    """Median over rounds of the ratio to the base timed in the same round."""
    return statistics.median(t / b for t, b in zip(times_ms, base_ms, strict=True))


def ratio_interval(times_ms: list[float], base_ms: list[float]) -> tuple[float, float]:
    """95 % interval of `paired_ratio`, by bootstrap over rounds."""
    ratios = torch.tensor(times_ms, dtype=torch.double) / torch.tensor(base_ms, dtype=torch.double)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(ratios), (2000, len(ratios)), generator=generator)
    medians = ratios[drawn].median(1).values
    low, high = torch.quantile(medians, torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return low, high


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


def publish(rows: list[dict[str, Any]], device: torch.device, path: Path | None) -> dict[str, Any]:
    """Show the rows, write them where asked, and return them with the machine's description."""
    for row in rows:
        figures = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
        print("  ".join(figures), file=sys.stderr)
    result = {"rows": rows, "machine": machine(device)}
    if path is not None:
        write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
    return result
