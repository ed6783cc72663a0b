import json
import sys
import time
from types import SimpleNamespace

import demo
import latency
import pytest
import report
import torch

from adavipro_fast.artifact import onnx as artifact
from adavipro_fast.method.clip import load_encoder
from lib import machine, table, timing
from lib.paper_form import in_paper_form
from lib.peers import hugging_face
from lib.rows import torch_rows
from lib.subject import Row, Subject, export, obstacle

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def subject():
    return Subject("demo", images=2, device="cpu")


def right(subject):
    """Rows that PyTorch runs, by name."""
    return {row.name: row for row in torch_rows(subject, 2, quick=True) if row.work is not None}


def test_rows_that_are_right_pass(subject):
    rows = right(subject)
    assert {"encoder_eager", "paper_form_eager", "collapsed_eager"} <= set(rows)
    for row in rows.values():
        assert subject.checked(row, 2).build_s > 0


def flipped(row):
    def work():
        outputs = row.work()
        outputs["mask"] = outputs["mask"].clone()
        outputs["mask"][0, 0, 0] = 1 - outputs["mask"][0, 0, 0]
        return outputs

    return work


def rounded(row):
    return lambda: row.work() | {"embedding": row.work()["embedding"].bfloat16().float()}


@pytest.mark.parametrize(("plant", "told"), [(flipped, "1 regions"), (rounded, "embeddings")])
def test_a_planted_wrong_result_gives_no_time_and_exit_1(monkeypatch, capsys, plant, told):
    true_rows = latency.torch_rows

    def rows(subject, count, *, quick):
        found = {row.name: row for row in true_rows(subject, count, quick=quick)}
        wrong = found["collapsed_eager"]
        planted = Row("planted", wrong.base, wrong.contract, plant(wrong))
        return [found["encoder_eager"], planted]

    monkeypatch.setattr(latency, "torch_rows", rows)
    monkeypatch.setattr(sys, "argv", ["latency", "--model", "demo", "--quick", "--device", "cpu"])
    monkeypatch.setattr(latency, "until_steady", lambda *_, **__: pytest.fail("it was timed"))
    with pytest.raises(SystemExit) as stop:
        latency.main()
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert f"planted: {told}" in printed.err
    assert printed.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_not_replaced_by_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["latency", "--model", "demo", "--device", "cuda"])
    with pytest.raises(SystemExit) as stop:
        latency.main()
    assert stop.value.code == 2
    assert "finds no CUDA device" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_onnx_runtimes_cpu_provider_is_refused_where_cuda_was_asked(subject, monkeypatch, tmp_path):
    export(subject, "baseline", tmp_path)
    monkeypatch.setattr(artifact, "torch_device", lambda _: torch.device("cuda"))
    reason = export(subject, "baseline", tmp_path)
    assert "instead of CUDA" in reason or "cannot run" in reason


def test_without_a_git_program_the_commit_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ADAVIPRO_COMMIT", "abc1234-dirty")
    about = machine.machine(CPU)
    assert (about["commit"], about["dirty"]) == ("abc1234", True)


def test_int8_files_are_left_out_on_a_gpu(subject):
    on_gpu = SimpleNamespace(precision="fp32", device=torch.device("cuda", 0))
    assert "never run on a GPU" in obstacle(on_gpu, "folded_int8", "onnxruntime")
    assert obstacle(subject, "folded_int8", "onnxruntime") is None


def test_a_sleep_of_5_percent_is_a_significant_difference():
    works = {"base": lambda: time.sleep(0.06), "planted": lambda: time.sleep(0.063)}
    works["again"] = works["base"]
    times = timing.interleaved_ms(works, CPU, rounds=31)
    low, _ = timing.ratio_interval(times["planted"], times["base"])
    assert low > 1
    assert abs(timing.paired_ratio(times["again"], times["base"]) - 1) < 0.02


FIGURES = ("p50_ms", "p90_ms", "p99_ms", "iqr_ms", "ratio", "ratio_low", "ratio_high", "build_s")
ROWS = [
    {"name": name, "batch": 1} | {figure: 1.2345 * (1 + n) for n, figure in enumerate(FIGURES)}
    for name in ("onnx_baseline", "onnx_folded")
]
SKIPPED = [{"name": f"row_{n}", "skipped": f"--quick: no row {n}"} for n in range(14)]
SKIPPED += [{"name": "engine", "skipped": "running an engine needs a CUDA device"}] * 2


@pytest.mark.parametrize("width", [5, 20, 39, 80, 200])
def test_a_table_is_never_wider_than_the_terminal(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    table.show(ROWS + SKIPPED, "cpu: it", hidden=("batch",))
    lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) <= width
    assert width < 7 or lines[1].split()[0] == "name"
    if width == 200:
        assert lines[1].split() == ["name", *FIGURES]
        assert lines[3].split()[:3] == ["onnx_baseline", "1.234", "2.469"]
    if width == 39:
        assert lines[1].split() == ["name", "p50_ms", "ratio", "ratio_low"]


def test_skipped_rows_are_one_entry_a_reason():
    names = ", ".join(f"row_{n}" for n in range(14))
    told = f"skipped: {names} (--quick); engine (running an engine needs a CUDA device)"
    assert table.skipped(SKIPPED, 1000) == [told]
    assert table.skipped([], 80) == []


def test_the_demo_ends_with_a_summary():
    row = {"name": "onnx_folded", "p50_ms": 3.17}
    row |= {"ratio": 1.03, "ratio_low": 1.01, "ratio_high": 1.06}
    result = {
        "checkpoint": "runs/demo-1/checkpoint.safetensors",
        "zero_shot_top1": 37.4,
        "seconds": 61.2,
        "onnx": {"path": "runs/demo-1/demo.onnx", "evaluate": {"top1": 56.04}},
        "engine": {"skipped": "tensorrt_rtx is not installed"},
        "latency": {"rows": [row]},
    }
    told = demo.summary(result)
    assert "top-1 56.0 % by the ONNX file, zero-shot 37.4 %; trained in 61 s" in told
    assert "3.2 ms with the prompt, 1.03 (1.01 to 1.06) times the encoder alone" in told
    assert "demo.engine" not in told
    result["engine"] = {"path": "runs/demo-1/demo.engine"}
    assert "runs/demo-1/ has checkpoint.safetensors, demo.onnx, demo.engine" in demo.summary(result)


def test_every_row_has_figures_or_a_reason(monkeypatch, capsys, tmp_path):
    path, chart = tmp_path / "rows.json", tmp_path / "p.svg"
    arguments = ["--model", "demo", "--quick", "--json", str(path), "--plot", str(chart)]
    monkeypatch.setattr(sys, "argv", ["latency", *arguments])
    monkeypatch.setattr(latency, "QUICK_S", 0.5)
    latency.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(path.read_text())
    names = {row["name"] for row in result["rows"]}
    assert {"onnx_baseline", "onnx_folded", "openvino_folded", "tensorrt_rtx_folded"} <= names
    for row in result["rows"]:
        if "skipped" in row:
            assert len(row["skipped"]) > 10
        else:
            assert row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
            assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    # What others run is compared with the fastest of ours.
    compared = {row["name"]: row["other"] for row in result["rows"] if "to_other" in row}
    assert "open_clip_eager" in compared
    ours = {"onnx_folded", "collapsed_eager", "paper_form_eager", "deployed_folded"}
    assert set(compared.values()) <= ours | {"deployed_pixel"}
    assert result["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert chart.read_text().startswith("<?xml")


def test_the_paper_form_shares_weights_and_answers_alike(subject):
    images = subject.sample[:2]
    own, paper = subject.model(images), in_paper_form(subject.model)(images)
    assert torch.equal(own.mask, paper.mask)
    assert torch.allclose(own.embedding, paper.embedding, atol=1e-5)


def test_hugging_faces_clip_takes_open_clips_weights():
    pytest.importorskip("transformers", reason="transformers is not installed: the peers extra")
    encoder = load_encoder("ViT-S-32-alt")
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        own = encoder(images)
        twin = hugging_face(encoder)(pixel_values=images).image_embeds
    assert torch.allclose(torch.nn.functional.normalize(twin, dim=-1), own, atol=1e-5)


def test_readmes_figures_are_those_of_the_results():
    texts = [page.read_text() for page in report.PAGES]
    assert [report.rendered(text) for text in texts] == texts
    found = [name for text in texts for _, name, _ in report.SECTION.findall(text)]
    assert sorted(found) == sorted(report.SECTIONS)
    readme = texts[0]
    assert len(readme.split()) <= 900
    assert len(readme.splitlines()) <= 120
    for picture in report.PICTURES:
        assert (report.DOCS / picture.name).read_bytes() == picture.read_bytes()
