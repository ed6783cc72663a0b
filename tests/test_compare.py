"""The search for what fits a data set: what is tried, for how long, and who wins."""

import json
import sys

import pytest
import torch

from adavipro_fast import compare
from adavipro_fast.compare import CompareConfig, candidates
from adavipro_fast.training import search
from adavipro_fast.training.config import recipe
from adavipro_fast.training.search import Search, schedule


def tried(tmp_path, *flags):
    base = compare.cli.parse(CompareConfig, CompareConfig(train=recipe("best")), flags)
    return candidates(base.train, tmp_path, flags)


def test_flags_hold_what_they_name(tmp_path):
    every = tried(tmp_path)
    assert [c.name for c in every[:3]] == ["zero_shot", "linear_probe", "adavipro-linear-30"]
    assert len({c.config.output for c in every}) == len(every) == 11
    sized = tried(tmp_path, "--prompt-size", "50", "--seed", "3")
    assert [c.name for c in sized if c.name.startswith("vp-linear")] == ["vp-linear-50"]
    assert {c.config.optimiser.seed for c in sized} == {3}
    text = tried(tmp_path, "--head", "text", "--method", "vp", "--lr-prompt", "7")
    assert [(c.name, c.eligible) for c in text] == [
        ("zero_shot", False), ("linear_probe", False), ("vp-text-30", True)
    ]  # fmt: skip
    assert text[2].config.optimiser.lr_prompt == 7
    shrunk = tried(tmp_path, "--margin", "30")
    assert {c.config.prompt.margin for c in shrunk if c.config.prompt.method == "vp"} == {30}
    assert "full_finetune-text" not in [c.name for c in shrunk]


@pytest.mark.parametrize(
    ("seconds", "epochs", "expected"),
    [(10_000, None, (8, 48)), (160, None, (8, 5)), (40, None, (2, 4)), (8, None, (1, 1)),
     (0, None, (0, 0)), (400, 50, (1, 50))],
)  # fmt: skip
def test_a_budget_decides_how_many_train_and_for_how_long(seconds, epochs, expected):
    assert schedule(8, 8.0, seconds, epochs) == expected


def test_a_search_is_stopped_goes_on_and_leaves_the_winner(
    folder, cache, monkeypatch, tmp_path, capsys
):
    flags = [
        *("--data", str(folder), "--cache-dir", str(cache), "--device", "cpu"),
        *("--minutes", "5", "--epochs", "2", "--batch-size", "8", "--embed-dim", "4"),
        *("--prompt-size", "30", "--head", "linear", "--method", "vp"),
    ]
    output = ["--output", str(tmp_path / "search")]
    monkeypatch.setattr(sys, "argv", ["compare", *flags, *output])
    advance = Search.advance

    def stopped(self, candidate, *rest):
        advance(self, candidate, *rest)
        if candidate.name == "linear_probe":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Search, "advance", stopped)
        with pytest.raises(KeyboardInterrupt):
            compare.command()
    with pytest.raises(ValueError, match="already contains a search; continue it with --resume"):
        compare.command()
    monkeypatch.setattr(sys, "argv", ["compare", "--resume", str(tmp_path / "search")])
    fits = []
    monkeypatch.setattr(search, "build", lambda *a, build=search.build: fits.append(a) or build(*a))
    result = compare.command()
    # The probe was there already, and linear heads start from it.
    assert all(config.prompt.method != "linear_probe" for config, _ in fits)
    assert all(config.head_from for config, _ in fits if config.prompt.method == "vp")
    rows = {row["name"]: row for row in result["rows"]}
    assert set(rows) == {"zero_shot", "linear_probe", "vp-linear-30"}
    assert result["winner"] == "vp-linear-30"
    assert rows["vp-linear-30"]["test_top1"] is not None
    assert result["minutes"] == 5
    assert rows["vp-linear-30"]["epochs"] == 2
    assert json.loads((tmp_path / "search" / "compare.json").read_text())["rows"] == result["rows"]
    assert (tmp_path / "search" / "compare.png").stat().st_size > 5000
    assert "**vp-linear-30" in (tmp_path / "search" / "compare.md").read_text()
    page = (tmp_path / "search" / "compare.html").read_text()
    assert '<tr class="winner"><td>vp-linear-30</td>' in page
    assert page.count('src="data:image/png;base64,') >= 3
    assert f"adavipro-to-onnx {result['checkpoint']} --output model.onnx" in page
    # Nothing is fetched from elsewhere.
    assert "http" not in page
    # Nothing is left to train: started again it says the same.
    again = compare.command()
    same = ("name", "val_top1", "test_top1", "epochs")
    assert [[r[k] for k in same] for r in again["rows"]] == [
        [r[k] for k in same] for r in result["rows"]
    ]


def test_a_candidate_that_fails_is_left_out(monkeypatch, tmp_path, capsys):
    every = tried(tmp_path)
    search_of = Search(every, 60, tmp_path)
    monkeypatch.setattr(Search, "advance", lambda *_: (_ for _ in ()).throw(ValueError("too wide")))
    search_of.attempt(every[2], 1, 60.0)
    assert "adavipro-linear-30 is skipped: too wide" in capsys.readouterr().err
    # Another start knows it.
    assert Search(every, 60, tmp_path).plan["failed"] == {"adavipro-linear-30": "too wide"}


def test_a_budget_of_nothing_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare", "--minutes", "0"])
    with pytest.raises(SystemExit) as stop:
        compare.main()
    assert stop.value.code == 2
    assert "minutes is 0.0; use a number above 0" in capsys.readouterr().err
    assert torch.is_grad_enabled()
