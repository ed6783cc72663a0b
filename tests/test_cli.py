"""What all commands share on the command line: help, usage errors, the version."""

import importlib
import re
import sys
import tomllib
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import adavipro_fast
from adavipro_fast import serve
from adavipro_fast.compare import CompareConfig
from adavipro_fast.evaluate import EvaluateConfig
from adavipro_fast.export import verify
from adavipro_fast.export.onnx_export import OnnxConfig
from adavipro_fast.export.to_tensorrt import TensorRtConfig
from adavipro_fast.export.to_triton import TritonConfig
from adavipro_fast.predict import PredictConfig
from adavipro_fast.serve import ServeConfig
from adavipro_fast.training.config import TrainConfig

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
SCRIPTS = {name: path.split(":")[0] for name, path in PROJECT["scripts"].items()}
CONFIGS = {
    "train": TrainConfig,
    "compare": CompareConfig,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "serve": ServeConfig,
    "to-onnx": OnnxConfig,
    "to-tensorrt": TensorRtConfig,
    "to-triton": TritonConfig,
}


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process, and return its exit code and what it printed."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"/somewhere/bin/{script}", *arguments])
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(SCRIPTS[script]).main()
        return stop.value.code or 0, *capsys.readouterr()

    return run


def names_of(config):
    """Return the names of all flags, those of configurations inside it too."""
    return {
        name
        for field in fields(config)
        for name in (names_of(field.type) if is_dataclass(field.type) else [field.name])
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_help_shows_the_flags_that_matter_first_and_all_others_in_groups(name, run):
    config = CONFIGS[name]
    code, text, _ = run(f"adavipro-{name}", "--help")
    assert code == 0
    assert text.startswith(f"usage: adavipro-{name} ")
    assert config.__doc__ in text
    # Without a terminal a title has a line under it instead of a box around it.
    _, *groups = re.split(r"^ (\w[\w ]*?) +\n -+ *$", text, flags=re.M)
    shown = {
        title: re.findall("^  --?([a-z][a-z-]*)", flags, re.M)
        for title, flags in zip(groups[::2], groups[1::2], strict=True)
    }
    first = getattr(config, "help_first", ())
    flags = [flag.replace("-", "_") for flag in shown["options"]]
    assert flags[:2] == ["h", "version"]
    assert tuple(flags[2 : 2 + len(first)]) == first
    assert len(flags) <= 2 + 10
    listed = {flag.replace("-", "_") for group in shown.values() for flag in group}
    missing = names_of(config) - listed
    assert missing <= {"checkpoint", "more", "artifact", "images", "source"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_prints_a_default_once(script, run):
    code, text, _ = run(script, "--help")
    assert code == 0
    flat = " ".join(re.sub("[─-╿]", " ", text).split())
    assert "--version print the version and exit" in flat
    assert "(default: None)" not in flat
    assert "None}" not in flat
    assert not re.search(r"\(default: [^)]*\) \((default|repeatable)", flat)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (
            "train",
            ["--promt-size", "3"],
            "unrecognized options: --promt-size, 3; perhaps you meant --prompt-size INT width of "
            "the prompt's frame, pixels (default: 30)",
        ),
        ("train", ["--prompt-size"], "missing value for argument '--prompt-size'"),
        (
            "train",
            ["--edge", "grün"],
            "invalid choice 'grün' for argument '--edge'. Expected one of ('laplacian', "
            "'laplacian-magnitude', 'sobel', 'none')",
        ),
        (
            "train",
            ["--prompt-size", "x"],
            "--prompt-size: invalid literal for int() with base 10: 'x'",
        ),
        ("train", ["--tau-decay", "1.5"], "tau_decay is 1.5; use a number up to 1"),
        ("serve", ["--port", "70000", "x"], "port is 70000; use 0 to 65535"),
        (
            "to-onnx",
            [],
            "missing: CHECKPOINT checkpoint.safetensors; --output PATH output file, F.onnx",
        ),
    ],
)
def test_a_usage_error_is_one_sentence_with_the_commands_own_name(script, arguments, message, run):
    code, out, err = run(f"adavipro-{script}", *arguments)
    assert (code, out) == (2, "")
    assert err == f"error: {message}; see adavipro-{script} --help\n"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["env/bin/adavipro-train"], "adavipro-train"),
        ([find_spec("adavipro_fast.train").origin], "python -m adavipro_fast.train"),
        (["export/to_onnx.py"], "python export/to_onnx.py"),
    ],
)
def test_a_program_is_named_as_it_was_started(arguments, shown, monkeypatch):
    main = ModuleType("__main__")
    main.__spec__ = find_spec("adavipro_fast.train")
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", arguments)
    assert adavipro_fast.usage.program() == shown


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_version_is_the_installed_packages(script, run):
    assert adavipro_fast.__version__ == version("adavipro_fast")
    assert run(script, "--version") == (0, f"adavipro_fast {adavipro_fast.__version__}\n", "")


@pytest.mark.parametrize(("count", "shown"), [(1, "1 thread"), (2, "2 threads")])
def test_the_server_counts_its_threads(count, shown, monkeypatch, capsys):
    server = SimpleNamespace(
        served=[SimpleNamespace(name="m")],
        address="http://127.0.0.1:1",
        run_until_signal=lambda: None,
        metrics=SimpleNamespace(answered=0),
    )
    monkeypatch.setattr(serve, "prepared", lambda _: server)
    monkeypatch.setattr(serve, "threads", lambda: count)
    serve.command(ServeConfig(("m.onnx",)))
    assert capsys.readouterr().err.endswith(f"/docs; {shown}\n")


@pytest.mark.parametrize(
    ("ties", "shown"),
    [(0, "masks equal"), (1, "masks equal except 1 tie"), (2, "masks equal except 2 ties")],
)
def test_verify_counts_ties_where_there_are_any(ties, shown):
    figures = {"max_abs_error": 1e-6, "min_cosine": 1.0, "top1_agreement": 100.0}
    assert verify.summary(figures | {"mask_ties": ties}).endswith(f", {shown}")
