"""What every bench shares: interleaved timing, medians, the machine's description, the output."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from adavipro_fast.files.whole import write_whole

ROOT = Path(__file__).parents[1]
LEAST_ROUNDS = 11
PAUSE_S = 0.01
STEADY = 0.02
# What a narrow terminal has no room for; the first goes first.
SPARE = ("iqr_ms", "build_s", "p99_ms", "calls", "provider", "p90_ms", "ratio_high", "ratio_low")
ORDER = random.Random(0)
PACKAGES = (
    *("torch", "torchvision", "open_clip_torch", "triton", "onnx", "onnxruntime-gpu"),
    *("onnxruntime", "tensorrt", "tensorrt-rtx-cu13", "transformers", "openvino"),
)
GPU_FIELDS = (
    *("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu"),
    *("power.draw", "clocks_throttle_reasons.active"),
)


def synchronise(device: torch.device) -> None:
    """Wait for a GPU's work; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_ms(work: Callable[[], object], device: torch.device) -> float:
    """Time one call: by CUDA events on a GPU, by the clock elsewhere."""
    synchronise(device)
    if device.type == "cuda":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended))
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def interleaved_ms(
    variants: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    warm_up: int = 2,
    bases: Mapping[str, str] | None = None,
) -> dict[str, list[float]]:
    """Time variants in turn, so that a drift of the machine meets all alike.

    Args:
        variants: name to work.
        device: where the work runs.
        rounds: timed calls of each.
        warm_up: calls of each before, not timed.
        bases: name to the variant that it is compared with; both run close to each other.

    Returns:
        Milliseconds of each timed call, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in tqdm(range(warm_up + rounds), "measure", leave=False, disable=None):
        for name in shuffled(list(variants), bases or {}):
            # Threads of the runtime before may still spin for more work.
            time.sleep(PAUSE_S)
            elapsed = timed_ms(variants[name], device)
            if turn >= warm_up:
                times[name].append(elapsed)
    return times


def shuffled(names: list[str], bases: Mapping[str, str]) -> list[str]:
    """Shuffle names, those with the same base side by side.

    What ran before leaves caches and clocks behind: nobody always follows the same one.
    """
    ORDER.shuffle(names)
    groups = list(dict.fromkeys(bases.get(name, name) for name in names))
    return sorted(names, key=lambda name: groups.index(bases.get(name, name)))


def until_steady(
    variants: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    bases: Mapping[str, str],
) -> dict[str, list[float]]:
    """Time variants in turn until 95 % intervals are within 2 %, or time is over.

    Args:
        variants: name to work.
        device: where the work runs.
        seconds: longest time to measure for.
        bases: name to the variant that its ratio is to; intervals of medians and ratios count.

    Returns:
        Milliseconds of each timed call, by name.
    """
    times = interleaved_ms(variants, device, rounds=LEAST_ROUNDS, bases=bases)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        ratios = (ratio_interval(times[name], times[base]) for name, base in bases.items())
        if all(map(steady, times.values())) and all(b - a < STEADY * a for a, b in ratios):
            break
        more = interleaved_ms(variants, device, rounds=5, warm_up=0, bases=bases)
        times = {name: times[name] + more[name] for name in variants}
    return times


def steady(times_ms: list[float]) -> bool:
    """Tell whether the 95 % interval of the median is within 2 % of it (order statistics)."""
    ordered = sorted(times_ms)
    reach = 0.98 * len(ordered) ** 0.5
    low = ordered[max(0, math.floor(len(ordered) / 2 - reach))]
    high = ordered[min(len(ordered) - 1, math.ceil(len(ordered) / 2 + reach))]
    return bool(high - low < STEADY * statistics.median(ordered))


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


def peak_host_mib() -> float:
    """Return the largest memory this process ever had resident, MiB; 0 where it cannot be told."""
    # Not getrusage: its peak is inherited from the process that started this one.
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 2**10
    return 0.0


def peak_device_mib(work: Callable[[], object], device: torch.device) -> float:
    """Return the largest memory torch holds on a GPU during a call, MiB."""
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) / 2**20


def cpu_name() -> str:
    """Return the processor's model."""
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def clocks() -> dict[str, Any]:
    """Read the clocks as they are now and what slows them down, where the machine tells it."""
    told: dict[str, Any] = {"load_average": os.getloadavg()[0]} if hasattr(os, "getloadavg") else {}
    with contextlib.suppress(OSError):
        cores = re.findall(r"cpu MHz\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text())
        if cores:
            told["cpu_mhz"] = max(map(float, cores))
    folder = Path("/sys/devices/system/cpu/cpu0")
    for name in ("cpufreq/cpuinfo_max_freq", "thermal_throttle/core_throttle_count"):
        with contextlib.suppress(OSError, ValueError):
            told[name.split("/")[1]] = int((folder / name).read_text())
    if torch.cuda.is_available() and shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        values = done.stdout.split("\n")[0].split(", ")
        if len(values) == len(GPU_FIELDS):
            told["gpu"] = dict(zip(GPU_FIELDS, values, strict=True))
    return told


def versions() -> dict[str, str]:
    """Return the installed versions of what can be measured."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """Describe what was measured on: device, clocks, versions, commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": name,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clocks": clocks(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit.removesuffix("-dirty"),
        "dirty": commit.endswith("-dirty"),
    }


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
    """Lay rows out in columns; those that `width` has no room for are named below."""
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
    """Name the rows without figures, reason by reason."""
    names: dict[str, dict[str, None]] = {}
    for row in rows:
        # What --quick leaves out in particular is the row itself.
        reason = "--quick" if row["skipped"].startswith("--quick") else row["skipped"]
        names.setdefault(reason, {})[row["name"]] = None
    told = "; ".join(f"{', '.join(some)} ({reason})" for reason, some in names.items())
    return wrapped(f"skipped: {told}", width) if rows else []


def wrapped(line: str, width: int) -> list[str]:
    """Break a line between words."""
    return textwrap.wrap(line, width, subsequent_indent="  ", break_on_hyphens=False)


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
