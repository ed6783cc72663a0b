import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from adavipro_fast.clip import Preprocess
from adavipro_fast.data import DataConfig, load_dataset

PREPROCESS = Preprocess(32, (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest")
CPU = torch.device("cpu")


def load(data, cache, **options):
    seed = options.pop("seed", 0)
    return load_dataset(DataConfig(str(data), cache_dir=cache, **options), PREPROCESS, seed=seed)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "data")


def test_a_folder_is_read_in_the_order_of_its_names(folder, tmp_path):
    dataset = load(folder, tmp_path)
    assert dataset.class_names == ("circle", "crescent", "cross")
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [30, 9, 12]
    assert dataset.test.labels.bincount().tolist() == [4, 4, 4]


def test_cached_pixels_are_those_of_the_models_own_preprocessing(folder, tmp_path, demo_clip):
    import open_clip

    _, _, own = open_clip.create_model_and_transforms(f"local-dir:{demo_model()}")
    preprocess = demo_clip[0].preprocess
    dataset = load_dataset(DataConfig(str(folder), cache_dir=tmp_path), preprocess)
    files = sorted((folder / "test" / "circle").iterdir())
    images, _ = dataset.test.batch(torch.arange(len(files)), CPU)
    for image, file in zip(images, files, strict=True):
        expected = own(Image.open(file))
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocess.mean, preprocess.std))
        assert torch.equal(((image / 255) - mean) / std, expected)


def demo_model():
    from adavipro_fast.clip import DEMO_MODEL

    return DEMO_MODEL


def test_the_cache_is_used_again_and_follows_the_content(copy, tmp_path):
    cache = tmp_path / "cache"
    load(copy, cache)
    made = {p: p.stat().st_ino for p in cache.glob("*.npy")}
    moved = shutil.move(copy, tmp_path / "elsewhere")
    load(moved, cache)
    assert {p: p.stat().st_ino for p in cache.glob("*.npy")} == made
    first = sorted((tmp_path / "elsewhere/test/circle").iterdir())[0]
    Image.new("RGB", (40, 40), "red").save(first)
    dataset = load(moved, cache)
    assert len(list(cache.glob("*.npy"))) == len(made) + 1
    assert dataset.test.batch(torch.tensor([0]), CPU)[0][0, 0].min() > 200


def test_an_interrupted_cache_is_made_again(folder, tmp_path):
    load(folder, tmp_path)
    for path in tmp_path.glob("*.npy"):
        path.rename(path.with_suffix(".partial"))
        path.with_suffix(".partial").write_bytes(b"half")
    assert len(load(folder, tmp_path).train) == 30
    assert not list(tmp_path.glob("*.partial"))


def test_two_processes_may_fill_the_cache_at_once(folder, tmp_path):
    program = (
        "import sys; from pathlib import Path\n"
        "from adavipro_fast.clip import Preprocess\n"
        "from adavipro_fast.data import DataConfig, load_dataset\n"
        "preprocess = Preprocess(32, (0.5,) * 3, (0.5,) * 3, 'bicubic', 'shortest')\n"
        "config = DataConfig(sys.argv[1], cache_dir=Path(sys.argv[2]))\n"
        "print(int(load_dataset(config, preprocess).train.images.long().sum()))\n"
    )
    arguments = [sys.executable, "-c", program, str(folder), str(tmp_path)]
    workers = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = {worker.communicate(timeout=120)[0] for worker in workers}
    assert [worker.returncode for worker in workers] == [0, 0]
    assert len(sums) == 1
    assert len(list(tmp_path.glob("*.npy"))) == 3


def test_without_val_a_stratified_tenth_of_train_is_held_out(copy, tmp_path):
    shutil.rmtree(copy / "val")
    dataset = load(copy, tmp_path / "cache", seed=5)
    assert (len(dataset.train), len(dataset.val)) == (27, 3)
    assert dataset.val.labels[dataset.val.rows].bincount().tolist() == [1, 1, 1]
    assert not set(dataset.val.rows.tolist()) & set(dataset.train.rows.tolist())
    again, other = (load(copy, tmp_path / "cache", seed=s).val.rows for s in (5, 6))
    assert torch.equal(again, dataset.val.rows)
    assert not torch.equal(other, dataset.val.rows)


def test_limit_train_takes_the_same_number_of_each_class(folder, tmp_path):
    train = load(folder, tmp_path, limit_train=7).train
    assert sorted(train.labels[train.rows].bincount().tolist()) == [2, 2, 3]
    with pytest.raises(ValueError, match="--limit-train 31 is out of range; use 3"):
        load(folder, tmp_path, limit_train=31)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data folder .*nowhere"):
        load(tmp_path / "nowhere", tmp_path)


def test_a_missing_split_is_named(copy, tmp_path):
    shutil.rmtree(copy / "test")
    with pytest.raises(FileNotFoundError, match="has no folder test/"):
        load(copy, tmp_path)


def test_a_class_missing_in_test_is_named(copy, tmp_path):
    shutil.rmtree(copy / "test" / "cross")
    with pytest.raises(ValueError, match="class 'cross' is in only one of .*train and .*test"):
        load(copy, tmp_path)


def test_an_empty_class_is_named(copy, tmp_path):
    for path in (copy / "val" / "cross").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="val/cross holds no image"):
        load(copy, tmp_path)


@pytest.mark.parametrize("damage", ["text", "truncated", "empty"])
def test_a_broken_image_is_named(copy, tmp_path, damage):
    victim = sorted((copy / "train" / "cross").glob("*.jpg"))[0]
    content = victim.read_bytes()
    damaged = {"text": b"no image", "truncated": content[: len(content) // 2], "empty": b""}
    victim.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=f"cannot read image .*{victim.name}"):
        load(copy, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_cifar10_is_read_in_torchvisions_own_format(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    rng = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name in names:
        data = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        content = {"data": data, "labels": [i % 10 for i in range(20)]}
        (base / name).write_bytes(pickle.dumps(content))
    classes = ["airplane", "automobile", "bird", "cat", "deer", *"fghij"]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    # The checksums are of the original files.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    dataset = load("cifar10", tmp_path / "cache", data_root=tmp_path)
    assert dataset.class_names == tuple(classes)
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [90, 10, 20]
    expected = torch.from_numpy(data[3].reshape(3, 32, 32))
    assert torch.equal(dataset.test.batch(torch.tensor([3]), CPU)[0][0], expected)


def test_a_missing_cifar10_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data-root, or add --download"):
        load("cifar10", tmp_path, data_root=tmp_path)
