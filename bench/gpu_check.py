"""Test the fused kernel on a GPU and measure everything, in one command and under ten minutes.

    python bench/gpu_check.py
    python bench/gpu_check.py --part kernels
    python bench/gpu_check.py --cpu

The most valuable steps run first, each with a time limit, and every row is saved as soon as it is
measured: to fused.json, training.json or latency.json. check.json has the outcome of each step and
the targets, log.txt the output. `--cpu` rehearses small versions of the steps on a CPU; its times
are meaningless. The exit code is 1 if a test fails or a result is wrong. CONTRIBUTING explains how
to run it on a machine without an installed package.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from adavipro_fast import cli
from adavipro_fast.errors import VerificationError
from adavipro_fast.files.whole import write_whole
from lib.machine import ROOT, machine
from lib.plan import PARTS, Part, Place, Step, steps
from lib.process import streamed
from lib.targets import targets

FILES = ("fused", "training", "latency")
LEAST_S = 8
# Builds run at the same time as the tests.
BUILD = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "3"}


@dataclass(frozen=True)
class CheckConfig:
    """Check and measure the fused kernel, training and inference on this machine's GPU."""

    part: Annotated[tuple[Part, ...], tyro.conf.UseAppendAction] = ()
    """run these parts only; repeatable (default: all)"""
    output: Path | None = None
    """folder of the results (default: $OUT where it is set, else bench/results/<device>)"""
    limit_s: float = 570.0
    """seconds for all steps; a rehearsal has no limit but each step's own"""
    model: str = "ViT-B-32"
    """encoder; random weights"""
    onnxruntime: Path | None = None
    """folder of another onnxruntime package, for the ONNX steps alone"""
    work: Path | None = None
    """keep exported files and compiled packages here (default: a temporary folder)"""
    cpu: bool = False
    """rehearse on a CPU"""
    quick: bool = False
    """rehearse without what takes minutes to compile"""


class Run:
    """The steps of one call, their log and their outcomes.

    Args:
        config: of the command.
        place: the folders of results and builds.
    """

    def __init__(self, config: CheckConfig, place: Place) -> None:
        self.config, self.place = config, place
        self.began = time.perf_counter()
        self.limit_s = 3600.0 if config.cpu else config.limit_s
        self.log = place.output / "log.txt"
        self.done: list[dict[str, Any]] = []
        device = torch.device("cpu" if config.cpu else "cuda")
        self.machine = machine(device) | {"rehearsal": config.cpu}

    def left_s(self) -> float:
        """Return the seconds left."""
        return self.limit_s - (time.perf_counter() - self.began)

    def environment(self, step: Step) -> dict[str, str]:
        """Return a step's environment: no Triton interpreter, and the chosen ONNX Runtime."""
        found = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        found["PYTHONUNBUFFERED"] = "1"
        if self.config.cpu:
            found |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        if step.build:
            found |= BUILD
        if step.part == "onnx" and self.config.onnxruntime is not None:
            paths = (str(self.config.onnxruntime.resolve()), found.get("PYTHONPATH", ""))
            found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        return found

    def step(self, step: Step) -> None:
        """Run a step within its limit and the time left, and save its outcome."""
        limit = min(step.limit_s * (5 if self.config.cpu else 1), self.left_s())
        outcome: int | str
        began = time.perf_counter()
        if self.config.cpu and step.only_gpu:
            outcome = f"skipped: {step.only_gpu}"
        elif limit < LEAST_S:
            outcome = "skipped: no time left"
        else:
            self.say(f"{step.name}: at most {limit:.0f} s")
            outcome = streamed(
                step.command,
                limit_s=limit,
                log=self.log,
                environment=self.environment(step),
                folder=self.place.work,
                quiet=step.build,
            )
        seconds = round(time.perf_counter() - began, 1)
        self.say(f"{step.name}: {outcome if isinstance(outcome, str) else f'exit {outcome}'}")
        self.done.append(
            {"name": step.name, "part": step.part, "limit_s": step.limit_s}
            | {"seconds": seconds, "outcome": outcome}
        )
        self.save()

    def say(self, line: str) -> None:
        """Write a line to stderr and the log."""
        line = f"[{time.perf_counter() - self.began:.0f} s] {line}"
        print(line, file=sys.stderr, flush=True)
        with self.log.open("a") as file:
            print(line, file=file)

    def save(self) -> dict[str, Any]:
        """Write check.json: the outcomes of the steps, and the targets."""
        rows = {name: rows_of(self.place.output / f"{name}.json") for name in FILES}
        result = {"machine": self.machine, "steps": list(self.done)}
        result["targets"] = {} if self.config.cpu else targets(rows)
        content = json.dumps(result, indent=1) + "\n"
        write_whole(self.place.output / "check.json", content.encode())
        return result

    def all(self) -> dict[str, Any]:
        """Run the chosen steps: builds at the same time as the tests, then the others alone."""
        chosen = [s for s in steps(self.place) if s.part in (self.config.part or PARTS)]
        built = [s for s in chosen if s.build]
        with ThreadPoolExecutor(max(1, len(built))) as pool:
            waiting = [pool.submit(self.step, s) for s in built]
            for step in chosen:
                if step.part == "tests":
                    self.step(step)
            for future in waiting:
                future.result()
        for step in chosen:
            if not step.build and step.part != "tests":
                self.step(step)
        return self.save()


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Read a file's rows; empty if there is no file yet."""
    return list(json.loads(path.read_text())["rows"]) if path.exists() else []


def output_of(config: CheckConfig) -> Path:
    """Return the folder of the results."""
    if config.output is not None:
        return config.output.resolve()
    if out := os.environ.get("OUT"):
        return Path(out).resolve()
    name = "rehearsal" if config.cpu else torch.cuda.get_device_name().lower().replace(" ", "-")
    return (ROOT / "build" if config.cpu else ROOT / "bench" / "results") / name


@contextlib.contextmanager
def place_of(config: CheckConfig) -> Iterator[Place]:
    """Create the folders; remove earlier results of the chosen parts."""
    output = output_of(config)
    output.mkdir(parents=True, exist_ok=True)
    parts = config.part or PARTS
    owners = {"fused": {"kernels"}, "training": {"training"}, "latency": {"inference"}}
    for name, owning in owners.items():
        if owning & set(parts):
            (output / f"{name}.json").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as name:
        work = (config.work or Path(name)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        yield Place(output, work, config.model, config.cpu, config.quick)


def command(config: CheckConfig) -> dict[str, Any]:
    """Run all steps.

    Raises:
        ValueError: there is no CUDA device.
        VerificationError: a test failed or a result was wrong.
    """
    if not (config.cpu or torch.cuda.is_available()):
        raise ValueError(
            "gpu_check needs a CUDA device and torch sees none; --cpu rehearses it on a CPU"
        )
    with place_of(config) as place:
        result = Run(config, place).all()
    # A missing profiler is not an error.
    wrong = [s["name"] for s in result["steps"] if s["outcome"] == 1 and s["part"] != "profile"]
    if wrong:
        raise VerificationError(f"{', '.join(wrong)} failed; see {place.output / 'log.txt'}")
    return result | {"output": str(place.output)}


def main() -> None:
    """Parse, check, print."""
    cli.main(CheckConfig, command)


if __name__ == "__main__":
    main()
