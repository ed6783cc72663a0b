"""The steps of `bench/gpu_check.py`, the most valuable first, with their time limits.

The order: tests of the compiled kernel; its bandwidth; training steps; training the demo; inference
in PyTorch; ONNX Runtime; profilers; launch options. `build` steps compile and export for later
steps. They run at the same time as the tests, when nothing is timed.
"""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib.machine import ROOT

Part = Literal["tests", "kernels", "training", "smoke", "inference", "onnx", "profile", "tune"]
PARTS: tuple[Part, ...] = (
    *("tests", "kernels", "training", "smoke", "inference", "onnx", "profile", "tune"),
)
METRICS = (
    *("gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"),
    *("dram__throughput.avg.pct_of_peak_sustained_elapsed", "launch__registers_per_thread"),
    *("sm__warps_active.avg.pct_of_peak_sustained_active", "launch__waves_per_multiprocessor"),
    *("smsp__issue_active.avg.pct_of_peak_sustained_active",),
)
TIMED = ("encoder_eager", "fused", "open_clip", "deployed", "cuda_graph", "aoti")
BOUND = ("onnx_baseline_uint8", "onnx_folded_uint8", "onnx_bound", "onnx_graph")


@dataclass(frozen=True)
class Step:
    """A command with a time limit."""

    part: Part
    name: str
    limit_s: int
    command: tuple[str, ...]
    build: bool = False
    """runs at the same time as the tests"""
    only_gpu: str = ""
    """why it cannot be rehearsed on a CPU"""


@dataclass(frozen=True)
class Place:
    """Folders of results and builds, and whether this is a rehearsal on a CPU."""

    output: Path
    work: Path
    model: str
    cpu: bool = False
    quick: bool = False
    """rehearse without compiling"""

    def bench(self, name: str, *flags: object) -> tuple[str, ...]:
        """Return a bench's command."""
        return (sys.executable, str(ROOT / "bench" / f"{name}.py"), *map(str, flags))

    def saved(self, name: str) -> tuple[object, ...]:
        """Return the flags that add rows to a file of the results."""
        return ("--json", self.output / f"{name}.json", "--append")


def steps(place: Place) -> Iterator[Step]:
    """Yield all steps, builds first."""
    yield from builds(place)
    yield from tests(place)
    rehearse = ("--rehearse",) if place.cpu else ()
    fused = place.bench("fused", *place.saved("fused"), *rehearse)
    yield Step("kernels", "kernels", 110, fused)
    yield from training(place)
    yield from inference(place)
    yield from profile(place)
    yield Step("tune", "tune", 40, (*fused, "--tune"))


def tests(place: Place) -> Iterator[Step]:
    """Run the kernel's tests; on a CPU only a few."""
    file = str(ROOT / "tests" / "test_kernel.py")
    some = ("-k", "opcheck or stream") if place.cpu else ("-n", "6", "--maxfail=8")
    flags = ("-q", file, "-p", "no:cacheprovider", *some)
    yield Step("tests", "tests", 165, (sys.executable, "-m", "pytest", *flags))


def training(place: Place) -> Iterator[Step]:
    """Time training steps, and train the demo."""
    sizes = ((place.model, 256, 50), (place.model, 32, 30), ("ViT-B-16", 128, 40))
    for model, batch, limit in (("demo", 2, 60),) if place.cpu else sizes:
        flags = ("--model", model, "--batch", batch, "--steps-only", *place.saved("training"))
        small = ("--device", "cpu", "--quick") if place.cpu else ("--device", "cuda")
        name = f"training {model} {batch}"
        yield Step("training", name, limit, place.bench("training", *flags, *small))
    flags = ("--epochs", "1" if place.cpu else "2", "--device", "cpu" if place.cpu else "cuda")
    some = ("--limit-train", "80") if place.cpu else ()
    command = (sys.executable, "-m", "adavipro_fast.train", *flags, *some)
    yield Step("smoke", "train the demo", 60, (*command, "--output", str(place.work / "run")))


def latency(place: Place, precision: str, rows: tuple[str, ...], *flags: object) -> tuple[str, ...]:
    """Return the command that times inference in a precision."""
    model, device = ("demo", "cpu") if place.cpu else (place.model, "cuda")
    chosen = [word for row in rows for word in ("--rows", row)]
    common = ("--precision", precision, "--folder", place.work / "files", "--keep-going")
    quick = ("--quick",) if place.quick else ()
    return place.bench(
        "latency", "--model", model, "--device", device, *common, *chosen, *quick, *flags
    )


def inference(place: Place) -> Iterator[Step]:
    """Time the deployed modules and the exported files, with and without the prompt."""
    sizes = (1, 2) if place.cpu else (1, 16, 256)
    batches = [word for size in sizes for word in ("--batch", size)]
    timed = ("--seconds", 0.5 if place.cpu else 5, *batches, *place.saved("latency"))
    for precision, limit in (("fp32", 240),) if place.cpu else (("fp16", 60), ("fp32", 50)):
        command = latency(place, precision, TIMED, *timed)
        yield Step("inference", f"inference {precision}", limit, command)
    if not place.cpu:
        eager = ("encoder_eager", "fused", "deployed_b", "deployed_f", "cuda_graph")
        yield Step("inference", "inference bf16", 30, latency(place, "bf16", eager, *timed))
    for precision in ("fp32",) if place.cpu else ("fp32", "fp16"):
        command = latency(place, precision, BOUND, *timed)
        yield Step("onnx", f"onnx {precision}", 45, command)


def builds(place: Place) -> Iterator[Step]:
    """Compile and export while the tests run."""
    if place.cpu:
        return
    part: Part
    for flags in (("--part", "kernels"), ("--part", "variants"), ("--tune",)):
        part = "tune" if flags[0] == "--tune" else "kernels"
        name = f"build {' '.join(flags)}"
        yield Step(part, name, 165, place.bench("fused", *flags, "--build"), build=True)
    for precision in ("fp16", "fp32"):
        for rows in ("onnx_b", "onnx_f"), ("aoti_b",), ("aoti_f",), ("deployed_c", "open_clip"):
            part = "onnx" if rows[0].startswith("onnx") else "inference"
            sizes = (1, 16, 256) if rows[0] == "deployed_c" else (1,)
            batches = [word for size in sizes for word in ("--batch", size)]
            chosen = BOUND[:2] if part == "onnx" else rows
            command = latency(place, precision, chosen, "--build", *batches)
            name = f"build {rows[0]} {precision}"
            yield Step(part, name, 165, command, build=True)


def profile(place: Place) -> Iterator[Step]:
    """Count bytes and check for out-of-bounds accesses with NVIDIA's tools."""
    found = sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))
    counter = shutil.which("ncu") or str(found[-1] if found else "ncu")
    kernels = ("--kernel-name", "regex:^_(forward|backward)$", "--launch-skip", "2")
    flags = ("--clock-control", "none", *kernels, "--launch-count", "4")
    command = (counter, *flags, "--metrics", ",".join(METRICS))
    reason = "NVIDIA's profilers need a GPU"
    launches = place.bench("fused", "--launch", "shape")
    yield Step("profile", "ncu", 50, (*command, *launches), only_gpu=reason)
    checker = ("compute-sanitizer", "--tool", "memcheck")
    launches = place.bench("fused", "--launch", "odd")
    yield Step("profile", "compute-sanitizer", 60, (*checker, *launches), only_gpu=reason)
