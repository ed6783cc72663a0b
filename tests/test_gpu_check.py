"""The run on a GPU, rehearsed on a CPU: every step's flags and code, limits, targets, tables."""

import json
import os
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import gpu_check
import pytest
import throughput
import torch
from gpu_check import CheckConfig

from adavipro_fast.artifact.artifact import NotRunnableError
from adavipro_fast.errors import VerificationError
from adavipro_fast.method.clip import load_encoder
from lib import gpu_tables, launches, subject
from lib.plan import PARTS, Place, Step, steps
from lib.process import streamed
from lib.rows import file_row
from lib.table import Rows
from lib.targets import targets
from lib.timing import graphed
from lib.training_step import TrainingStep

CPU = torch.device("cpu")


def place(tmp_path, **more):
    return Place(tmp_path / "output", tmp_path / "work", "ViT-B-32", **more)


@pytest.mark.parametrize("name", ["kernels", "training demo 2"])
def test_a_rehearsed_step_writes_its_rows(name, tmp_path, monkeypatch, capsys):
    step = next(s for s in steps(place(tmp_path, cpu=True, quick=True)) if s.name == name)
    script = Path(step.command[1])
    monkeypatch.setattr(sys, "argv", list(step.command[1:]))
    import_module(script.stem).main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert not [row for row in rows if row.get("skipped", "").startswith("failed")]
    names = {row["name"] for row in rows}
    assert names > ({"masks", "kernel_backward"} if name == "kernels" else {"vp", "adavipro"})
    path = tmp_path / "output" / ("fused.json" if name == "kernels" else "training.json")
    assert json.loads(path.read_text())["rows"] == rows


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--cpu", "--output", str(tmp_path)])
    gpu_check.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {step["part"] for step in result["steps"]} == set(PARTS)
    for file in gpu_check.FILES:
        rows = json.loads((tmp_path / f"{file}.json").read_text())["rows"]
        assert not [row for row in rows if row.get("skipped", "").startswith("failed")]


def test_every_flag_of_the_run_on_a_gpu_exists(tmp_path, monkeypatch):
    monkeypatch.setattr("adavipro_fast.cli.run", lambda *_, **__: None)
    found = list(steps(place(tmp_path)))
    assert {step.part for step in found} == set(PARTS)
    for step in found:
        scripts = [part for part in step.command if part.startswith(str(gpu_check.ROOT / "bench"))]
        for script in scripts:
            arguments = step.command[step.command.index(script) :]
            monkeypatch.setattr(sys, "argv", list(arguments))
            import_module(Path(script).stem).main()


def test_the_most_valuable_steps_have_time_within_the_limit(tmp_path):
    found = [s for s in steps(place(tmp_path)) if not s.build]
    first = [s for s in found if s.part in ("tests", "kernels", "training", "smoke")]
    assert found[: len(first)] == first
    assert sum(step.limit_s for step in first) < CheckConfig().limit_s


def run_of(tmp_path, **config):
    where = place(tmp_path, cpu=True)
    where.output.mkdir()
    where.work.mkdir()
    return gpu_check.Run(CheckConfig(cpu=True, **config), where)


def test_a_step_that_is_too_slow_is_ended_and_its_output_kept(tmp_path):
    log = tmp_path / "log.txt"
    program = "import sys, time; print('a row', flush=True); time.sleep(60)"
    command = (sys.executable, "-c", program)
    options = {"log": log, "environment": dict(os.environ), "folder": tmp_path}
    outcome = streamed(command, limit_s=2, **options)
    assert outcome == "ended after 2 s, its limit"
    assert log.read_text() == "a row\n"
    assert streamed(("no-such-program",), limit_s=2, **options).startswith("cannot start")


def test_a_step_without_time_is_named_and_check_json_is_there(tmp_path):
    run = run_of(tmp_path)
    run.limit_s = 0.0
    run.step(Step("kernels", "it", 5, (sys.executable, "-c", "")))
    run.step(Step("profile", "ncu", 5, ("ncu",), only_gpu="it needs a GPU"))
    stored = json.loads((tmp_path / "output" / "check.json").read_text())
    outcomes = [step["outcome"] for step in stored["steps"]]
    assert outcomes == ["skipped: no time left", "skipped: it needs a GPU"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_way_out_is_named():
    with pytest.raises(ValueError, match="torch sees none; --cpu rehearses it"):
        gpu_check.command(CheckConfig())


def test_results_go_to_out_or_a_folder_of_the_device(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_check.output_of(CheckConfig()) == tmp_path
    monkeypatch.delenv("OUT")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB")
    assert gpu_check.output_of(CheckConfig()).parts[-2:] == ("results", "nvidia-h100-80gb")


def test_rows_are_on_disk_at_once_and_a_failure_is_a_row(tmp_path):
    path = tmp_path / "rows.json"
    rows = Rows(CPU, path)
    rows.append({"name": "first"})
    assert [r["name"] for r in json.loads(path.read_text())["rows"]] == ["first"]
    assert rows.attempt("second", lambda: 1 / 0) is None
    with pytest.raises(VerificationError):
        rows.attempt("third", wrong)
    more = Rows(CPU, path, append=True)
    more += ({"name": name} for name in ("third",))
    stored = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in stored] == ["first", "second", "third"]
    assert stored[1]["skipped"] == "failed: ZeroDivisionError: division by zero"


def wrong():
    raise VerificationError("it is wrong")


def test_a_file_that_no_provider_runs_is_a_skipped_row(tmp_path, monkeypatch):
    def refuse(*_):
        raise NotRunnableError("CUDA was asked for")

    monkeypatch.setattr(subject, "open_onnx", refuse)
    demo = subject.Subject("demo", images=1, device="cpu")
    (tmp_path / "folded.onnx").touch()
    (tmp_path / "baseline.onnx").touch()
    row = file_row(demo, "folded", 1, tmp_path, "onnxruntime", quick=False)
    assert row.skipped == "CUDA was asked for"
    point = throughput.point_or_reason(demo, 1, tmp_path)
    assert "CUDA was asked for" in point["skipped"]


def test_backwards_bytes_hold_its_partial_sums():
    shape = launches.Shape(256)
    assert launches.moved_bytes("forward", shape, 16) == 256 * 3 * 224**2 * 3
    sums = launches.moved_bytes("backward", shape, 16) - launches.moved_bytes("forward", shape, 16)
    assert sums == 4 * 16 * (3 * 224**2 + 49 * 3 * 34**2)


def test_a_captured_work_gets_the_number_of_its_call():
    calls = []
    graphed(calls.append, CPU, calls=3)()
    assert calls == [0, 1, 2]


def test_a_timed_step_prompts_in_the_encoders_type(monkeypatch):
    step = TrainingStep("vp", load_encoder("demo"), 2, "bf16")
    seen = []
    forward = step.model.prompt.forward

    def watched(images, **options):
        seen.append((images.device, options["dtype"]))
        return forward(images, **options)

    monkeypatch.setattr(step.model.prompt, "forward", watched)
    step()
    assert seen == [(CPU, torch.bfloat16)]
    assert len(step.pixels) == 8


RATIO = {"ratio": 1.02, "ratio_low": 1.0, "ratio_high": 1.04}
MADE_UP = {
    "fused": [
        {
            "name": "kernel_forward",
            "batch": 256,
            "region": 32,
            "dtype": "bfloat16",
            "median_ms": 0.05,
            "gb_s": 2300.0,
            "share_of_copy": 0.75,
        },
        {"name": "masks", "different": 0},
        {"name": "collapsed_compiled_both", "median_ms": 0.3, "ratio_to_fused": 1.4},
        {"name": "paper_form_eager_both", "skipped": "failed: OutOfMemoryError"},
    ],
    "training": [
        {
            "name": "adavipro",
            "model": "ViT-B-32",
            "batch": 256,
            "step_ms": 60.0,
            "peak_mib": 900.0,
            "ratio_to_vp": 1.01,
            "ratio_low": 1.0,
            "ratio_high": 1.02,
        }
    ],
    "latency": [
        {
            "name": "aoti_folded",
            "precision": "fp16",
            "batch": 16,
            "p50_ms": 1.0,
            "contract": "prompt + encoder",
            **RATIO,
        },
        {
            "name": "open_clip_eager",
            "precision": "fp16",
            "batch": 16,
            "p50_ms": 4.0,
            "contract": "encoder",
            "to_other": 3.9,
            "to_other_low": 3.8,
            "to_other_high": 4.0,
            "other": "aoti_folded",
        },
    ],
}


def test_targets_are_met_or_missed():
    found = targets(MADE_UP)
    assert [target["met"] for target in found.values()] == [True, True, False, True, False]
    assert found["times torch.compile"] == {
        "value": 1.4,
        "target": 1.5,
        "at": "least",
        "met": False,
    }


def made_up_results(root, *, rehearsal):
    folder = root / "nvidia-test"
    folder.mkdir()
    for name, rows in MADE_UP.items():
        (folder / f"{name}.json").write_text(json.dumps({"rows": rows}))
    machine = {"rehearsal": rehearsal, "device": "NVIDIA Test", "commit": "", "versions": {}}
    check = {"machine": machine, "targets": targets(MADE_UP)}
    (folder / "check.json").write_text(json.dumps(check))


def test_a_gpus_results_become_tables_and_a_rehearsal_does_not(tmp_path):
    (tmp_path / "a").mkdir()
    made_up_results(tmp_path / "a", rehearsal=False)
    section = gpu_tables.gpu_section(tmp_path / "a")
    assert "### nvidia-test" in section
    assert "| `kernel_forward` | 256 | 32 | bfloat16 | 0.050 | 2300 | 0.75 |" in section
    assert "| `aoti_folded` | fp16 | 16 | 1.000 | 1.020 (1.000 to 1.040) |" in section
    assert "| `open_clip_eager` | fp16 | 16 | 4.000 | 3.900 (3.800 to 4.000) |" in section
    assert "3 of 5 targets met; missed: times torch.compile; aoti_folded" in section
    assert "Measured on nvidia-test" in gpu_tables.gpu_limit(tmp_path / "a")
    (tmp_path / "b").mkdir()
    made_up_results(tmp_path / "b", rehearsal=True)
    assert "No figure of this project" in gpu_tables.gpu_section(tmp_path / "b")
    assert gpu_tables.gpu_limit(tmp_path / "b") == gpu_tables.LIMIT


def test_a_step_of_onnx_runtime_alone_gets_the_other_package(tmp_path):
    run = run_of(tmp_path, onnxruntime=tmp_path)
    step = Step("onnx", "it", 5, ())
    assert run.environment(step)["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path)
    other = run.environment(replace(step, part="kernels")).get("PYTHONPATH", "")
    assert str(tmp_path) not in other.split(os.pathsep)
