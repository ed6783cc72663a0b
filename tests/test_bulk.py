"""Many pictures: every source, every form of rows, killed at any moment."""

import csv
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from adavipro_fast import Classifier, predict
from adavipro_fast.bulk import cluster as cluster_module
from adavipro_fast.bulk import run
from adavipro_fast.files.checkpoint import checkpoint_of
from adavipro_fast.method.calibration import Calibration
from adavipro_fast.method.config import PromptConfig
from adavipro_fast.method.model import AdaViPro
from adavipro_fast.predict import PredictConfig

COLUMNS = ["id", "answer", "probability", "rejected", "error"]


@pytest.fixture(scope="module")
def checkpoint(demo_clip, tmp_path_factory):
    from dataclasses import replace

    encoder, text = demo_clip
    names = ("ring", "star", "cross")
    torch.manual_seed(1)
    model = AdaViPro(encoder, text.class_embeddings(names, ["{}"]), PromptConfig(embed_dim=4))
    fitted = Calibration(2.0, tuple(n / 100 for n in range(101)))
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.safetensors"
    replace(checkpoint_of(model, names), calibration=fitted).save(path)
    return path


@pytest.fixture
def pictures(folder, tmp_path):
    root = shutil.copytree(folder / "test", tmp_path / "pictures")
    (root / "cross" / "bad.jpg").write_bytes(b"")
    (root / "cross" / "notes.txt").write_text("x")
    (root / "cross" / ".DS_Store").write_text("x")
    return root


def classified(checkpoint, output, *sources, **options):
    return predict.command(
        PredictConfig(checkpoint, tuple(sources), output=output, device="cpu", **options)
    )


def rows_of(path):
    if path.is_dir() or path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["f.csv", "f.jsonl", "f.parquet", "rows"])
def test_a_folder_has_a_row_for_each_picture_and_a_bad_one_an_error(
    checkpoint, pictures, tmp_path, name
):
    output = tmp_path / name
    result = classified(checkpoint, output, pictures)
    assert {k: result[k] for k in ("images", "errors", "resumed", "output")} == {
        "images": 13, "errors": 1, "resumed": 0, "output": str(output),
    }  # fmt: skip
    rows = rows_of(output)
    assert list(rows[0]) == COLUMNS
    files = sorted(str(p) for p in pictures.rglob("*.*g"))
    assert [row["id"] for row in rows] == files
    good = [path for path in files if "bad" not in path]
    expected = predict.command(PredictConfig(checkpoint, tuple(map(type(output), good))))
    found = [row for row in rows if not row["error"]]
    for row, one in zip(found, expected["predictions"], strict=True):
        assert row["answer"] == one["answer"]
        probability = one["classes"][0]["probability"]
        assert float(row["probability"]) == pytest.approx(probability, abs=1e-5)
        assert row["rejected"] in (False, "False")
    (bad,) = [row for row in rows if row["error"]]
    assert bad["id"].endswith("bad.jpg")
    assert "it is empty" in bad["error"]
    assert not bad["answer"]
    again = classified(checkpoint, output, pictures)
    assert (again["images"], again["resumed"]) == (13, 13)
    assert rows_of(output) == rows
    left = {p.name for p in tmp_path.iterdir()} - {"pictures"}
    assert left == ({name} if name == "rows" else {name, f"{name}.json"})


def test_rows_end_with_a_line_for_people(checkpoint, pictures, tmp_path, monkeypatch, capsys):
    output = tmp_path / "f.csv"
    arguments = [str(checkpoint), str(pictures), "--output", str(output), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["predict", *arguments])
    for resumed in ("", ", 13 of them from before"):
        predict.main()
        out, err = capsys.readouterr()
        speed = json.loads(out.splitlines()[-1])["images_per_s"]
        shown = f"{output}: 13 images{resumed}, 1 error, {speed:.0f} images/s"
        assert err.splitlines()[-1] == shown
    # Without --output each image has its own line.
    monkeypatch.setattr(
        sys, "argv", ["predict", str(checkpoint), str(next(pictures.rglob("*.*g")))]
    )
    predict.main()
    assert capsys.readouterr().err == ""


def test_shards_and_tables_are_read(checkpoint, pictures, tmp_path):
    files = sorted(pictures.rglob("*.*g"))
    shard, table = tmp_path / "a.tar", tmp_path / "b.parquet"
    with tarfile.open(shard, "w") as tar:
        for number, path in enumerate(files):
            for suffix, content in ((path.suffix, path.read_bytes()), (".cls", b"3")):
                member = tarfile.TarInfo(f"{number:04d}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
    pyarrow.parquet.write_table(
        pyarrow.table({"label": [0] * len(files), "image": images}), table, row_group_size=5
    )
    plain = tmp_path / "c.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"jpg": [i["bytes"] for i in images]}), plain)
    classified(checkpoint, tmp_path / "all.jsonl", pictures, shard, table, plain)
    rows = rows_of(tmp_path / "all.jsonl")
    count = len(files)
    assert len(rows) == 4 * count
    for number, four in enumerate(zip(*(rows[n * count :][:count] for n in range(4)), strict=True)):
        assert len({row["answer"] for row in four}) == 1
        assert four[1]["id"] == f"{shard}/{number:04d}"
        assert four[2]["id"] == f"{table}#{number}"
    shard.write_bytes(shard.read_bytes()[:5000])
    classified(checkpoint, tmp_path / "cut.csv", shard)
    assert "cannot read shard" in rows_of(tmp_path / "cut.csv")[-1]["error"]


def test_a_list_on_stdin_is_read_and_missing_files_are_rows(
    checkpoint, pictures, tmp_path, monkeypatch
):
    path = next(pictures.rglob("*.png"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{path}\n\n{tmp_path}/none.jpg\r\n"))
    result = classified(checkpoint, tmp_path / "f.jsonl", type(path)("-"), embeddings=True)
    first, second = rows_of(tmp_path / "f.jsonl")
    assert (result["images"], result["errors"]) == (2, 1)
    assert len(first["embedding"]) == 64
    assert sum(value**2 for value in first["embedding"]) == pytest.approx(1, abs=1e-4)
    assert second["embedding"] is None
    assert "No such file" in second["error"]


def test_names_that_are_not_utf_8_are_escaped(checkpoint, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in ("\udcff.png", "猫.png", 'a,"b.png'):
        Image.new("RGB", (40, 40), "red").save(folder / "x.png")
        (folder / "x.png").rename(folder / name)
    for name in ("f.csv", "f.jsonl", "f.parquet"):
        classified(checkpoint, tmp_path / name, folder)
        found = [row["id"].rsplit("/", 1)[1] for row in rows_of(tmp_path / name)]
        assert found[:2] == ['a,"b.png', "猫.png"]
        assert len(found) == 3


def test_what_does_not_go_together_is_refused(checkpoint, pictures, tmp_path):
    output = tmp_path / "f.csv"
    with pytest.raises(ValueError, match=r"contains many images; add --output F.csv"):
        predict.command(PredictConfig(checkpoint, (pictures,), device="cpu"))
    with pytest.raises(FileNotFoundError, match="no such image, folder or shard"):
        classified(checkpoint, output, tmp_path / "none")
    output.with_name("f.csv.json").unlink()
    classified(checkpoint, output, pictures)
    with pytest.raises(
        ValueError, match=r"f.csv was written with different reject; choose another"
    ):
        classified(checkpoint, output, pictures, reject=0.1)
    with pytest.raises(
        ValueError, match=r"f.csv was written with different decode; choose another"
    ):
        classified(checkpoint, output, pictures, decode="scaled")
    output.with_name("f.csv.json").unlink()
    with pytest.raises(ValueError, match="already exists; choose another"):
        classified(checkpoint, output, pictures)


def test_sources_that_changed_meanwhile_are_noticed(checkpoint, pictures, tmp_path, monkeypatch):
    output = tmp_path / "f.csv"
    monkeypatch.setattr(run, "BATCH", 2)
    monkeypatch.setattr(run, "PART_ROWS", 4)
    real, calls = run.values_of, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(run, "values_of", interrupted)
    with pytest.raises(KeyboardInterrupt, match="run the same command again"):
        classified(checkpoint, output, pictures)
    monkeypatch.setattr(run, "values_of", real)
    first = min(pictures.rglob("*.*g"))
    moved = first.rename(tmp_path / "away")
    with pytest.raises(ValueError, match="the sources changed since the output was started"):
        classified(checkpoint, output, pictures)
    moved.rename(first)
    result = classified(checkpoint, output, pictures)
    assert (result["images"], result["resumed"]) == (13, 6)
    assert len({row["id"] for row in rows_of(output)}) == 13


def test_a_classifier_is_pickled_by_its_settings_and_takes_columns(checkpoint, pictures):
    paths = sorted(map(str, pictures.rglob("*.*g")))
    classifier = Classifier(checkpoint, device="cpu", embeddings=True)
    by_path = classifier({"path": np.array(paths), "number": np.arange(len(paths))})
    assert len(pickle.dumps(classifier)) < 1000
    again = pickle.loads(pickle.dumps(classifier))
    by_bytes = again({"image": [open(path, "rb").read() for path in paths]})  # noqa: PTH123, SIM115
    assert list(by_bytes) == ["answer", "probability", "rejected", "error", "embedding"]
    assert by_path["answer"] == by_bytes["answer"]
    assert list(by_path["number"]) == list(range(len(paths)))
    (bad,) = [n for n, error in enumerate(by_path["error"]) if error]
    assert paths[bad].endswith("bad.jpg")
    assert by_path["answer"][bad] is by_path["embedding"][bad] is None
    with pytest.raises(KeyError, match="one must be `image` .encoded bytes. or `path`"):
        classifier({"picture": []})


@pytest.mark.slow
def test_killed_at_any_moment_no_row_is_lost_or_doubled(checkpoint, tmp_path):
    folder, output = tmp_path / "many", tmp_path / "f.csv"
    folder.mkdir()
    for number in range(600):
        Image.new("RGB", (16, 16), (number % 256, 0, 0)).save(folder / f"{number:04d}.png")
    program = (
        "import sys; from adavipro_fast.bulk import run; from adavipro_fast import predict\n"
        "run.PART_ROWS = 40; predict.main()"
    )
    command = [sys.executable, "-c", program, str(checkpoint), str(folder)]
    command += ["--output", str(output), "--device", "cpu", "--threads", "1"]
    generator = random.Random(0)
    kills = 0
    while kills < 20:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            # Longer than it takes to start, shorter than all images take.
            process.wait(generator.uniform(3, 12))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        else:
            ids = [row["id"] for row in rows_of(output)]
            assert ids == sorted(map(str, folder.iterdir()))
            for path in tmp_path.glob("f.csv*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            time.sleep(0.1)
    subprocess.run(command, check=True, stdout=subprocess.PIPE)
    assert [row["id"] for row in rows_of(output)] == sorted(map(str, folder.iterdir()))


def test_ray_needs_an_output_and_its_extra(checkpoint, pictures, tmp_path, monkeypatch):
    first = next(pictures.rglob("*.*g"))
    with pytest.raises(ValueError, match="--ray needs --output"):
        predict.command(PredictConfig(checkpoint, (first,), ray="auto", device="cpu"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'adavipro_fast\[ray\]'"):
        classified(checkpoint, tmp_path / "f.csv", pictures, ray="auto")


@pytest.mark.slow
@pytest.mark.parametrize("window", [4, 1])
def test_a_cluster_gives_every_row_once_though_a_worker_and_a_machine_are_lost(
    checkpoint, tmp_path, monkeypatch, window
):
    # With 1 the lost batch is the one that all others wait for.
    monkeypatch.setattr(cluster_module, "WINDOW", window)
    monkeypatch.setattr(run, "PART_ROWS", 200)
    ray = pytest.importorskip("ray", reason="pip install 'adavipro_fast[ray]'")
    from ray.cluster_utils import Cluster

    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(3000):
        image = Image.new("RGB", (16, 16), (number % 256, 0, number // 256))
        image.save(folder / f"{number:04d}.png")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    done = {}

    def parts():
        return len(list((tmp_path / "ray.csv.parts").glob("part-*")))

    def classify():
        output = tmp_path / "ray.csv"
        done.update(classified(checkpoint, output, folder, ray=cluster.address, threads=1))

    try:
        thread = threading.Thread(target=classify)
        thread.start()
        wait_for(lambda: len(workers()) == 2 and parts() >= 1)
        os.kill(workers()[0], signal.SIGKILL)
        wait_for(lambda: parts() >= 4)
        assert thread.is_alive()
        cluster.remove_node(nodes[0], allow_graceful=False)
        thread.join(500)
        assert not thread.is_alive()
    finally:
        ray.shutdown()
        cluster.shutdown()
    plain = tmp_path / "plain.csv"
    classified(checkpoint, plain, folder, threads=1)
    assert done["images"] == 3000
    got, expected = rows_of(tmp_path / "ray.csv"), rows_of(plain)
    assert [row["id"] for row in got] == [row["id"] for row in expected]
    assert [row["answer"] for row in got] == [row["answer"] for row in expected]


def workers():
    """List Ray's processes that hold a worker of ours."""
    found = subprocess.run(
        ["pgrep", "-f", "ray::Worker"], stdout=subprocess.PIPE, text=True, check=False
    )
    return [int(line) for line in found.stdout.split()]


def wait_for(condition):
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.5)


def test_a_process_opens_a_file_once_for_all_copies_of_a_classifier(checkpoint, tmp_path):
    path = tmp_path / "f.safetensors"
    path.write_bytes(checkpoint.read_bytes())
    first = Classifier(path, device="cpu")
    copy = pickle.loads(pickle.dumps(first))
    assert copy.artifact is first.artifact
    stale = first.artifact
    os.utime(path, ns=(2, 2))
    assert first.artifact is not stale


def test_an_ending_that_is_no_format_is_refused(checkpoint, pictures, tmp_path):
    with pytest.raises(ValueError, match=r"rows.txt must end in .csv, .jsonl, .parquet, or be a f"):
        classified(checkpoint, tmp_path / "rows.txt", pictures)
    assert not (tmp_path / "rows.txt").exists()
