import csv
import subprocess
from dataclasses import replace

import paper
import pytest
import torch

from adavipro_fast.training import start
from adavipro_fast.training.config import recipe


@pytest.fixture
def sweep(folder, tmp_path, monkeypatch):
    """A table of three quick cells on the demo's encoder."""
    lines = [("zero_shot", {"method": "zero_shot"}), ("vp", {"method": "vp"}), ("adavipro", {})]
    monkeypatch.setitem(paper.LINES, 1, lines)
    monkeypatch.setenv("HOME", str(tmp_path))
    return paper.PaperConfig(
        table=1,
        model="demo",
        pretrained="",
        data=(str(folder),),
        epochs=(2,),
        batch_size=10,
        recipe="best",
        cells=tmp_path / "cells",
        output=tmp_path / "results",
    )


def stop_at(monkeypatch, number):
    """Let only so many cells be started."""
    real, started = subprocess.run, []

    def run(command, **options):
        started.append(command)
        if len(started) > number:
            raise KeyboardInterrupt
        return real(command, **options)

    monkeypatch.setattr(paper.subprocess, "run", run)
    return started


def test_a_stopped_sweep_goes_on_and_repeats_no_finished_cell(sweep, monkeypatch):
    # A run that cannot be resumed was stopped after it had written its head.
    left = sweep.cells / paper.cells_of(paper.LINES[1], sweep)[0].key / "head.safetensors"
    left.parent.mkdir(parents=True)
    left.touch()
    first = stop_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        paper.command(sweep)
    assert len(first) == 3
    monkeypatch.undo()
    monkeypatch.setitem(
        paper.LINES,
        1,
        [("zero_shot", {"method": "zero_shot"}), ("vp", {"method": "vp"}), ("adavipro", {})],
    )
    # The third was killed in mid-run.
    cell = paper.cells_of(paper.LINES[1], sweep)[2]
    flags = dict(cell.flags)
    config = recipe("best")
    config = replace(
        config,
        model="demo",
        data=replace(config.data, data=flags["data"], data_root=sweep.data_root),
        optimiser=replace(config.optimiser, epochs=2, batch_size=10),
        output=sweep.cells / cell.key,
        device="auto",
    )
    run = start.build(config, start.load(config))
    run.trainer.save()
    again = stop_at(monkeypatch, 99)
    told = paper.command(sweep)
    assert len(again) == 1
    assert "--resume" in again[0]
    with (sweep.output / "table1.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["line"] for row in rows] == ["zero_shot", "vp", "adavipro"]
    assert [int(row["trainable_params"]) for row in rows] == [0, 69_840, 202_706]
    whole = (sweep.output / "table1.csv").read_bytes()
    finished = stop_at(monkeypatch, 0)
    assert paper.command(sweep) == told
    assert not finished
    assert (sweep.output / "table1.csv").read_bytes() == whole


def test_a_table_or_a_figure_must_be_named(sweep):
    with pytest.raises(
        ValueError, match="name one of --table 1 to 7, --figure 2 or 4, and --evidence"
    ):
        paper.command(replace(sweep, table=None))
    with pytest.raises(ValueError, match="2 --epochs for 1 --data"):
        paper.cells_of(paper.LINES[1], replace(sweep, epochs=(1, 2)))


def test_a_cell_of_other_defaults_is_another_cell(sweep, monkeypatch):
    cell = paper.cells_of(paper.LINES[1], sweep)[0]
    kept = cell.key
    assert paper.cells_of(paper.LINES[1], replace(sweep, epochs=(3,)))[0].key != kept
    changed = recipe("best", prompt_size=112)
    monkeypatch.setattr(paper, "recipe", lambda *_: changed)
    assert cell.key != kept


def test_the_papers_published_figures_stand_beside_ours():
    row = {"data": "cifar10", "line": "adavipro", "test_top1": 60.0}
    assert "60.0 (95.4)" in paper.markdown([row], "test_top1")


def test_the_evidence_has_a_line_with_masks_shuffled(sweep, monkeypatch):
    names = ["best adavipro 30", "best adavipro 30, margin 30", "paper adavipro 30"]
    lines = [line for line in paper.EVIDENCE if line[0] in names]
    monkeypatch.setattr(paper, "EVIDENCE", [(n, {**f, "batch-size": 10}) for n, f in lines])
    rows = {
        row["line"]: row for row in paper.command(replace(sweep, table=None, evidence=True))["rows"]
    }
    assert list(rows) == [*names, *(f"{name}, masks shuffled" for name in names[:2])]
    assert [rows[n]["recipe"] for n in names] == ["best", "best", "paper"]
    monkeypatch.setattr(paper, "EVAL_BATCH", 5)
    # In their own order the masks give the prompt its own accuracy again.
    monkeypatch.setattr(paper.torch, "randperm", lambda count, **_: torch.arange(count))
    cells = {cell.line: cell for cell in paper.cells_of(paper.EVIDENCE, sweep)}
    for line in names[:2]:
        assert paper.shuffle_masks(cells[line], sweep) == rows[line]["test_top1"]
