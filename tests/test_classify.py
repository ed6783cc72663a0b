"""One call for every artifact: pictures of any kind in, names out."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from adavipro_fast import open_artifact, predict
from adavipro_fast.export import onnx_export
from adavipro_fast.export.onnx_export import OnnxConfig
from adavipro_fast.files.checkpoint import checkpoint_of
from adavipro_fast.method.calibration import Calibration
from adavipro_fast.method.config import PromptConfig
from adavipro_fast.method.model import AdaViPro
from adavipro_fast.predict import PredictConfig

NAMES = {"shapes": ("ring", "star", "unknown"), "signs": ("yes", "no")}


@pytest.fixture(scope="module")
def files(demo_clip, tmp_path_factory):
    """Two checkpoints and an .onnx file of both."""
    from dataclasses import replace

    root = tmp_path_factory.mktemp("files")
    encoder, text = demo_clip
    paths = []
    for task, names in NAMES.items():
        torch.manual_seed(len(names))
        rows = text.class_embeddings(names, ["{}"])
        model = AdaViPro(encoder, rows, PromptConfig(embed_dim=4))
        fitted = Calibration(2.0, tuple(n / 100 for n in range(101)))
        path = root / task / "checkpoint.safetensors"
        replace(checkpoint_of(model, names), calibration=fitted).save(path)
        paths.append(path)
    onnx_export.export(OnnxConfig(paths[0], root / "both.onnx", (paths[1],), input="uint8"))
    onnx_export.export(OnnxConfig(paths[0], root / "one.onnx"))
    return root


@pytest.fixture
def picture(folder):
    return sorted((folder / "test").rglob("*.png"))[0]


def as_everything(path):
    image = Image.open(path)
    return [path, str(path), path.read_bytes(), image, np.asarray(image.convert("RGB"))]


@pytest.mark.parametrize("name", ["shapes/checkpoint.safetensors", "one.onnx"])
def test_a_picture_may_come_as_anything_and_is_answered_as_predict_does(files, picture, name):
    (expected,) = predict.command(PredictConfig(files / name, (picture,), device="cpu"))[
        "predictions"
    ]
    artifact = open_artifact(files / name, device="cpu")
    every = as_everything(picture)
    found = artifact.classify(every)
    assert len(found) == len(every)
    for answer in found[1:]:
        assert (answer.name, answer.mask) == (found[0].name, found[0].mask)
        # Products of a batch may differ in their last bits by the image's place.
        assert answer.probability == pytest.approx(found[0].probability, abs=1e-6)
    for one in every:
        (alone,) = artifact.classify(one)
        assert alone.name == expected["answer"]
        assert alone.mask == tuple(map(tuple, expected["mask"]))
    assert found[0].name == expected["answer"]
    assert found[0].rejected is False
    assert found[0].probability == pytest.approx(expected["classes"][0]["probability"], abs=1e-5)
    assert [n for n, _ in found[0].classes] == [c["name"] for c in expected["classes"]]
    assert len(artifact.classify(picture, top=1)[0].classes) == 1
    (rejected,) = artifact.classify(picture, reject=0.99)
    assert (rejected.name, rejected.rejected) == ("unknown", True)


def test_each_picture_may_have_its_task(files, picture):
    both = open_artifact(files / "both.onnx", device="cpu")
    many = both.classify([picture] * 4, task=["signs", "shapes"] * 2)
    for task, answer in zip(["signs", "shapes"] * 2, many, strict=True):
        (alone,) = open_artifact(files / "both.onnx", device="cpu", task=task).classify(picture)
        assert answer.name == alone.name
        assert answer.name in NAMES[task]
        assert len(answer.classes) == len(NAMES[task])
    assert both.classify(picture, task="signs")[0].name in NAMES["signs"]


def test_turned_and_transparent_pictures_are_those_of_a_file(files, tmp_path):
    image = Image.new("RGBA", (60, 40), (255, 0, 0, 0))
    image.paste((0, 0, 0, 255), (5, 5, 30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    image.save(content, "PNG", exif=exif)
    artifact = open_artifact(files / "shapes" / "checkpoint.safetensors", device="cpu")
    opened = Image.open(io.BytesIO(content.getvalue()))
    by_bytes, by_image = artifact.classify([content.getvalue(), opened])
    assert (by_bytes.name, by_bytes.mask) == (by_image.name, by_image.mask)
    assert by_bytes.probability == pytest.approx(by_image.probability, abs=1e-6)


def test_what_cannot_be_classified_is_named(files, picture, tmp_path):
    artifact = open_artifact(files / "shapes" / "checkpoint.safetensors", device="cpu")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        artifact.classify(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"cannot read image \(bytes\): it is empty"):
        artifact.classify(b"")
    with pytest.raises(
        ValueError, match=r"dtype .*float32 and shape \(4, 4, 3\); use \(H, W, 3\) uint8"
    ):
        artifact.classify(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="top is 0"):
        artifact.classify(picture, top=0)
    both = open_artifact(files / "both.onnx", device="cpu")
    with pytest.raises(ValueError, match="names no task; the file holds shapes, signs"):
        both.classify(picture)
    with pytest.raises(ValueError, match="got 1 tasks for 2 images"):
        both.classify([picture, picture], task=["signs"])
    assert artifact.classify([]) == []
