import ast
import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from runpy import run_module

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from adavipro_fast import cli, evaluate, predict, train
from adavipro_fast.artifact.torch import TorchArtifact
from adavipro_fast.data.sets import DataConfig
from adavipro_fast.errors import NonFiniteLossError
from adavipro_fast.evaluate import EvaluateConfig
from adavipro_fast.files.whole import read_safetensors, safetensors_bytes
from adavipro_fast.predict import PredictConfig
from adavipro_fast.training.config import OptimiserConfig, lr_factor, recipe
from adavipro_fast.training.run import resume_run, start_run

PRODUCT = Path(__file__).parents[1]
KEYS = {
    "method", "zero_shot_top1", "val_top1", "test_top1", "last_test_top1", "trainable_params",
    "mask_density", "mask_adaptivity", "mask_placement", "epochs", "images_per_s", "seconds",
    "images", "duplicates", "checkpoint",
}  # fmt: skip


def command(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"adavipro_fast.{module}", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="session")
def trained(small, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    return output, start_run(small(output))


def test_training_gives_the_contracts_keys_and_files(trained):
    output, result = trained
    assert set(result) == KEYS
    assert {p.name.split(".")[0] for p in output.iterdir() if p.name != ".lock"} == {
        "checkpoint", "last", "metrics", "masks", "curves", "events", "data"
    }  # fmt: skip
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert result["trainable_params"] == 69_840 + 4 * 28 + 2 * 4 * 32 * 32 + 2


def test_training_suggests_the_export_that_the_readme_shows(trained):
    shown = re.search(r"to_onnx.py \S+ --output \S+( .*)\n", (PRODUCT / "README.md").read_text())[1]
    path, result = trained[0] / "checkpoint", trained[1]
    export = f"adavipro-to-onnx {path}.safetensors --output {path}.onnx{shown}"
    assert train.summary(result).splitlines()[-1] == f"export:  {export}"


def test_the_same_seed_gives_the_same_bytes(trained, small, tmp_path):
    start_run(small(tmp_path / "again"))
    again = (tmp_path / "again" / "checkpoint.safetensors").read_bytes()
    assert again == (trained[0] / "checkpoint.safetensors").read_bytes()


def test_vp_trains_the_template_alone(small, tmp_path):
    result = start_run(small(tmp_path, method="vp", epochs=1))
    assert result["trainable_params"] == 69_840
    assert result["mask_density"] == 1
    assert result["mask_adaptivity"] == 0


def flags(config):
    return [
        *("--data", config.data.data, "--cache-dir", config.data.cache_dir),
        *("--output", config.output, "--embed-dim", 4, "--device", "cpu"),
        *("--edge", "laplacian-magnitude"),
        *("--recipe", "paper", "--epochs", config.optimiser.epochs),
        *("--batch-size", 8, "--lr-prompt", 1, "--lr-generator", 0.01),
        *("--generator-optimiser", config.optimiser.generator_optimiser),
        *("--generator-start", config.optimiser.generator_start),
    ]


@pytest.mark.parametrize(
    ("stop", "optimiser"),
    [
        pytest.param(signal.SIGKILL, {}, marks=pytest.mark.slow),
        pytest.param(
            signal.SIGINT,
            {"generator_optimiser": "adam", "generator_start": 0.3},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_stopped_in_epoch_3_and_resumed_ends_in_the_same_bytes(
    small, tmp_path, tmp_path_factory, stop, optimiser
):
    whole, cut = tmp_path_factory.mktemp("whole") / "run", tmp_path / "run"
    start_run(small(whole, epochs=5, **optimiser))
    config = small(cut, epochs=5, **optimiser)
    arguments = [sys.executable, "-m", "adavipro_fast.train", *map(str, flags(config))]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = cut / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(stop)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGKILL, 130)
    if stop == signal.SIGINT:
        assert f"continue with --resume {cut}" in complaint
    result = resume_run_from_command_line(cut)
    name = "checkpoint.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert resume_run_from_command_line(cut) == result


def test_the_generator_waits_for_its_start(small, tmp_path):
    def generators(start, name):
        config = small(tmp_path / name, epochs=2, generator_optimiser="adam", generator_start=start)
        start_run(replace(config, optimiser=replace(config.optimiser, lr_prompt=0.0)))
        tensors = load_file(tmp_path / name / "last.safetensors")
        return {k: v for k, v in tensors.items() if k.startswith(("policy", "convergence"))}

    waiting, learning = generators(1.0, "waiting"), generators(0.5, "learning")
    untrained = generators(1.0, "again")
    assert all(torch.equal(waiting[k], untrained[k]) for k in waiting)
    assert not torch.equal(waiting["policy.weight"], learning["policy.weight"])


def resume_run_from_command_line(folder):
    done = command("train", "--resume", folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_resuming_with_other_settings_shows_the_difference(trained):
    done = command("train", "--resume", trained[0], "--prompt-size", 60, "--margin", 9)
    assert done.returncode == 2
    assert "--prompt-size 60 instead of 30" in done.stderr
    assert "--margin 9 instead of 0" in done.stderr


def test_a_folder_with_a_run_is_not_overwritten(trained, small):
    with pytest.raises(ValueError, match="already contains a run; continue it with --resume"):
        start_run(small(trained[0]))


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(FileNotFoundError, match="contains no last.safetensors"):
        resume_run(tmp_path)


def test_a_loss_that_diverges_stops_the_run_and_keeps_the_last_good_state(
    small, tmp_path, monkeypatch
):
    monkeypatch.setattr("adavipro_fast.training.trainer.lr_factor", lambda *_: 1e32)
    with pytest.raises(NonFiniteLossError, match="use a lower --lr-prompt than 1e"):
        start_run(small(tmp_path, lr_prompt=1e6, epochs=9))
    saved = load_file(tmp_path / "last.safetensors")
    assert all(value.isfinite().all() for value in saved.values())


def with_margin(config, margin):
    return replace(config, prompt=replace(config.prompt, margin=margin))


def test_a_run_that_helps_no_one_gives_the_untrained_prompt_back(small, tmp_path, capsys):
    config = small(tmp_path / "run", epochs=1, lr_prompt=0.0)
    config = replace(config, prompt=replace(config.prompt, prompt_init="zero"))
    result = start_run(config)
    assert "the untrained prompt is kept" in capsys.readouterr().err
    assert result["test_top1"] == result["zero_shot_top1"]
    assert not load_file(result["checkpoint"])["prompt"].any()


def test_zero_shot_is_of_whole_images_whatever_the_margin(trained, small, tmp_path, capsys):
    config = with_margin(small(tmp_path, epochs=1, lr_prompt=0.0), 56)
    config = replace(config, prompt=replace(config.prompt, prompt_init="zero"))
    result = start_run(config)
    assert result["zero_shot_top1"] == trained[1]["zero_shot_top1"]
    # The untrained prompt is 0: what differs is the margin.
    assert result["test_top1"] != result["zero_shot_top1"]
    assert "the untrained prompt of the shrunk images" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--margin needs a prompt, and method zero_shot has none"):
        with_margin(small(tmp_path / "other", method="zero_shot"), 56)


def test_evaluate_gives_training_s_test_figure(trained, folder, cache):
    output, result = trained
    data = DataConfig(str(folder), cache_dir=cache)
    config = EvaluateConfig(output / "checkpoint.safetensors", data, device="cpu")
    figures = evaluate.command(config)
    assert figures["top1"] == result["test_top1"]
    assert figures["mask_density"] == result["mask_density"]
    assert (figures["n"], figures["backend"], figures["provider"]) == (12, "torch", "cpu")
    assert set(figures["per_class"]) == {"circle", "crescent", "cross"}


def test_evaluate_writes_where_the_model_is_wrong(trained, folder, cache, tmp_path, capsys):
    output, _ = trained
    files = {
        "errors": tmp_path / "errors.csv",
        "confusion": tmp_path / "confusion.csv",
        "worst": tmp_path / "worst.png",
    }
    # One class has more images than the others: the mean of the classes is another figure.
    data = tmp_path / "unbalanced"
    shutil.copytree(folder, data)
    for path in sorted((data / "test" / "cross").iterdir())[1:]:
        path.unlink()
    settings = DataConfig(str(data), cache_dir=cache)
    checkpoint = output / "checkpoint.safetensors"
    figures = evaluate.command(EvaluateConfig(checkpoint, settings, device="cpu", **files))
    shares = figures["per_class"].values()
    assert figures["macro"] == pytest.approx(sum(shares) / 3)
    with files["errors"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == round(figures["n"] * (1 - figures["top1"] / 100))
    confidences = [float(row["confidence"]) for row in rows]
    assert confidences == sorted(confidences)
    for row in rows:
        assert Path(row["path"]).parent.name == row["label"] != row["answer"]
    with files["confusion"].open(newline="") as file:
        head, *counted = csv.reader(file)
    assert head == ["class", *figures["per_class"]]
    for number, (name, *counts) in enumerate(counted):
        total = sum(map(int, counts))
        assert 100 * int(counts[number]) / total == pytest.approx(figures["per_class"][name])
        wrong = sum(row["label"] == name for row in rows)
        assert total - int(counts[number]) == wrong
    assert Image.open(files["worst"]).width > 100
    drawn = replace(EvaluateConfig(checkpoint, settings), confusion=tmp_path / "c.png")
    evaluate.command(drawn)
    assert Image.open(tmp_path / "c.png").width > 100
    with pytest.raises(ValueError, match="errors.txt must end in .csv"):
        EvaluateConfig(checkpoint, settings, errors=tmp_path / "errors.txt")


def test_predict_names_classes_and_draws_the_mask(trained, folder, tmp_path):
    images = tuple(sorted((folder / "test" / "circle").iterdir()))[:2]
    picture = tmp_path / "out.png"
    config = PredictConfig(trained[0] / "checkpoint.safetensors", images, picture, device="cpu")
    predictions = predict.command(config)["predictions"]
    assert [p["path"] for p in predictions] == [str(i) for i in images]
    for prediction in predictions:
        probabilities = [c["probability"] for c in prediction["classes"]]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert probabilities == sorted(probabilities, reverse=True)
        assert torch.tensor(prediction["mask"]).shape == (7, 7)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("train", ["--data", "nowhere"], "no such folder: nowhere"),
        ("train", ["--region-size", "48"], "48 does not divide image side 224"),
        ("train", ["--prompt-size", "113"], "113 does not fit an image of side 224"),
        ("train", ["--margin", "112"], "margin 112 leaves no image of side 224; use 0 to 111"),
        ("train", ["--model", "ViT-Q-7"], "open_clip has no model 'ViT-Q-7'"),
        ("train", ["--model", "local-dir:nowhere"], "'local-dir:nowhere' .* cannot be loaded"),
        ("train", ["--pretrained", "x", "--model", "RN50"], "'RN50' .* cannot be loaded"),
        ("train", ["--device", "cuda:9"], "PyTorch finds no CUDA device"),
        ("train", ["--device", "gpu"], "device 'gpu' is unknown"),
        ("train", ["--device", "mps"], "device 'mps' is not supported; use auto, cpu or cuda"),
        ("train", ["--device", "meta"], "device 'meta' is not supported"),
        ("train", ["--cache-limit-gb", "inf"], "cache_limit_gb is inf"),
        ("train", ["--tau", "inf"], "tau is inf"),
        ("train", ["--tau-decay", "1.5"], "tau_decay is 1.5; use a number up to 1"),
        ("train", ["--lr-prompt", "1e30"], r"lr_prompt is 1e\+30; use 0 to 1e\+09"),
        ("train", ["--lr-prompt", "nan"], "lr_prompt is nan"),
        ("train", ["--batch-size", "-3"], "batch_size is -3"),
        ("train", ["--batch-size", "0"], "batch_size is 0"),
        ("evaluate", ["a.onnx", "--batch-size", "0"], "batch_size is 0; use 1 or more"),
        ("evaluate", ["a.onnx", "--batch-size", "-3"], "batch_size is -3; use 1 or more"),
        ("train", ["--template", "a photo"], "no {} for the class name"),
        ("train", ["--epochs", "0"], "epochs is 0"),
        ("train", ["--promt-size", "3"], "--promt-size"),
        ("train", ["--edge", "canny"], "canny"),
        ("evaluate", ["nothing.safetensors"], "no such file: nothing.safetensors"),
        ("predict", ["nothing.safetensors", "a.jpg"], "no such file: nothing.safetensors"),
        ("demo", ["pictures", "--output", "x"], "pictures"),
    ],
)
def test_a_bad_request_is_one_line_and_exit_2(
    module, arguments, message, tmp_path, monkeypatch, capsys
):
    if arguments[0] == "--device" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    monkeypatch.chdir(tmp_path)
    # As `python -m` runs it: from the start.
    monkeypatch.delitem(sys.modules, f"adavipro_fast.{module}", raising=False)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as stop:
        run_module(f"adavipro_fast.{module}", run_name="__main__")
    assert stop.value.code == 2
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert "Traceback" not in told
    assert not (tmp_path / "runs").exists()


def test_predict_on_many_files_runs_in_batches(trained, folder, monkeypatch, tmp_path):
    images = tuple(sorted((folder / "test").rglob("*.*")))[:7]
    config = PredictConfig(trained[0] / "checkpoint.safetensors", images, device="cpu")
    whole = predict.command(config)
    sizes, run = [], TorchArtifact.__call__
    monkeypatch.setattr(predict, "BATCH", 3)
    monkeypatch.setattr(
        TorchArtifact, "__call__", lambda self, x: sizes.append(len(x)) or run(self, x)
    )
    parts = predict.command(replace(config, picture=tmp_path / "out.png"))
    assert sizes == [3, 3, 1]
    for a, b in zip(whole["predictions"], parts["predictions"], strict=True):
        assert a["mask"] == b["mask"]
        assert [c["name"] for c in a["classes"]] == [c["name"] for c in b["classes"]]


def test_slow_precision_is_told(trained, folder, cache, capsys):
    data = DataConfig(str(folder), cache_dir=cache)
    path = trained[0] / "checkpoint.safetensors"
    evaluate.command(EvaluateConfig(path, data, precision="fp16", device="cpu"))
    assert "warning: fp16 has no fast path on a CPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        Exception("[ONNXRuntimeError] : 6 : BFCArena: Failed to allocate memory for 7 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_one_line_that_names_the_batch_size(error, capsys):
    def work():
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(work)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory")
    assert "--batch-size" in line


def test_an_error_of_ours_keeps_its_traceback():
    def work():
        raise RuntimeError("a fault of the program")

    with pytest.raises(RuntimeError, match="a fault of the program"):
        cli.run(work)


def test_the_commands_are_listed(capsys):
    run_module("adavipro_fast", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    names = [
        "train", "compare", "evaluate", "predict", "tasks", "serve", "app", "push", "cache",
        "to-onnx", "to-tensorrt", "to-triton", "to-task", "relabel", "verify"
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[:-1]] == [f"adavipro-{name}" for name in names]
    assert lines[-1].startswith("python -m adavipro_fast.demo ")
    assert all(len(line.split()) > 3 for line in lines)


def test_hints_name_commands_as_they_are_installed():
    """Docstrings may show `python -m`; what is printed names the installed commands."""
    shown = []
    for path in (*PRODUCT.glob("adavipro_fast/**/*.py"), *PRODUCT.glob("export/*.py")):
        tree = ast.parse(path.read_text())
        documents = {
            ast.get_docstring(node, clean=False)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        }
        shown += [
            f"{path.name}: {node.value}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            if node.value not in documents
            if re.search("python -m adavipro_fast\\.|python export/", node.value)
        ]
    assert shown == ["__main__.py: python -m adavipro_fast.demo  "]


def test_no_standard_output_is_no_error(tmp_path):
    command = f"{sys.executable} -m adavipro_fast.cache --cache-dir {tmp_path} >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0
    assert done.stderr.decode() == f"\n{tmp_path}: 0 files, 0.0 MB; 0.0 MB removed\n"


@pytest.mark.parametrize("target", ["/dev/full", "closed pipe"])
def test_output_that_nobody_takes_is_one_line(target, tmp_path):
    arguments = [sys.executable, "-m", "adavipro_fast.cache", "--cache-dir", str(tmp_path)]
    if target == "closed pipe":
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        complaint = process.stderr.read().decode()
        code = process.wait(timeout=120)
    else:
        with open(target, "w") as full:  # noqa: PTH123
            done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, check=False)
        complaint, code = done.stderr.decode(), done.returncode
    assert code == 2
    _, summary, error = complaint.splitlines()
    assert summary.startswith(f"{tmp_path}: 0 files")
    assert error.startswith("error: ")


def test_the_learning_rate_warms_up_and_falls_to_zero():
    factors = [lr_factor(step, 100) for step in range(100)]
    assert factors[9] == 1
    assert factors[0] == 0.1
    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] < 0.001


def test_the_temperature_decays_to_its_floor():
    config = OptimiserConfig()
    assert config.temperature(0) == 5
    assert config.temperature(100) == pytest.approx(5 * 0.98**100)
    assert config.temperature(1000) == config.tau_min


def test_the_papers_settings_are_one_flag_away():
    paper = recipe("paper")
    assert (paper.optimiser.lr_prompt, paper.optimiser.lr_generator) == (40, 1)
    assert (paper.prompt.edge, paper.prompt.edge_padding) == ("laplacian", "zero")
    assert (paper.optimiser.tau, paper.optimiser.tau_decay) == (5, 0.98)


@pytest.mark.parametrize(("size", "rate"), [(5, 40), (30, 40), (60, 14.1), (112, 5.5)])
def test_a_wider_frame_learns_more_slowly(size, rate, monkeypatch):
    flags = ["train", "--prompt-size", str(size)]
    monkeypatch.setattr(sys, "argv", flags)
    config = train.parse()
    assert config == recipe("best", size)
    assert config.optimiser.lr_prompt == rate
    monkeypatch.setattr(sys, "argv", [*flags, "--lr-prompt", "3"])
    assert train.parse().optimiser.lr_prompt == 3
    for again in (["--prompt_size", "90"], ["--prompt-size=90"], ["--prompt_size=90"]):
        monkeypatch.setattr(sys, "argv", [*flags, *again])
        assert train.parse() == recipe("best", 90)


def test_without_flags_it_is_the_demo_under_the_default_recipe(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train"])
    configs = []
    monkeypatch.setattr(train, "start_run", lambda config: configs.append(config) or {})
    train.command()
    assert configs == [recipe("best")]


def test_ctrl_c_stops_what_comes_after_training(small, tmp_path):
    def handler(*_):
        """Stand in for the shell's own way, which may be to ignore it."""

    before = signal.signal(signal.SIGINT, handler)
    try:
        start_run(small(tmp_path, epochs=1))
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("broken", [b"", b"no image", None])
def test_predict_answers_the_others_where_one_image_is_broken(trained, folder, tmp_path, broken):
    good = sorted((folder / "test").rglob("*.*"))[0]
    bad = tmp_path / "bad.jpg"
    if broken is not None:
        bad.write_bytes(broken)
    checkpoint = trained[0] / "checkpoint.safetensors"
    picture = tmp_path / "out.png"
    config = PredictConfig(checkpoint, (bad, good, good), device="cpu", picture=picture)
    first, second, third = predict.command(config)["predictions"]
    assert first["path"] == str(bad)
    assert set(first) == {"path", "error"}
    assert second == third
    assert set(second) == {"path", "answer", "rejected", "classes", "mask"}
    assert picture.exists()


@pytest.mark.parametrize("count", [1, 2])
def test_predict_prints_an_error_once_where_no_image_can_be_read(
    trained, tmp_path, count, monkeypatch, capsys
):
    images = [str(tmp_path / f"missing{number}.jpg") for number in range(count)]
    arguments = [str(trained[0] / "checkpoint.safetensors"), *images, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["predict", *arguments])
    with pytest.raises(SystemExit) as stop:
        predict.main()
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    errors = "; ".join(f"no such image file: {image}" for image in images)
    more = " (none of the 2 images can be read)" if count == 2 else ""
    assert err == f"error: {errors}{more}\n"


def test_training_without_a_test_split_says_so(small, folder, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(folder / "train", data)
    (data / "cross" / "notes.txt").write_text("x")
    config = small(tmp_path / "run", epochs=1)
    result = start_run(replace(config, data=replace(config.data, data=str(data))))
    assert result["test_top1"] is result["last_test_top1"] is result["zero_shot_top1"] is None
    assert result["images"] == {"train": 27, "val": 3, "test": 0, "left_out": 1}
    assert "no test split" in train.summary(result)
    err = capsys.readouterr().err
    assert "warning: there is no test split" in err
    assert "its folders hold the training images, one class each" in err
    kept = json.loads((tmp_path / "run" / "data.json").read_text())
    assert kept["left_out"] == {".txt": 1}
    assert len(kept["held_out"]) == 3
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    shutil.rmtree(data / "circle")
    found = evaluate.command(EvaluateConfig(checkpoint, DataConfig(str(data)), device="cpu"))
    assert "the model was trained on these images" in capsys.readouterr().err
    assert found["n"] == 20
    assert found["per_class"]["circle"] is None
    assert "worst classes: " in evaluate.summary(found)


def test_class_embeddings_of_another_width_are_refused(small, tmp_path):
    path = tmp_path / "classes.safetensors"
    save_file({"class_embeddings": torch.randn(3, 5)}, path)
    with pytest.raises(ValueError, match="have 5 elements, but the encoder's output has 64"):
        start_run(replace(small(tmp_path / "run"), class_embeddings=path))


def test_another_seed_gives_another_order_of_the_images(small, tmp_path):
    # vp from a zero template draws nothing else at random.
    prompts = []
    for seed in (0, 1):
        config = small(tmp_path / str(seed), method="vp", epochs=1, seed=seed)
        config = replace(config, prompt=replace(config.prompt, prompt_init="zero"))
        start_run(config)
        # The state holds the last prompt, also where the untrained one was kept as the best.
        prompts.append(load_file(tmp_path / str(seed) / "last.safetensors")["prompt"])
    assert not torch.equal(*prompts)


def test_a_message_cannot_steer_the_terminal(capsys):
    with pytest.raises(SystemExit):
        cli.fail("no class \x1b[2J\x07\u202e here\nnor there")
    assert capsys.readouterr().err == "error: no class \\x1b[2J\\x07\\u202e here nor there\n"


def test_a_run_of_an_older_version_is_not_continued_in_silence(small, tmp_path):
    trainer_config = small(tmp_path, epochs=2)
    start_run(trainer_config)
    path = tmp_path / "last.safetensors"
    tensors, metadata = read_safetensors(path)
    metadata["settings"].pop("white_level")
    metadata["progress"]["result"] = {}
    path.write_bytes(safetensors_bytes(tensors, metadata))
    with pytest.raises(ValueError, match="started by an older version, which decoded and split"):
        resume_run(tmp_path)
