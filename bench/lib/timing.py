"""Interleaved timing of variants, and medians, percentiles and ratios of the times."""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count

import torch
from tqdm import tqdm

LEAST_ROUNDS = 11
PAUSE_S = 0.01
STEADY = 0.02


def synchronise(device: torch.device) -> None:
    """Wait for a GPU's work; do nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_ms(work: Callable[[], object], device: torch.device) -> float:
    """Time one call, with CUDA events on a GPU and the clock elsewhere."""
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


@dataclass
class Replay:
    """Calls captured as one CUDA graph; results are kept so that calls do not share memory."""

    graph: torch.cuda.CUDAGraph
    kept: list[object]

    def __call__(self) -> None:
        """Run all calls; the host launches once."""
        self.graph.replay()


def graphed(
    work: Callable[[int], object], device: torch.device, *, calls: int = 1
) -> Callable[[], object]:
    """Capture calls of `work` as a CUDA graph, to exclude the host's time.

    `work` gets the number of the call. A kernel of a few microseconds cannot be timed otherwise,
    because its launch takes longer. Without a GPU, the calls run one after another.
    """
    if device.type != "cuda":
        return lambda: [work(call) for call in range(calls)]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in range(min(calls, 3)):
            work(call)
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [work(call) for call in range(calls)]
    return Replay(graph, kept)


def interleaved_ms(
    variants: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    warm_up: int = 2,
    bases: Mapping[str, str] | None = None,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Time variants in turn, so that the machine's drift affects all equally.

    Args:
        variants: name to work.
        device: where the work runs.
        rounds: timed calls of each variant.
        warm_up: untimed calls of each variant before.
        bases: name to the variant that it is compared with; both are timed close to each other.
        seed: of the order.

    Returns:
        Milliseconds of each timed call, by name.
    """
    order = random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in tqdm(range(warm_up + rounds), "measure", leave=False, disable=None):
        for name in shuffled(list(variants), bases or {}, order):
            if device.type == "cpu":
                # Threads of the previous runtime may still be spinning.
                time.sleep(PAUSE_S)
            elapsed = timed_ms(variants[name], device)
            if turn >= warm_up:
                times[name].append(elapsed)
    return times


def shuffled(names: list[str], bases: Mapping[str, str], order: random.Random) -> list[str]:
    """Return the names in random order, with those of the same base adjacent.

    A call affects caches and clocks of the next one, so no variant should always follow the same.
    """
    names = order.sample(names, len(names))
    groups = list(dict.fromkeys(bases.get(name, name) for name in names))
    return sorted(names, key=lambda name: groups.index(bases.get(name, name)))


def until_steady(
    variants: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    bases: Mapping[str, str],
) -> dict[str, list[float]]:
    """Time variants in turn until 95 % intervals are within 2 %, or the time is used up.

    Args:
        variants: name to work.
        device: where the work runs.
        seconds: longest time to measure for.
        bases: name to the variant that it is compared with; intervals of both medians and ratios
            must be within 2 %.

    Returns:
        Milliseconds of each timed call, by name.
    """
    times = interleaved_ms(variants, device, rounds=LEAST_ROUNDS, bases=bases)
    end = time.perf_counter() + seconds
    for seed in count(1):
        ratios = (ratio_interval(times[name], times[base]) for name, base in bases.items())
        settled = all(map(steady, times.values())) and all(b - a < STEADY * a for a, b in ratios)
        if settled or time.perf_counter() >= end:
            break
        more = interleaved_ms(variants, device, rounds=5, warm_up=0, bases=bases, seed=seed)
        times = {name: times[name] + more[name] for name in variants}
    return times


def steady(times_ms: list[float]) -> bool:
    """Report whether the median's 95 % interval is within 2 % of it (order statistics)."""
    ordered = sorted(times_ms)
    reach = 0.98 * len(ordered) ** 0.5
    low = ordered[max(0, math.floor(len(ordered) / 2 - reach))]
    high = ordered[min(len(ordered) - 1, math.ceil(len(ordered) / 2 + reach))]
    return bool(high - low < STEADY * statistics.median(ordered))


def summary(times_ms: list[float]) -> dict[str, float]:
    """Return median and interquartile range, ms."""
    low, middle, high = statistics.quantiles(times_ms, n=4)
    return {"median_ms": middle, "iqr_ms": high - low}


def percentiles(times_ms: list[float]) -> dict[str, float]:
    """Return p50, p90, p99 and interquartile range, ms."""
    cut = statistics.quantiles(times_ms, n=100, method="inclusive")
    return {
        "p50_ms": cut[49],
        "p90_ms": cut[89],
        "p99_ms": cut[98],
        "iqr_ms": cut[74] - cut[24],
        "calls": len(times_ms),
    }


def paired_ratio(times_ms: list[float], base_ms: list[float]) -> float:
    """Return the median over rounds of the ratio to the base in the same round."""
    return statistics.median(t / b for t, b in zip(times_ms, base_ms, strict=True))


def ratio_interval(times_ms: list[float], base_ms: list[float]) -> tuple[float, float]:
    """Return the 95 % interval of `paired_ratio`, by bootstrap over rounds."""
    ratios = torch.tensor(times_ms, dtype=torch.double) / torch.tensor(base_ms, dtype=torch.double)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(ratios), (2000, len(ratios)), generator=generator)
    medians = ratios[drawn].median(1).values
    low, high = torch.quantile(medians, torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return low, high


def compared(times_ms: list[float], base_ms: list[float], name: str = "ratio") -> dict[str, float]:
    """Return `paired_ratio` as `name`, with its `ratio_interval`."""
    low, high = ratio_interval(times_ms, base_ms)
    return {name: paired_ratio(times_ms, base_ms), "ratio_low": low, "ratio_high": high}
