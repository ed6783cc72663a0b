"""The gain of a second process: torchrun with 1 and with 2 processes on the same cores or GPUs.

    python bench/scaling.py --json FILE

Both train the demo with the same global batch: one process with all threads, or two with half of
the threads each (on GPUs, with one device each). The share of communication is the time of a step's
single message, measured alone, divided by the step's time.
"""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from adavipro_fast import PromptConfig, cli
from adavipro_fast.device import torch_device
from adavipro_fast.method.clip import load_encoder
from adavipro_fast.method.prompt import AdaptivePrompt
from adavipro_fast.training import group as distributed
from lib.process import printed
from lib.table import Json, publish

MESSAGES = 50


@dataclass(frozen=True)
class ScalingConfig:
    """Compare one process with two at the same global batch."""

    batch: int = 64
    """images per step, of all processes"""
    epochs: int = 15
    """epochs; the median of all but the first counts"""
    repeats: int = 2
    """runs of each, in turn"""
    device: cli.Device = "auto"
    message: bool = False
    """under torchrun: time the message of a step alone"""
    json: Json = None


def torchrun(processes: int, config: ScalingConfig, program: Sequence[object]) -> str:
    """Start processes that share this machine's cores; return what the first one printed."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    return printed(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes),
        *(*program, "--device", config.device),
        environment=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )


def step_ms(processes: int, config: ScalingConfig) -> float:
    """Train the demo and return the median step, ms."""
    with tempfile.TemporaryDirectory() as folder:
        program = [
            *("-m", "adavipro_fast.train", "--epochs", config.epochs),
            *("--batch-size", config.batch, "--output", f"{folder}/run"),
        ]
        torchrun(processes, config, program)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    rates = [float(json.loads(line)["images_per_s"]) for line in lines[1:]]
    return 1e3 * config.batch / median(rates)


def message_ms(config: ScalingConfig) -> float:
    """Time the sum of the gradients over the processes of this group, ms."""
    group, device = distributed.join(config.device)
    prompt = AdaptivePrompt(load_encoder("demo").preprocess.size, PromptConfig()).to(device)
    for parameter in prompt.parameters():
        parameter.grad = torch.zeros_like(parameter)
    figures, times = torch.zeros(4, device=device), []
    for _ in range(MESSAGES):
        group.wait()
        began = time.perf_counter()
        group.sum_gradients(prompt.parameters(), figures.clone()).tolist()
        times.append(1e3 * (time.perf_counter() - began))
    distributed.leave()
    return median(times)


def main() -> None:
    """Parse, measure, print."""
    cli.main(ScalingConfig, command, quiet=not distributed.leading())


def command(config: ScalingConfig) -> dict[str, Any]:
    """Measure one and two processes, and the message between them."""
    if config.message:
        return {"message_ms": message_ms(config)}
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(config.repeats):
        for processes, found in times.items():
            found.append(step_ms(processes, config))
    line = torchrun(2, config, [__file__, "--message"]).splitlines()[-1]
    message = json.loads(line)["message_ms"]
    one, two = (median(found) for found in times.values())
    rows = [
        {"name": "1 process", "step_ms": one, "ratio": 1.0},
        {
            "name": "2 processes",
            "step_ms": two,
            "ratio": two / one,
            "message_ms": message,
            "message_share": message / two,
        },
    ]
    return publish(rows, torch_device(config.device), config.json, "scaling: the demo")


if __name__ == "__main__":
    main()
