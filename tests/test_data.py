import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from adavipro_fast import cache
from adavipro_fast.data import images
from adavipro_fast.data.coop import COOP, read_split
from adavipro_fast.data.sets import DataConfig, load_dataset, load_test
from adavipro_fast.data.split import stratified
from adavipro_fast.method.preprocess import Preprocess

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


def test_a_margin_holds_the_mean_colour_around_the_shrunken_image(folder, tmp_path, demo_clip):
    own = demo_clip[0].preprocess
    mean = (0.2, 0.5, 0.8)
    inner = replace(own, size=184, mean=mean)
    config = DataConfig(str(folder), cache_dir=tmp_path)
    names, test = load_test(config, replace(own, mean=mean, margin=20))
    image, within = (
        split.batch(torch.tensor([5]), CPU)[0] for split in (test, load_test(config, inner)[1])
    )
    assert image.shape == (1, 3, 224, 224)
    assert torch.equal(image[..., 20:-20, 20:-20], within)
    image[..., 20:-20, 20:-20] = torch.tensor([51, 128, 204]).view(3, 1, 1)
    assert image.amin((0, 2, 3)).tolist() == image.amax((0, 2, 3)).tolist() == [51, 128, 204]
    assert names == load_dataset(config, own).class_names


def demo_model():
    from adavipro_fast.method.clip import DEMO_MODEL

    return DEMO_MODEL


def test_the_cache_is_used_again_and_follows_the_content(copy, tmp_path):
    kept = tmp_path / "cache"
    load(copy, kept)
    made = {p: p.stat().st_ino for p in kept.glob("*.npy")}
    moved = shutil.move(copy, tmp_path / "elsewhere")
    load(moved, kept)
    assert {p: p.stat().st_ino for p in kept.glob("*.npy")} == made
    first = sorted((tmp_path / "elsewhere/test/circle").iterdir())[0]
    Image.new("RGB", (40, 40), "red").save(first)
    dataset = load(moved, kept)
    assert len(list(kept.glob("*.npy"))) == len(made) + 1
    assert dataset.test.batch(torch.tensor([0]), CPU)[0][0, 0].min() > 200


def test_an_interrupted_cache_is_made_again(folder, tmp_path):
    load(folder, tmp_path)
    for path in tmp_path.glob("*.npy"):
        path.rename(path.with_suffix(".partial"))
        path.with_suffix(".partial").write_bytes(b"half")
    assert len(load(folder, tmp_path).train) == 30
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_two_processes_may_fill_the_cache_at_once(folder, tmp_path):
    program = (
        "import sys; from pathlib import Path\n"
        "from adavipro_fast.method.preprocess import Preprocess\n"
        "from adavipro_fast.data.sets import DataConfig, load_dataset\n"
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


@pytest.mark.parametrize("counts", [(200, 5), (300, 40, 6), (50, 2, 1), (7, 7, 7)])
def test_a_hold_out_is_a_share_of_each_class_and_leaves_it_one_image(counts):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    held, kept = stratified(labels, round(0.1 * len(labels)), 3, spare_last=True)
    assert sorted([*held.tolist(), *kept.tolist()]) == list(range(len(labels)))
    for count, out in zip(counts, labels[held].bincount(minlength=len(counts)), strict=True):
        assert abs(int(out) - 0.1 * count) <= 1
        assert int(out) < count


def test_limit_train_is_a_share_of_each_class_and_at_least_one_image():
    labels = torch.arange(3).repeat_interleave(torch.tensor([300, 40, 1]))
    chosen, _ = stratified(labels, 34, 3)
    assert labels[chosen].bincount().tolist() == [29, 4, 1]
    assert labels[stratified(labels, 3, 3)[0]].tolist() == [0, 1, 2]


def test_limit_train_takes_the_same_number_of_each_class(folder, tmp_path):
    train = load(folder, tmp_path, limit_train=7).train
    assert sorted(train.labels[train.rows].bincount().tolist()) == [2, 2, 3]
    assert len(load(folder, tmp_path, limit_train=31).train) == 30
    with pytest.raises(ValueError, match="--limit-train 2 is less than one image a class; use 3"):
        load(folder, tmp_path, limit_train=2)


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


def test_the_cache_keeps_to_its_limit_and_forgets_what_was_used_longest_ago(folder, tmp_path):
    load(folder, tmp_path)
    old = cache.files(tmp_path)
    size = sum(path.stat().st_size for path in old)
    other = Preprocess(16, (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest")
    config = DataConfig(str(folder), cache_dir=tmp_path, cache_limit_gb=size / 1e9)
    dataset = load_dataset(config, other)
    assert sum(path.stat().st_size for path in cache.files(tmp_path)) <= size
    assert not old[0].exists()
    assert len(dataset.train) == 30


def test_the_cache_is_listed_and_cleared(folder, tmp_path):
    load(folder, tmp_path)
    listed = cache.command(cache.CacheConfig(tmp_path))
    assert len(listed["files"]) == 3
    cleared = cache.command(cache.CacheConfig(tmp_path, clear=True))
    assert cleared == {
        "cache_dir": str(tmp_path),
        "files": [],
        "bytes": 0,
        "removed_bytes": listed["bytes"],
    }


def test_a_full_disk_is_told_before_images_are_decoded(folder, tmp_path):
    program = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from adavipro_fast.method.preprocess import Preprocess\n"
        "from adavipro_fast.data.sets import DataConfig, load_dataset\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "preprocess = Preprocess(32, (0.5,) * 3, (0.5,) * 3, 'bicubic', 'shortest')\n"
        "try:\n"
        "    load_dataset(DataConfig(sys.argv[1], cache_dir=Path(sys.argv[2])), preprocess)\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    arguments = [sys.executable, "-c", program, str(folder), str(tmp_path)]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
    assert "cannot keep decoded images in" in done.stdout
    assert not list(tmp_path.glob("*.np*")) + list(tmp_path.glob("*.partial"))


def test_an_image_of_absurd_size_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in chunks
        )
    )
    with pytest.raises(ValueError, match="cannot read image bomb.png"):
        images.decode_image(path.read_bytes(), "bomb.png", PREPROCESS)


def encoded(image, kind="PNG", **options):
    stored = io.BytesIO()
    image.save(stored, kind, **options)
    return stored.getvalue()


def test_an_image_that_resizing_would_blow_up_is_refused_by_its_header():
    strip = encoded(Image.new("L", (60_000, 1)))
    assert len(strip) < 400
    with pytest.raises(ValueError, match="60000x1 would be resized to 1920000x32; up to"):
        images.decode_image(strip, "strip.png", PREPROCESS)
    with pytest.raises(ValueError, match="60000x1 would be resized to 32x0"):
        images.decode_image(strip, "strip.png", replace(PREPROCESS, resize_mode="longest"))
    square = replace(PREPROCESS, resize_mode="squash")
    image = images.decode_image(strip, "strip.png", square)
    assert square.pixels()(image).shape == (3, 32, 32)


def test_pixels_of_16_bits_are_scaled_not_cut():
    ramp = np.linspace(0, 255, 64 * 64).reshape(64, 64)
    expected = ramp.round().astype(np.uint8)
    wide = (ramp * 257).round().astype(np.uint16)
    header = b"P5 64 64 65535\n"
    for content in (
        encoded(Image.fromarray(wide)),
        encoded(Image.fromarray(wide), "TIFF"),
        header + wide.astype(">u2").tobytes(),
    ):
        pixels = np.asarray(images.decode_image(content, "wide", PREPROCESS)).astype(int)
        assert pixels.shape == (64, 64, 3)
        assert abs(pixels - expected[..., None]).max() <= 1


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_32_bits_have_no_known_range_and_are_refused(kind):
    content = encoded(Image.fromarray(np.full((8, 8), 3, kind)), "TIFF")
    with pytest.raises(ValueError, match="cannot read image deep.tif: its pixels have 32 bits"):
        images.decode_image(content, "deep.tif", PREPROCESS)


def test_grey_pixels_of_other_ranges_are_refused():
    ramp = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    white_is_zero = encoded(Image.fromarray(ramp), "TIFF", tiffinfo={262: 0})
    with pytest.raises(ValueError, match="are not 0 to 65535, black to white"):
        images.decode_image(white_is_zero, "x.tif", PREPROCESS)


def test_16_bit_pixels_go_to_the_nearest_of_255_steps():
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    got = np.asarray(images.to_rgb(Image.fromarray(every)))[..., 0]
    assert np.array_equal(got, (every.astype(int) + 128) // 257)


def test_images_are_rgb_before_they_are_resized(folder, recwarn):
    photo = Image.open(next((folder / "test" / "circle").glob("*.png"))).convert("RGB")
    transparent = photo.convert("RGBA")
    transparent.putalpha(128)
    palette = photo.quantize(64)
    palette.info["transparency"] = bytes(range(64))
    for image in (photo.convert("1"), photo.convert("L"), photo.quantize(16), transparent, palette):
        content = encoded(image)
        got = PREPROCESS.pixels()(images.decode_image(content, "x.png", PREPROCESS))
        # README's own example: convert, then resize.
        plain = Image.open(io.BytesIO(content)).convert("RGB")
        expected = np.asarray(plain.resize((32, 32), Image.Resampling.BICUBIC))
        assert np.array_equal(got, expected.transpose(2, 0, 1)), image.mode
    assert not [w for w in recwarn if "Palette" in str(w.message)][1:]


def test_a_link_at_a_partial_file_s_place_is_not_followed(folder, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    kept = tmp_path / "cache"
    load(folder, kept)
    for path in kept.glob("*.npy"):
        path.unlink()
        path.with_suffix(".partial").symlink_to(victim)
    load(folder, kept)
    assert victim.read_bytes() == b"precious"
    assert not list(kept.glob("*.partial"))


def test_a_class_name_that_is_no_text_is_refused(copy, tmp_path):
    for split in ("train", "val", "test"):
        (copy / split / "cross").rename(copy / split / os.fsdecode(b"\xff\xfe"))
    with pytest.raises(ValueError, match="is not UTF-8; rename it"):
        load(copy, tmp_path)


def test_links_in_a_data_folder_are_read_and_never_written(copy, tmp_path):
    outside = tmp_path / "outside.jpg"
    first = sorted((copy / "train" / "cross").iterdir())[0]
    first.rename(outside)
    before = outside.read_bytes()
    first.symlink_to(outside)
    assert len(load(copy, tmp_path / "cache").train) == 30
    assert outside.read_bytes() == before


COOP_COUNTS = {"train": 4, "val": 2, "test": 3}


@pytest.fixture(params=sorted(COOP))
def coop(request, tmp_path):
    """A data set in CoOp's format: its name, root, and split json."""
    layout = COOP[request.param]
    folder = tmp_path / layout.folder
    classes = ["AnnualCrop", "sea_lion"] if request.param == "eurosat" else ["b_b", "a a"]
    splits = {}
    for split, count in COOP_COUNTS.items():
        splits[split] = []
        for number in range(count):
            name = f"{classes[number % 2]}/{split}{number}.jpg"
            path = folder / layout.images / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (10 * number, 0, 0)).save(path)
            splits[split].append([name, number % 2, classes[number % 2]])
    (folder / layout.split).write_text(json.dumps(splits))
    return request.param, tmp_path, folder / layout.split


def test_coops_format_is_read_with_its_counts_names_and_order(coop, tmp_path):
    name, root, _ = coop
    dataset = load(name, tmp_path / "cache", data_root=root)
    expected = ("Annual Crop Land", "sea_lion") if name == "eurosat" else ("b_b", "a a")
    assert dataset.class_names == expected
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [4, 2, 3]
    assert dataset.test.labels.tolist() == [0, 1, 0]
    reds = dataset.test.batch(torch.arange(3), CPU)[0][:, 0, 16, 16].tolist()
    assert reds == pytest.approx([0, 10, 20], abs=3)


def test_a_missing_part_of_a_coop_data_set_is_named_with_its_origin(coop, tmp_path):
    name, root, split = coop
    image = next((split.parent / COOP[name].images).rglob("test0.jpg"))
    image.unlink()
    for path in (image, split):
        path.unlink(missing_ok=True)
        with pytest.raises(FileNotFoundError, match="is missing; expected") as told:
            load(name, tmp_path / "cache", data_root=root)
        assert str(path) in str(told.value)
        assert COOP[name].origin in str(told.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["../../etc/passwd", 0, "a"], "leads out of the folder"),
        (["/etc/passwd", 0, "a"], "leads out of the folder"),
        (["a.jpg", "0", "a"], r"is not \[path, label, class name\]"),
        (["a.jpg", 0], "not a split"),
    ],
)
def test_a_split_that_is_not_of_coops_form_is_refused(tmp_path, entry, message):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({name: [entry] for name in ("train", "val", "test")}))
    with pytest.raises(ValueError, match=message):
        read_split(path)


def test_digits_come_with_scikit_learn_and_never_change(cache, encoder):
    preprocess = encoder.preprocess
    first, second = (
        load_dataset(DataConfig("digits", cache_dir=cache), preprocess, seed=seed)
        for seed in (0, 1)
    )
    assert (len(first.train), len(first.val), len(first.test)) == (600, 400, 797)
    assert first.class_names[3] == "three"
    assert first.sha256 == second.sha256
    assert torch.equal(first.train.labels, second.train.labels)
    assert first.train.labels.bincount().tolist() == [60] * 10
    images, _ = first.test.batch(torch.arange(4), torch.device("cpu"))
    assert torch.equal(images[:, 0], images[:, 1])
    assert (images.amax() - images.amin()).item() > 200
