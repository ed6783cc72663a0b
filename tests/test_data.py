import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from adavipro_fast import cache
from adavipro_fast.data import images
from adavipro_fast.data.coop import COOP, read_split
from adavipro_fast.data.sets import DataConfig, few_note, load_dataset, load_test
from adavipro_fast.data.split import Split, held_out, stratified
from adavipro_fast.files.checked import read
from adavipro_fast.method.preprocess import Preprocess, completed

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
    names, test, _ = load_test(config, replace(own, mean=mean, margin=20))
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


COUNTS = [(200, 5), (300, 40, 6), (50, 2, 1), (7, 7, 7), (100, *[2] * 30), (30, *[3] * 10)]


@pytest.mark.parametrize("counts", COUNTS)
def test_a_hold_out_is_a_share_of_each_class_and_leaves_it_one_image(counts):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    held, kept = held_out(labels, 0.1, 3)
    assert sorted([*held.tolist(), *kept.tolist()]) == list(range(len(labels)))
    shares = labels[held].bincount(minlength=len(counts)).tolist()
    assert shares[0] >= 0.1 * counts[0] - 1
    assert shares[0] <= 0.2 * counts[0] + 1
    for count, out in zip(counts, shares, strict=True):
        assert out < count
        assert out <= 0.1 * count + 1 or count == counts[0]


def test_classes_of_one_image_are_not_held_out():
    held, kept = held_out(torch.arange(20), 0.1, 3)
    assert (len(held), len(kept)) == (0, 20)
    labels = torch.tensor([*range(14), 14, 14])
    held, _ = held_out(labels, 0.1, 3)
    assert labels[held].tolist() == [14]


def test_limit_train_is_a_share_of_each_class_and_at_least_one_image():
    labels = torch.arange(3).repeat_interleave(torch.tensor([300, 40, 1]))
    chosen, _ = stratified(labels, 34, 3)
    assert labels[chosen].bincount().tolist() == [29, 4, 1]
    assert labels[stratified(labels, 3, 3)[0]].tolist() == [0, 1, 2]


def test_limit_train_takes_the_same_number_of_each_class(folder, tmp_path):
    train = load(folder, tmp_path, limit_train=7).train
    assert sorted(train.labels[train.rows].bincount().tolist()) == [2, 2, 3]
    assert len(load(folder, tmp_path, limit_train=31).train) == 30
    with pytest.raises(ValueError, match="--limit-train 2 is less than one image per class; use 3"):
        load(folder, tmp_path, limit_train=2)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder: .*nowhere"):
        load(tmp_path / "nowhere", tmp_path)


def test_without_a_test_split_there_is_none_and_a_note(copy, tmp_path):
    shutil.rmtree(copy / "test")
    dataset = load(copy, tmp_path / "cache")
    assert dataset.test is None
    assert dataset.counts == {"train": 30, "val": 9, "test": 0, "left_out": 0}
    assert "there is no test split, so test results are null" in dataset.facts.notes


def test_a_class_missing_in_test_is_noted(copy, tmp_path):
    shutil.rmtree(copy / "test" / "cross")
    dataset = load(copy, tmp_path / "cache")
    assert len(dataset.test) == 8
    assert any("test has no images of 'cross'" in note for note in dataset.facts.notes)


def test_a_class_missing_in_train_is_refused_by_name(copy, tmp_path):
    shutil.rmtree(copy / "train" / "cross")
    with pytest.raises(ValueError, match="class 'cross' is in .*test? but not in .*train|val"):
        load(copy, tmp_path / "cache")
    (copy / "train" / "cross").mkdir()
    with pytest.raises(ValueError, match="train/cross contains no images"):
        load(copy, tmp_path / "cache")


@pytest.mark.parametrize("name", ["valid", "validation", "Val"])
def test_validation_folders_have_several_names(copy, tmp_path, name):
    (copy / "val").rename(copy / name)
    (copy / "notes").mkdir()
    dataset = load(copy, tmp_path / "cache")
    assert len(dataset.val) == 9
    assert any("contains notes/ beside the splits" in note for note in dataset.facts.notes)
    (copy / ("val" if name != "Val" else "valid")).mkdir()
    with pytest.raises(ValueError, match="has both"):
        load(copy, tmp_path / "cache")


def test_class_folders_alone_are_training_images(copy, tmp_path):
    dataset = load(copy / "train", tmp_path / "cache")
    assert dataset.counts == {"train": 27, "val": 3, "test": 0, "left_out": 0}
    assert len(dataset.facts.held_out) == 3


def test_a_class_may_be_called_train(copy, tmp_path):
    (copy / "train" / "cross").rename(copy / "train" / "train")
    assert load(copy / "train", tmp_path / "cache").class_names == ("circle", "crescent", "train")


LEFT_BEHIND = (
    "._0.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX/a.jpg", "@eaDir/a.jpg",
    ".ipynb_checkpoints/a.jpg", "deep/@eaDir/a.jpg", "a.jpg~", "Icon\r",
)  # fmt: skip


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_what_tools_leave_behind_is_no_data(copy, tmp_path, name):
    picture = next((copy / "train" / "cross").iterdir()).read_bytes()
    for place in ("train/cross", *([] if name.startswith("deep") else ["train"])):
        path = copy / place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
    dataset = load(copy, tmp_path / "cache")
    assert dataset.counts["train"] == 30
    assert dataset.counts["left_out"] == 0
    assert not dataset.facts.notes


def test_images_are_known_by_their_content(copy, tmp_path):
    folder = copy / "train" / "cross"
    picture = Image.new("RGB", (40, 40), "red")
    for name, kind in (
        ("a.jfif", "JPEG"), ("b.avif", "AVIF"), ("c.gif", "GIF"), ("d", "JPEG"), ("e.dat", "PNG"),
        ("f.jpg", "WEBP"),
    ):  # fmt: skip
        (folder / name).write_bytes(encoded(picture, kind))
    (folder / "labels.txt").write_text("P6 is no picture")
    (folder / "labels").write_text("{}")
    (folder / "more.TXT").write_text("x")
    os.mkfifo(folder / "pipe")
    dataset = load(copy, tmp_path / "cache")
    assert dataset.counts["train"] == 36
    assert dataset.counts["left_out"] == 4
    assert dataset.facts.left_out == {".txt": 2, "without a suffix": 2}
    assert any("2 .txt" in note for note in dataset.facts.notes)


def test_a_class_of_mostly_other_files_is_refused(copy, tmp_path):
    for number in range(12):
        (copy / "train" / "cross" / f"{number}.csv").write_text("x")
    with pytest.raises(ValueError, match="12 of 22 files of class 'cross' .*: 12 .csv"):
        load(copy, tmp_path / "cache")
    assert load(copy, tmp_path / "cache", skip_unreadable=True).counts["left_out"] == 12


def test_linked_folders_are_read_once_and_circles_end(copy, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(copy / "test" / "cross", store)
    for number in range(2):
        (copy / "train" / "cross" / f"more{number}").symlink_to(store, target_is_directory=True)
    (store / "up").symlink_to(copy / "train" / "cross", target_is_directory=True)
    assert load(copy, tmp_path / "cache").counts["train"] == 34


def test_links_that_lead_back_up_add_nothing(copy, tmp_path):
    for link, target in (("cross/up", ".."), ("self", "."), ("up", ".."), ("cross/root", "../..")):
        (copy / "train" / link).symlink_to(target, target_is_directory=True)
    (copy / "train" / "cross" / "loop").symlink_to("loop")
    (copy / "train" / "cross" / "far").symlink_to(tmp_path.parent)
    dataset = load(copy, tmp_path / "cache")
    assert dataset.class_names == ("circle", "crescent", "cross")
    assert dataset.train.labels.bincount().tolist() == [10, 10, 10]
    assert sum("is a link back to" in note for note in dataset.facts.notes) == 2


@pytest.mark.parametrize("layout", ["data/{}", "{}_set", "{}ing Images", "images/{}"])
def test_layouts_that_would_train_on_splits_as_classes_are_refused(copy, tmp_path, layout):
    root = tmp_path / "other"
    for split in ("train", "test"):
        shutil.copytree(copy / split, root / layout.format(split))
    with pytest.raises(ValueError, match="; use .*other/|looks like a split"):
        load(root, tmp_path / "cache")


def test_classes_beside_a_test_folder_are_for_training(copy, tmp_path):
    for path in (copy / "train").iterdir():
        path.rename(copy / path.name)
    shutil.rmtree(copy / "train")
    dataset = load(copy, tmp_path / "cache")
    assert dataset.class_names == ("circle", "crescent", "cross")
    assert dataset.counts == {"train": 30, "val": 9, "test": 12, "left_out": 0}


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("how", ["none", "empty", "sidecars", "broken"])
def test_a_split_without_images_counts_as_absent(copy, tmp_path, split, how):
    for path in (copy / split).rglob("*.*"):
        path.unlink()
    if how == "none":
        shutil.rmtree(copy / split)
        (copy / split).mkdir()
    content = {"sidecars": ".DS_Store", "broken": "a.jpg"}
    if how in content:
        (copy / split / "cross" / content[how]).write_bytes(b"")
    dataset = load(copy, tmp_path / "cache", skip_unreadable=how == "broken")
    assert dataset.counts["test"] == (0 if split == "test" else 12)
    assert dataset.counts["val"] == (3 if split == "val" else 9)
    assert any("is ignored" in note for note in dataset.facts.notes)


def test_nothing_that_may_be_a_class_or_an_image_is_left_out_in_silence(copy, tmp_path):
    for name in (".net", "recycler", "c~"):
        shutil.copytree(copy / "train" / "cross", copy / "train" / name)
    (copy / "train" / "gone").symlink_to(tmp_path / "nowhere")
    shutil.copy(next((copy / "train" / "cross").iterdir()), copy / "train")
    (copy / "test" / "zzz").mkdir()
    (copy / "test" / "zzz" / ".DS_Store").write_bytes(b"")
    dataset = load(copy, tmp_path / "cache")
    assert set(dataset.class_names) == {"circle", "crescent", "cross", "recycler", "c~"}
    notes = " ".join(dataset.facts.notes)
    assert "contains '.net', 'gone', which is skipped" in notes
    assert "1 images in" in notes


def test_a_class_of_other_files_alone_is_refused_with_what_they_are(copy, tmp_path):
    for path in (copy / "test" / "cross").iterdir():
        path.rename(path.with_suffix(".npy")).write_bytes(b"x" * 99)
    with pytest.raises(ValueError, match="4 of 4 files of class 'cross' .*: 4 .npy"):
        load(copy, tmp_path / "cache")


def test_camera_raw_files_are_not_decoded_as_their_previews(copy, tmp_path):
    picture = next((copy / "train" / "cross").glob("*.jpg"))
    picture.rename(picture.with_suffix(".dng"))
    with pytest.raises(ValueError, match=r"\.dng: it is a camera raw file"):
        load(copy, tmp_path / "cache")


def test_unbalanced_classes_are_told_once_they_are_five_to_one():
    def notes(*counts):
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        split = Split(np.zeros((len(labels), 3, 1, 1), np.uint8), labels, torch.arange(len(labels)))
        return [n for n in few_note(split, ("a", "b", "c")) if n.startswith("unbalanced")]

    assert notes(60, 20, 13) == []
    (told,) = notes(20, 100, 30)
    assert "'b' has 100 training images, 'a' 20; top-1 hides" in told


def test_few_images_are_judged_when_all_is_cut(copy, tmp_path):
    for number, path in enumerate(sorted((copy / "train" / "cross").iterdir())):
        if number:
            path.write_bytes(b"")
    facts = load(copy, tmp_path / "cache", skip_unreadable=True).facts
    assert any("few training images: cross (1)" in note for note in facts.notes)


def test_one_class_is_warned_of(copy, tmp_path):
    for split in ("train", "val", "test"):
        for name in ("circle", "cross"):
            shutil.rmtree(copy / split / name)
    facts = load(copy, tmp_path / "cache").facts
    assert any("'crescent' is the only class" in note for note in facts.notes)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_that_may_not_be_read_are_named(copy, tmp_path):
    inner = copy / "train" / "cross" / "more"
    inner.mkdir(mode=0)
    with pytest.raises(ValueError, match="you may not read the folder .*more"):
        load(copy, tmp_path / "cache")
    assert load(copy, tmp_path / "cache", skip_unreadable=True).counts["train"] == 30


def test_a_name_is_the_same_in_both_forms_of_unicode(copy, tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    (copy / "train" / "cross").rename(copy / "train" / composed)
    for split in ("val", "test"):
        (copy / split / "cross").rename(copy / split / decomposed)
    dataset = load(copy, tmp_path / "cache")
    assert composed in dataset.class_names
    (copy / "train" / decomposed).mkdir()
    with pytest.raises(ValueError, match="two folders named"):
        load(copy, tmp_path / "cache")


def test_labels_of_a_test_set_alone_follow_the_model(copy, tmp_path):
    names = ("cross", "circle", "crescent")
    config = DataConfig(str(copy), cache_dir=tmp_path / "cache")
    for folder in ("train", "val"):
        shutil.rmtree(copy / folder)
    for data in (copy, copy / "test"):
        _, test, _ = load_test(replace(config, data=str(data)), PREPROCESS, names)
        assert test.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    shutil.rmtree(copy / "test" / "cross")
    _, test, notes = load_test(config, PREPROCESS, names)
    assert len(test) == 8
    assert "no image of 'cross'" in notes[0]
    with pytest.raises(ValueError, match="classes that the model does not have: 'crescent'"):
        load_test(config, PREPROCESS, names[:2])
    (copy / "test").rename(copy / "train")
    with pytest.raises(FileNotFoundError, match="has no test/"):
        load_test(config, PREPROCESS, names)


def test_copies_between_splits_and_classes_are_counted_and_named(copy, tmp_path):
    cross = sorted((copy / "train" / "cross").iterdir())
    for path in cross[:4]:
        shutil.copy(path, copy / "test" / "cross" / f"copy-{path.name}")
    shutil.copy(cross[5], copy / "train" / "circle" / "same.jpg")
    shutil.copy(cross[6], copy / "train" / "cross" / "twice.jpg")
    facts = load(copy, tmp_path / "cache").facts
    assert facts.duplicates.between_splits == 4
    assert facts.duplicates.between_classes == 1
    assert any("4 images are in more than one split" in note for note in facts.notes)
    assert any("same.jpg" in note for note in facts.notes)


BAD = {
    "empty.jpg": (b"", "it is empty"),
    "page.jpg": (b"  <!DOCTYPE html><html>", "it is an HTML page"),
    "cut.png": (b"\x89PNG\r\n\x1a\n" + bytes(20), "damaged|broken|cannot"),
    "phone.heic": (b"\0\0\0\x18ftypheic" + bytes(30), "it is HEIC"),
    "raw.nef": (b"II*\0" + bytes(30), "camera raw"),
    "lfs.jpg": (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
}


def test_all_unreadable_files_are_named_at_once_or_skipped(copy, tmp_path):
    for name, (content, _) in BAD.items():
        (copy / "train" / "cross" / name).write_bytes(content)
    (copy / "train" / "circle" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(ValueError, match="cannot read 7 images: .*skip-unreadable") as stop:
        load(copy, tmp_path / "cache")
    for name, (_, reason) in BAD.items():
        assert name in str(stop.value)
        assert re.search(reason, str(stop.value))
    dataset = load(copy, tmp_path / "cache", skip_unreadable=True)
    assert dataset.counts == {"train": 30, "val": 9, "test": 12, "left_out": 7}
    assert len(dataset.facts.unreadable) == 7
    assert any("cross 6, circle 1" in note for note in dataset.facts.notes)


def test_what_was_decoded_before_a_failed_start_is_not_decoded_again(copy, tmp_path, monkeypatch):
    bad = copy / "train" / "cross" / "bad.jpg"
    bad.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot read image .*bad.jpg: it is empty"):
        load(copy, tmp_path / "cache")
    Image.new("RGB", (40, 40), "red").save(bad)
    opened, decode = [], images.decode
    monkeypatch.setattr(
        "adavipro_fast.data.source.decode",
        lambda content, name, how: opened.append(name) or decode(content, name, how),
    )
    dataset = load(copy, tmp_path / "cache")
    assert [name.rsplit("/", 1)[1] for name in opened] == ["bad.jpg"]
    fresh = load(copy, tmp_path / "other")
    assert dataset.sha256 == fresh.sha256
    assert torch.equal(dataset.train.images, fresh.train.images)


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
    with pytest.raises(FileNotFoundError, match="--data-root to its folder, or add --download"):
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
    assert list(tmp_path.iterdir()) == []


def test_clearing_the_cache_leaves_a_file_that_a_process_is_writing(folder, tmp_path):
    load(folder, tmp_path)
    busy = cache.files(tmp_path)[0]
    # A lock of another object counts as another process's.
    with FileLock(busy.with_suffix(".lock")):
        cache.command(cache.CacheConfig(tmp_path, clear=True))
        left = {path.suffix for path in tmp_path.iterdir() if path.stem == busy.stem}
        assert left == {".npy", ".rows", ".lock"}
        assert len(list(tmp_path.iterdir())) == 3


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
    assert "cannot write decoded images to" in done.stdout
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
    with pytest.raises(ValueError, match="60000x1 would be resized to 1920000x32; the limit is"):
        images.decode_image(strip, "strip.png", PREPROCESS)
    with pytest.raises(ValueError, match="60000x1 would be resized to 32x0"):
        images.decode_image(strip, "strip.png", replace(PREPROCESS, resize_mode="longest"))
    square = replace(PREPROCESS, resize_mode="squash")
    image = images.decode_image(strip, "strip.png", square)
    assert square.pixels()(image).shape == (3, 32, 32)


def photograph(width, height, kind="JPEG", **exif):
    """Encode a picture with edges of all sizes."""
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    content = io.BytesIO()
    image.save(content, kind, **exif)
    return content.getvalue()


def test_large_jpegs_are_decoded_at_a_part_of_their_size_where_it_divides():
    full, scaled = PREPROCESS, replace(PREPROCESS, decode="scaled")

    def decoded(content, how, name="x.jpg"):
        return images.decode_image(content, name, how)

    turned = Image.Exif()
    turned[0x0112] = 6
    for options in ({}, {"exif": turned}):
        content = photograph(640, 480, **options)
        # To 42 x 32: an eighth would leave 80 x 60, less than twice that.
        size = (120, 160) if options else (160, 120)
        assert decoded(content, scaled).size == size
        pair = [how.pixels()(decoded(content, how)).astype(int) for how in (full, scaled)]
        apart = np.abs(pair[0] - pair[1])
        assert apart.max() <= 12
        assert apart.mean() < 1
    for content in (photograph(642, 481), photograph(120, 90), photograph(640, 480, "PNG")):
        assert decoded(content, scaled).size == decoded(content, full).size
    assert (
        Preprocess(32, (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest").stored().get("decode") is None
    )
    assert scaled.stored()["decode"] == "scaled"


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
    with pytest.raises(ValueError, match="do not run from 0 .black. to 65535"):
        images.decode_image(white_is_zero, "x.tif", PREPROCESS)


def test_16_bit_pixels_go_to_the_nearest_of_255_steps():
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    got = np.asarray(images.to_rgb(Image.fromarray(every)))[..., 0]
    assert np.array_equal(got, (every.astype(int) + 128) // 257)


def test_images_are_rgb_before_they_are_resized(folder, recwarn):
    photo = Image.open(next((folder / "test" / "circle").glob("*.png"))).convert("RGB")
    for image in (photo.convert("1"), photo.convert("L"), photo.quantize(16)):
        content = encoded(image)
        got = PREPROCESS.pixels()(images.decode_image(content, "x.png", PREPROCESS))
        # README's own example: convert, then resize.
        plain = Image.open(io.BytesIO(content)).convert("RGB")
        expected = np.asarray(plain.resize((32, 32), Image.Resampling.BICUBIC))
        assert np.array_equal(got, expected.transpose(2, 0, 1)), image.mode


def png(depth, kind, row, key):
    """A picture of 32 x 32 pixels whose left quarter is the transparent colour, rest black."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 32, 32, depth, kind, 0, 0, 0)),
        (b"tRNS", row[:6] if kind == 2 else struct.pack(">H", key)),
        (b"IDAT", zlib.compress((b"\0" + row) * 32)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def transparent_images():
    """Pictures whose hidden pixels are red, in every mode that has transparency."""
    marked = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    marked.paste((0, 0, 0, 255), (8, 8, 24, 24))
    palette = marked.convert("RGB").quantize(4)
    palette.info["transparency"] = palette.getpixel((0, 0))
    grey = Image.new("I;16", (32, 32), 300)
    grey.paste(0, (8, 8, 24, 24))
    keyed = io.BytesIO()
    marked.convert("RGB").save(keyed, "PNG", transparency=(255, 0, 0))
    return {
        "RGBA": encoded(marked), "LA": encoded(marked.convert("LA")), "P": encoded(palette),
        "WebP": encoded(marked, "WEBP", lossless=True), "GIF": encoded(marked, "GIF"),
        "RGB": keyed.getvalue(), "I;16": encoded(grey, transparency=300),
        "4 bits": png(4, 0, bytes([0x33] * 4) + bytes(12), key=3),
        "RGB, 16 bits": png(16, 2, bytes.fromhex("123456789abc") * 8 + bytes(144), key=0x1234),
    }  # fmt: skip


@pytest.mark.parametrize("mode", transparent_images())
def test_transparent_images_are_put_on_white(mode):
    content = transparent_images()[mode]
    expected = np.full((32, 32, 3), 255, np.uint8)
    expected[8:24, 8:24] = 0
    if "bits" in mode:
        expected[:] = 0
        expected[:, :8] = 255
    got = np.asarray(images.decode_image(content, "x", PREPROCESS))
    assert np.array_equal(got, expected)
    older = replace(PREPROCESS, decoding=2)
    assert not np.array_equal(images.decode_image(content, "x", older), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photographs_are_turned_upright(orientation, kind):
    picture = Image.new("L", (40, 24))
    picture.paste(255, (0, 0, 20, 8))
    stored = picture
    if orientation != 1:
        undo = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
        stored = picture.transpose(undo.get(orientation, images.TURNS[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(stored.convert("RGB"), kind, exif=exif)
    got = np.asarray(images.decode_image(content, "x", PREPROCESS).convert("L")).astype(int)
    assert got.shape == (24, 40)
    assert abs(got - np.asarray(picture)).mean() < 12
    older = images.decode_image(content, "x", replace(PREPROCESS, decoding=2))
    # Pillow turns TIFF by itself.
    assert older.size == (got.shape[::-1] if kind == "TIFF" else stored.size)


def test_damaged_exif_does_not_hide_a_photograph():
    content = encoded(
        Image.new("RGB", (40, 24), "red"), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"
    )
    assert images.decode_image(content, "x", PREPROCESS).size == (40, 24)


def test_12_bits_in_16_are_named_and_scaled_by_an_option(tmp_path):
    rng = np.random.default_rng(0)
    for name, level in (("dark", 900), ("bright", 3000)):
        for number in range(12):
            path = tmp_path / "data" / "train" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = np.clip(rng.normal(level, 300, (48, 48)), 0, 4095).astype(np.uint16)
            Image.fromarray(grey).save(path)
    for _ in range(2):
        notes = load(tmp_path / "data", tmp_path / "cache").facts.notes
        assert any("if 4095 is white, add --white-level 4095" in note for note in notes)
    scaled = replace(PREPROCESS, white_level=4095)
    dataset = load_dataset(DataConfig(str(tmp_path / "data"), cache_dir=tmp_path), scaled)
    assert not any("white" in note for note in dataset.facts.notes)
    means = dataset.train.images.float().mean((1, 2, 3))
    assert means.max().item() == pytest.approx(3000 / 4095 * 255, abs=5)
    assert read(Preprocess, completed(scaled.stored())) == scaled


FAST = replace(PREPROCESS, decode="fast")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_fast_decoding_gives_the_same_picture_within_two_grey_levels(orientation, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for content in (photograph(203, 150, exif=exif), photograph(40, 31, "PNG"), photograph(32, 32)):
        full = PREPROCESS.pixels()(images.decode(content, "x.jpg", PREPROCESS))
        fast = FAST.pixels()(images.decode(content, "x.jpg", FAST))
        assert np.abs(full.astype(int) - fast).max() <= 2
        # Without simplejpeg Pillow decodes to the same pixels.
        with monkeypatch.context() as patch:
            patch.setattr(images, "simplejpeg", None)
            assert np.array_equal(fast, FAST.pixels()(images.decode(content, "x.jpg", FAST)))


def test_fast_decoding_takes_plain_jpegs_as_arrays():
    pytest.importorskip("simplejpeg")
    content = photograph(64, 48)
    assert isinstance(images.decode(content, "x", FAST), torch.Tensor)
    assert isinstance(images.decode(content, "x", PREPROCESS), Image.Image)
    grey = io.BytesIO()
    Image.new("L", (64, 48), 7).save(grey, "JPEG")
    assert isinstance(images.decode(grey.getvalue(), "x", FAST), Image.Image)


def test_what_the_fast_decoder_complains_of_is_left_to_pillow():
    content = photograph(64, 48)
    # Bytes before a marker: a warning of libjpeg's.
    odd = content.replace(b"\xff\xda", b"\x00\x00\xff\xda", 1)
    full = PREPROCESS.pixels()(images.decode(odd, "x", PREPROCESS))
    fast = FAST.pixels()(images.decode(odd, "x", FAST))
    assert np.abs(full.astype(int) - fast).max() <= 2
    with pytest.raises(ValueError, match="cannot read image x.jpg: .*truncated"):
        images.decode(content[: len(content) // 2], "x.jpg", FAST)


def test_files_without_a_decoding_are_decoded_as_when_they_were_made():
    stored = replace(PREPROCESS, decoding=2).stored()
    assert "decoding" not in stored
    assert read(Preprocess, completed(stored)).decoding == 2
    assert PREPROCESS.stored()["decoding"] == 3
    with pytest.raises(ValueError, match="decoding version 9 is unknown"):
        replace(PREPROCESS, decoding=9)


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
        (["../../etc/passwd", 0, "a"], "points outside the folder"),
        (["/etc/passwd", 0, "a"], "points outside the folder"),
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
