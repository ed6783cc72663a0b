import csv
import subprocess
from dataclasses import replace

import paper
import pytest
import torch

from adavipro_fast.training import assemble
from adavipro_fast.training.config import recipe
from lib import cells, process


@pytest.fixture
def config(folder, tmp_path, monkeypatch):
    """A table of three quick cells on the demo's encoder."""
    lines = [("zero_shot", {"method": "zero_shot"}), ("vp", {"method": "vp"}), ("adavipro", {})]
    monkeypatch.setitem(paper.LINES, 1, lines)
    monkeypatch.setenv("HOME", str(tmp_path))
    return paper.PaperConfig(
        table=1,
        sweep=cells.Sweep(
            model="demo",
            pretrained="",
            data=(str(folder),),
            epochs=(2,),
            batch_size=10,
            recipe="best",
            cells=tmp_path / "cells",
        ),
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

    monkeypatch.setattr(process.subprocess, "run", run)
    return started


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_and_repeats_no_finished_cell(config, monkeypatch):
    # A run that cannot be resumed was stopped after it had written its head.
    left = (
        config.sweep.cells
        / cells.cells_of(paper.LINES[1], config.sweep)[0].key
        / "head.safetensors"
    )
    left.parent.mkdir(parents=True)
    left.touch()
    first = stop_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        paper.command(config)
    assert len(first) == 3
    monkeypatch.undo()
    monkeypatch.setitem(
        paper.LINES,
        1,
        [("zero_shot", {"method": "zero_shot"}), ("vp", {"method": "vp"}), ("adavipro", {})],
    )
    # The third was killed in mid-run.
    cell = cells.cells_of(paper.LINES[1], config.sweep)[2]
    flags = dict(cell.flags)
    best = recipe("best")
    settings = replace(
        best,
        model="demo",
        data=replace(best.data, data=flags["data"], data_root=config.sweep.data_root),
        optimiser=replace(best.optimiser, epochs=2, batch_size=10),
        output=config.sweep.cells / cell.key,
        device="auto",
    )
    run = assemble.build(settings, assemble.load(settings))
    run.trainer.save()
    again = stop_at(monkeypatch, 99)
    told = paper.command(config)
    assert len(again) == 1
    assert "--resume" in again[0]
    with (config.output / "table1.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["line"] for row in rows] == ["zero_shot", "vp", "adavipro"]
    assert [int(row["trainable_params"]) for row in rows] == [0, 69_840, 202_706]
    whole = (config.output / "table1.csv").read_bytes()
    finished = stop_at(monkeypatch, 0)
    assert paper.command(config) == told
    assert not finished
    assert (config.output / "table1.csv").read_bytes() == whole


def test_a_table_or_a_figure_must_be_named(config):
    with pytest.raises(
        ValueError, match="name one of --table 1 to 7, --figure 2 or 4, and --evidence"
    ):
        paper.command(replace(config, table=None))
    with pytest.raises(ValueError, match="2 --epochs for 1 --data"):
        cells.cells_of(paper.LINES[1], replace(config.sweep, epochs=(1, 2)))


def test_a_cell_of_other_defaults_is_another_cell(config, monkeypatch):
    cell = cells.cells_of(paper.LINES[1], config.sweep)[0]
    kept = cell.key
    assert cells.cells_of(paper.LINES[1], replace(config.sweep, epochs=(3,)))[0].key != kept
    changed = recipe("best", prompt_size=112)
    monkeypatch.setattr(cells, "recipe", lambda *_: changed)
    assert cell.key != kept


def test_the_papers_published_figures_stand_beside_ours():
    row = {"data": "cifar10", "line": "adavipro", "test_top1": 60.0}
    assert "60.0 (95.4)" in paper.markdown([row], "test_top1")


@pytest.mark.slow
def test_the_evidence_has_a_line_with_masks_shuffled(config, monkeypatch):
    names = ["best adavipro 30", "best adavipro 30, margin 30", "paper adavipro 30"]
    lines = [line for line in paper.EVIDENCE if line[0] in names]
    monkeypatch.setattr(paper, "EVIDENCE", [(n, {**f, "batch-size": 10}) for n, f in lines])
    rows = {
        row["line"]: row
        for row in paper.command(replace(config, table=None, evidence=True))["rows"]
    }
    assert list(rows) == [*names, *(f"{name}, masks shuffled" for name in names[:2])]
    assert [rows[n]["recipe"] for n in names] == ["best", "best", "paper"]
    monkeypatch.setattr(cells, "EVAL_BATCH", 5)
    # In their own order the masks give the prompt its own accuracy again.
    monkeypatch.setattr(cells.torch, "randperm", lambda count, **_: torch.arange(count))
    found = {cell.line: cell for cell in cells.cells_of(paper.EVIDENCE, config.sweep)}
    for line in names[:2]:
        assert paper.shuffle_masks(found[line], config.sweep) == rows[line]["test_top1"]
