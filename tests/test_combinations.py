"""What the table of combinations says is tried."""

import json
from typing import get_args

import combinations
import pytest

from adavipro_fast.method.config import ExportPrecision, Input
from lib.machine import ROOT

RESULTS = ROOT / "bench" / "results" / "cpu-2-cores" / "combinations.json"


def test_the_table_has_every_cell_and_a_short_reason_for_each_that_is_refused():
    rows = json.loads(RESULTS.read_text())["rows"]
    cells = {(row["precision"], row["input"], row["tasks"]) for row in rows}
    assert len(cells) == len(rows) == 45
    assert {cell[0] for cell in cells} == set(get_args(ExportPrecision))
    assert {cell[1] for cell in cells} == set(get_args(Input))
    assert set(combinations.WHERE) <= rows[0].keys()
    for row in rows:
        for where in combinations.WHERE:
            assert row[where] in ("", *combinations.REASONS.values()), (row["name"], where)
    assert all(len(reason.split()) <= 10 for reason in combinations.REASONS.values())


def test_a_refusal_without_a_reason_is_a_hole():
    assert combinations.explained("f.onnx needs normalised floats; export") in set(
        combinations.REASONS.values()
    )
    assert combinations.explained("the dog ate it") == "the dog ate it"


CASES = [
    ("fp32", "uint8", "data"),
    *(
        pytest.param(precision, input, tasks, marks=pytest.mark.slow)
        for precision in get_args(ExportPrecision)
        for input in get_args(Input)
        for tasks in get_args(combinations.Tasks)
        if (precision, input, tasks) != ("fp32", "uint8", "data")
    ),
]


@pytest.mark.parametrize(("precision", "input", "tasks"), CASES)
def test_each_cell_is_as_the_table_says(precision, input, tasks):
    pytest.importorskip("openvino")
    pytest.importorskip("tensorrt_rtx")
    config = combinations.CombinationsConfig((precision,), (input,), (tasks,))
    (got,) = combinations.command(config)["rows"]
    kept = {row["name"]: row for row in json.loads(RESULTS.read_text())["rows"]}
    # TensorRT's cells depend on the GPU of the machine.
    unknown = {"tensorrt": None}
    assert got | unknown == kept[got["name"]] | unknown
