"""Image sets that are drawn here, and the bench that compares prompts with heads on far sets."""

import drawn
import heads
import numpy as np
import pytest
from PIL import Image

from adavipro_fast.data.folder import folder_sources
from lib import points


def pixels(folder):
    return {
        str(path.relative_to(folder)): np.asarray(Image.open(path))
        for path in sorted(folder.rglob("*.png"))
    }


@pytest.mark.parametrize("kind", drawn.KINDS)
def test_drawing_makes_the_same_folder_twice_and_no_image_twice(kind, tmp_path):
    classes = len(drawn.KINDS[kind][0])
    for name in ("one", "two"):
        config = drawn.DrawnConfig(kind, tmp_path / name, train=2, val=1, test=1)
        assert drawn.command(config) | {"path": ""} == {
            "path": "",
            "kind": kind,
            "train": 2 * classes,
            "val": classes,
            "test": classes,
        }
    assert set(folder_sources(tmp_path / "one").class_names) == set(drawn.KINDS[kind][0])
    one, two = pixels(tmp_path / "one"), pixels(tmp_path / "two")
    assert len(one) == 4 * classes
    assert len({image.tobytes() for image in one.values()}) == 4 * classes
    assert all(np.array_equal(one[name], two[name]) for name in one)
    with pytest.raises(ValueError, match="is there already; name a new folder"):
        drawn.command(config)


def test_every_font_draws_every_letter():
    for path in drawn.fonts():
        font = drawn.ImageFont.truetype(str(path), 60)
        assert (
            len({font.getmask(name).getbbox() and bytes(font.getmask(name)) for name in "BDE"}) == 3
        )


@pytest.fixture
def config(tmp_path):
    return heads.HeadsConfig(
        data=("demo",),
        model="demo",
        line=("adavipro", "vp"),
        epochs=1,
        limit_train=32,
        threads=1,
        json=tmp_path / "cells.json",
    )


@pytest.mark.slow
def test_a_finished_cell_is_not_run_again_and_all_start_from_one_probe(config, monkeypatch):
    rows = heads.command(config)["rows"]
    assert [row["line"] for row in rows] == ["adavipro", "vp"]
    assert len({row["probe_test"] for row in rows}) == 1
    for row in rows:
        gain = row["last_test"] - row["probe_test"]
        gained, lost = row["test_gained"], row["test_lost"]
        assert gain == pytest.approx(100 * (gained - lost) / row["images"]["test"])
        # A model that is kept has a head that was fitted again after the last epoch.
        assert row["kept_epoch"] or row["test_top1"] == row["probe_test"]
        assert row["val_top1"] >= row["probe_val"]
    monkeypatch.setattr(heads, "build", None)
    again = heads.command(config)
    assert again["rows"] == rows
    assert [row["seeds"] for row in again["over_probe"]] == [1, 1]


def test_an_unknown_line_names_those_there_are(config):
    with pytest.raises(ValueError, match="no line 'nine'; there are adavipro, vp"):
        heads.command(heads.replace(config, line=("nine",)))


def test_points_over_the_probe_are_a_mean_over_seeds_with_its_standard_error():
    row = {"data": "signs", "line": "vp", "epochs": 4, "limit_train": None}
    rows = [
        row | {"probe_test": 70.0, "test_top1": 80.0},
        row | {"probe_test": 72.0, "test_top1": 76.0},
    ]
    (found,) = points.over_probe(rows)
    assert found == row | {
        "seeds": 2,
        "probe_test": 71.0,
        "test_top1": 78.0,
        "points": 7.0,
        "standard_error": pytest.approx(3.0),
    }
