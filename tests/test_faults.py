"""Kills, full disks and lost folders: a run loses nothing and says what is wrong."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from adavipro_fast import train
from adavipro_fast.data import world
from adavipro_fast.training import group as distributed
from adavipro_fast.training.config import recipe
from adavipro_fast.training.run_folder import held, make_folder

# Kills training processes at random moments, half of them inside a save, and resumes each time.
# It forks from a process that has imported everything, so that an attempt takes a second.
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from adavipro_fast import train
from adavipro_fast.files import whole

torch.set_num_threads(1)
arguments, output, kills = sys.argv[3:], Path(sys.argv[1]), int(sys.argv[2])
rng = random.Random(0)


def attempt(folder, *, save=None, after=None):
    begin = ["--output", str(folder), *arguments]
    resume = ["--resume", str(folder)]
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(str(output / "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        fsync, calls = os.fsync, iter(range(10**9))

        def deadly(descriptor):
            fsync(descriptor)
            if next(calls) == save:
                os.kill(os.getpid(), signal.SIGKILL)

        if save is not None:
            whole.os.fsync = deadly
        sys.argv = ["train", *(resume if (folder / "last.safetensors").exists() else begin)]
        try:
            train.main()
        except SystemExit as stop:
            os._exit(stop.code or 0)
        os._exit(0)
    if after is not None:
        time.sleep(after)
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, (output / "log").read_text()[-2000:]
    return False


began = time.perf_counter()
assert not attempt(output / "whole")
seconds = time.perf_counter() - began
uninterrupted = (output / "whole" / "checkpoint.safetensors").read_bytes()
told = {"kills": 0, "inside_saves": 0, "runs": 0, "equal": 0}
while told["kills"] < kills:
    folder = output / f"killed-{told['runs']}"
    told["runs"] += 1
    inside = True
    while True:
        inside = not inside
        choice = {"save": rng.randrange(6)} if inside else {"after": rng.uniform(0, seconds)}
        if told["kills"] >= kills:
            choice = {}
        if not attempt(folder, **choice):
            break
        told["kills"] += 1
        told["inside_saves"] += inside
    told["equal"] += (folder / "checkpoint.safetensors").read_bytes() == uninterrupted
print(json.dumps(told))
"""


def kill_often(folder, tmp_path, kills):
    arguments = [
        *("--data", str(folder), "--cache-dir", str(tmp_path / "cache"), "--device", "cpu"),
        *("--epochs", "5", "--batch-size", "8", "--embed-dim", "4"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), str(kills), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_runs_end_in_the_same_bytes(folder, tmp_path):
    told = kill_often(folder, tmp_path, 4)
    assert told["equal"] == told["runs"]
    assert told["inside_saves"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_40_kills_end_in_the_same_bytes(folder, tmp_path):
    told = kill_often(folder, tmp_path, 40)
    print(told)
    assert told["equal"] == told["runs"]
    assert told["inside_saves"] >= 10


def run_train(monkeypatch, capsys, *arguments):
    """Run the command here; return exit code and what it printed on stderr."""
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    code = 0
    try:
        train.main()
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


@pytest.fixture
def finished(small, tmp_path, folder):
    """Return a finished short run on a data folder of its own."""
    data = shutil.copytree(folder, tmp_path / "data")
    config = small(tmp_path / "run", epochs=1)
    config = replace(config, data=replace(config.data, data=str(data)))
    train.start_run(config)
    return tmp_path / "run", data


def test_changed_data_is_refused_unless_accepted(finished, monkeypatch, capsys):
    run, data = finished
    next((data / "train" / "cross").iterdir()).unlink()
    more = ["--resume", run, "--epochs", 2, "--accept-change", "epochs"]
    code, printed = run_train(monkeypatch, capsys, *more)
    assert code == 2
    assert "data changed since the run started" in printed.err
    assert "--accept-change data" in printed.err
    code, printed = run_train(monkeypatch, capsys, *more, "--accept-change", "data")
    assert code == 0
    assert json.loads(printed.out.splitlines()[-1])["epochs"] == 2


def test_a_changed_flag_is_refused_with_the_difference(finished, monkeypatch, capsys):
    code, printed = run_train(monkeypatch, capsys, "--resume", finished[0], "--epochs", 5)
    assert code == 2
    assert "--epochs 5 instead of 1" in printed.err
    assert "--accept-change epochs" in printed.err


@pytest.mark.slow
def test_a_full_disk_is_told_and_the_last_state_stays(small, tmp_path):
    config = small(tmp_path / "run", epochs=1)
    train.start_run(config)
    last = (tmp_path / "run" / "last.safetensors").read_bytes()
    program = (
        "import resource, signal, sys\n"
        "from adavipro_fast import train\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(last) // 2}, {len(last) // 2}))\n"
        "train.main()\n"
    )
    arguments = ["--resume", str(tmp_path / "run"), "--epochs", "3", "--accept-change", "epochs"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr.splitlines()[-1]
    assert (tmp_path / "run" / "last.safetensors").read_bytes() == last
    assert not list((tmp_path / "run").glob("*.partial"))


@pytest.mark.slow
def test_runs_started_together_get_folders_of_their_own(folder, tmp_path):
    program = (
        "import sys, time\nfrom adavipro_fast import train\nsys.stdin.readline()\ntrain.main()\n"
    )
    arguments = [
        *("--data", str(folder), "--cache-dir", str(tmp_path / "cache"), "--device", "cpu"),
        *("--epochs", "1", "--embed-dim", "4"),
    ]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for _ in range(2)
    ]
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    results = [json.loads(run.communicate(timeout=120)[0].splitlines()[-1]) for run in runs]
    paths = {result["checkpoint"] for result in results}
    name = f"{folder.name}-adavipro"
    assert paths == {f"runs/{name}-{number}/checkpoint.safetensors" for number in (1, 2)}
    assert all((tmp_path / path).exists() for path in paths)


def test_a_folder_that_a_run_holds_is_refused_and_its_leftovers_go(small, tmp_path):
    output = tmp_path / "run"
    with held(output):
        (output / "metrics.jsonl.0123abcd.partial").write_bytes(b"half")
        (output / "kept").write_bytes(b"whole")
        with pytest.raises(ValueError, match="another run is using .*run; wait for it, or"):
            train.start_run(small(output))
    with held(output):
        assert sorted(p.name for p in output.iterdir()) == [".lock", "kept"]
    config = small(tmp_path / "bad" / "run")
    with pytest.raises(ValueError, match="does not divide"):
        train.start_run(replace(config, prompt=replace(config.prompt, region_size=48)))
    assert not (tmp_path / "bad").exists()


def test_what_a_run_did_not_make_stays(small, tmp_path):
    output = tmp_path / "outer" / "run"
    output.mkdir(parents=True)
    (output.parent / "other.partial").write_bytes(b"")
    config = small(output)
    with pytest.raises(ValueError, match="does not divide"):
        train.start_run(replace(config, prompt=replace(config.prompt, region_size=48)))
    assert list(output.iterdir()) == []
    (output / "download.partial").write_bytes(b"")
    (output / "last.safetensors.0123abcd.partial").write_bytes(b"")
    with held(output):
        assert sorted(p.name for p in output.iterdir()) == [".lock", "download.partial"]


def test_a_folder_of_runs_that_cannot_be_made_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(tmp_path / "unmounted")
    with pytest.raises(OSError, match="runs"):
        make_folder("x")


def test_a_restart_goes_on_in_its_own_folder_alone(finished, small, monkeypatch):
    run, data = finished
    monkeypatch.setattr(distributed, "restarts", lambda: 1)
    config = small(run, epochs=1)
    own = replace(config, data=replace(config.data, data=str(data)))
    assert train.start_run(own)["epochs"] == 1
    with pytest.raises(ValueError, match="already contains a run"):
        train.start_run(replace(own, prompt=replace(own.prompt, margin=3)))


def test_an_output_below_a_file_is_told(small, tmp_path):
    (tmp_path / "file").write_text("")
    config = small(tmp_path / "file" / "run")
    with pytest.raises(OSError, match="file"):
        train.start_run(config)


def test_lost_data_is_told_at_resume(finished, monkeypatch, capsys):
    run, data = finished
    shutil.rmtree(data)
    more = ["--resume", run, "--epochs", 2, "--accept-change", "epochs"]
    code, printed = run_train(monkeypatch, capsys, *more)
    assert code == 2
    assert f"no such folder: {data}" in printed.err


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_20000_steps_at_constant_memory(tmp_path):
    arguments = [
        *("--batch-size", "1", "--epochs", "157", "--device", "cpu"),
        *("--output", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "adavipro_fast.train", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        # Two threads wait for each other by spinning, which counts as work.
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    resident, busy = [], []
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch ") and "val top-1" in line:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
            ticks = Path(f"/proc/{process.pid}/stat").read_text().split()[13:15]
            busy.append(sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"))
    assert process.wait() == 0
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) * world.SPLITS["train"] >= 20_000
    # Of the processor's time, so that what else the machine does is left out.
    spent = [later - earlier for earlier, later in pairwise(busy)]
    first, last = median(spent[:20]), median(spent[-20:])
    print(f"MiB {resident[1]:.0f} to {resident[-1]:.0f}, s of an epoch {first:.2f} to {last:.2f}")
    assert resident[-1] < 1.01 * resident[1]
    assert last < 1.03 * first


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_precision_reaches_the_same_accuracy(tmp_path):
    def top1(precision, seed):
        best = recipe("best")
        config = replace(
            best,
            data=replace(best.data, cache_dir=tmp_path / "cache"),
            optimiser=replace(best.optimiser, epochs=10, precision=precision, seed=seed),
            device="cpu",
            output=tmp_path / f"{precision}-{seed}",
        )
        return train.start_run(config)["last_test_top1"]

    seeds = [top1("fp32", seed) for seed in range(3)]
    others = {precision: top1(precision, 0) for precision in ("bf16", "fp16")}
    print(f"fp32 {seeds}, others {others}")
    spread = max(seeds) - min(seeds)
    for value in others.values():
        assert abs(value - seeds[0]) <= spread
