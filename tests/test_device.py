import json
import subprocess
import sys

import pytest
import torch

from adavipro_fast import device
from adavipro_fast.training.run import start_run
from adavipro_fast.training.state import read_state

CPU = torch.device("cpu")


@pytest.mark.parametrize(("has_bf16", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_the_default_precision_is_what_the_processor_does_fast_and_stays_in_the_run(
    has_bf16, chosen, small, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(device, "fast_bf16", lambda _: has_bf16)
    start_run(small(tmp_path / "run", epochs=1))
    _, state = read_state(tmp_path / "run" / "last.safetensors")
    assert state.settings["optimiser"]["precision"] == chosen
    err = capsys.readouterr().err
    assert f"trainable parameters, {chosen};" in err
    assert "warning: this processor" not in err


def test_a_slow_choice_warns(monkeypatch):
    monkeypatch.setattr(device, "fast_bf16", lambda _: False)
    assert "emulates bf16" in device.slow_precision("bf16", CPU)
    assert "fp16 has no fast path" in device.slow_precision("fp16", CPU)
    assert device.slow_precision("fp32", CPU) is None


@pytest.mark.parametrize("name", ["ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"])
def test_variables_that_take_bf16_away_are_followed(name, monkeypatch):
    monkeypatch.setenv(name, "avx2")
    program = (
        "import torch; from adavipro_fast.device import fast_precision\n"
        "print(fast_precision(torch.device('cpu')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "fp32"


def test_output_that_a_terminal_cannot_encode_is_escaped(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    program = (
        "from adavipro_fast import cli\n"
        "def command():\n"
        "    print('猫.jpg', '\\udcff')\n"
        "    return {'path': '猫.jpg'}\n"
        "cli.run(command)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    *_, first, last = done.stdout.decode("cp1252").splitlines()
    assert first == r"\u732b.jpg \udcff"
    assert json.loads(last) == {"path": "猫.jpg"}
