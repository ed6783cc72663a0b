"""Several processes train what one process trains."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from adavipro_fast.files.whole import read_safetensors


def torchrun(processes, tmp_path, *arguments, more=(), **options):
    """Start a run; its standard output is a pipe."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), *more, "-m", "adavipro_fast.train"),
        *("--device", "cpu", "--precision", "fp32", "--cache-dir", str(tmp_path / "cache")),
        *map(str, arguments),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **options)


def finished(process):
    """Wait for a run and return its result."""
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    lines = out.splitlines()
    assert len(lines) == 1, "one process speaks"
    return json.loads(lines[0])


def losses(output):
    rows = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


def curves(folder, tmp_path, sizes, epochs, *flags):
    """Train with one step an epoch by groups of several sizes."""
    found = {}
    for size in sizes:
        output = tmp_path / f"by-{size}"
        more = ["--data", folder, "--epochs", epochs, "--batch-size", 30, "--output", output]
        result = finished(torchrun(size, tmp_path, *more, *flags))
        found[size] = (losses(output), result)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "within"),
    # Rounding in the sums moves fitted heads by up to their solver's tolerance, 1e-4.
    [((), 1e-5), (("--head", "linear", "--head-input", "features"), 1e-3)],
)
def test_two_processes_train_what_one_trains(folder, tmp_path, flags, within):
    found = curves(folder, tmp_path, (1, 2), 3, *flags)
    assert found[2][0] == pytest.approx(found[1][0], abs=within)
    assert abs(found[2][1]["test_top1"] - found[1][1]["test_top1"]) <= 100 / 12 + 1e-9


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_20_steps_by_1_2_and_4_processes(folder, tmp_path):
    found = curves(folder, tmp_path, (1, 2, 4), epochs=20)
    for size in (2, 4):
        off = max(abs(a - b) for a, b in zip(found[size][0], found[1][0], strict=True))
        print(f"{size} processes: losses differ by at most {off:.1e}")
        assert off < 1e-5
        assert abs(found[size][1]["test_top1"] - found[1][1]["test_top1"]) <= 100 / 12 + 1e-9


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_restarts_a_killed_worker_and_the_run_ends_the_same(folder, tmp_path):
    more = ["--data", folder, "--epochs", 12, "--batch-size", 10]
    finished(torchrun(2, tmp_path, *more, "--output", tmp_path / "whole"))
    output = tmp_path / "killed"
    process = torchrun(2, tmp_path, *more, "--output", output, more=("--max-restarts", "2"))
    while not (output / "metrics.jsonl").exists() or len(losses(output)) < 3:
        time.sleep(0.05)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], stdout=subprocess.PIPE, text=True, check=True
    )
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    finished(process)
    ends = [
        read_safetensors(tmp_path / n / "checkpoint.safetensors")[0] for n in ("whole", "killed")
    ]
    for name, value in ends[0].items():
        assert value.equal(ends[1][name]), name
