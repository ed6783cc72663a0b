"""Images of any size into the graph: resized as Pillow resizes them."""

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from adavipro_fast import AdaViPro, PromptConfig, open_artifact
from adavipro_fast.export import onnx_export, to_task, to_tensorrt
from adavipro_fast.export.onnx_export import OnnxConfig
from adavipro_fast.export.resize import Resize, any_size_obstacle
from adavipro_fast.export.to_tensorrt import TensorRtConfig
from adavipro_fast.files.checkpoint import checkpoint_of
from adavipro_fast.method.preprocess import Preprocess


@pytest.fixture(scope="module")
def checkpoint(demo_clip, tmp_path_factory):
    torch.manual_seed(5)
    config = PromptConfig(embed_dim=4, edge="laplacian-magnitude", margin=9)
    names = ("disc", "ring", "star")
    classes = demo_clip[1].class_embeddings(names, ["{}"])
    stored = checkpoint_of(AdaViPro(demo_clip[0], classes, config), names)
    path = tmp_path_factory.mktemp("any") / "checkpoint.safetensors"
    stored.save(path)
    return path


@pytest.fixture(scope="module")
def exported(checkpoint):
    path = checkpoint.with_name("any.onnx")
    return path, onnx_export.export(OnnxConfig(checkpoint, path, input="any"))


SIZES = (
    *((1, 1), (1, 7), (3, 2), (224, 224), (225, 224), (223, 300), (500, 375), (37, 53)),
    *((1000, 17), (17, 300), (1999, 1501)),
)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("mode", "margin"), [("shortest", 0), ("shortest", 21), ("squash", 0)])
def test_the_graphs_resize_is_pillows_within_a_grey_level(interpolation, mode, margin):
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    preprocess = Preprocess(224, mean, std, interpolation, mode, margin)
    resize, transform, differing = Resize(preprocess), preprocess.pixels(), []
    for width, height in SIZES:
        noise = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        expected = transform(Image.fromarray(noise.permute(1, 2, 0).numpy()))
        apart = np.abs(resize(noise[None])[0].numpy() - expected)
        assert apart.max() <= 1
        differing.append((apart > 0).mean())
    assert np.mean(differing) < 2e-3


def test_a_file_takes_images_of_any_size(exported, checkpoint, folder):
    path, result = exported
    assert result["verified"]
    assert result["any_size_cosine"] > 0.9999
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert session.get_inputs()[0].type == "tensor(uint8)"
    torch_artifact = open_artifact(checkpoint, device="cpu")
    for image in sorted((folder / "test").rglob("*.*"))[:3]:
        whole = np.asarray(Image.open(image).convert("RGB"))
        turned = np.ascontiguousarray(whole[:50].transpose(2, 0, 1)[None])
        transform = torch_artifact.about.preprocess.pixels()
        pixels = torch.from_numpy(transform(Image.fromarray(whole[:50])).copy())[None]
        (logits,) = session.run(["logits"], {"image": turned})
        np.testing.assert_allclose(logits, torch_artifact(pixels).logits, atol=0.05)
    # Our own runner feeds resized pixels, which a resize leaves as they are.
    np.testing.assert_allclose(
        open_artifact(path, device="cpu")(pixels).logits, torch_artifact(pixels).logits, atol=1e-3
    )


def test_tasks_as_data_take_images_of_any_size(checkpoint, folder, tmp_path):
    config = OnnxConfig(checkpoint, tmp_path / "open.onnx", tasks="open", input="any")
    assert onnx_export.export(config)["any_size_cosine"] > 0.9999
    task = tmp_path / "shapes.task"
    to_task.command(to_task.TaskConfig(checkpoint, task))
    opened = open_artifact(config.output, device="cpu")
    opened.add(task)
    reference = open_artifact(checkpoint, device="cpu")
    files = sorted((folder / "test").rglob("*.*"))[:3]
    for got, expected in zip(
        opened.classify(files, "shapes"), reference.classify(files), strict=True
    ):
        assert (got.name, got.mask) == (expected.name, expected.mask)
        assert got.probability == pytest.approx(expected.probability, abs=1e-4)


def test_what_cannot_be_resized_in_the_graph_is_refused(exported, checkpoint, tmp_path):
    assert "longest" in any_size_obstacle(
        Preprocess(224, (0.5,) * 3, (0.5,) * 3, "bicubic", "longest")
    )
    assert "random" in any_size_obstacle(
        Preprocess(224, (0.5,) * 3, (0.5,) * 3, "random", "shortest")
    )


def test_an_engine_has_a_profile_of_image_sizes(exported, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    config = TensorRtConfig(
        exported[0], tmp_path / "f.engine", compute_capability=("8.6",), builder_level=0,
        batch="1,2,4", image_size="16,200,1000",
    )  # fmt: skip
    built = to_tensorrt.command(config)
    assert (built["image_size"], built["input"]) == ([16, 200, 1000], "any")
    # As bytes and as fp32.
    assert built["largest_images_mib"] == round(4 * 3 * 1000**2 * 5 / 2**20)
    with pytest.raises(ValueError, match="image_size '0,2,1' is out of order"):
        to_tensorrt.command(replace(config, image_size="0,2,1"))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(301, 200), (90, 35), (64, 61), (59, 64)])
def test_images_are_prepared_as_open_clip_prepares_them(mode, size):
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    image = Image.fromarray(noise)
    settings = {"size": 64, "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    theirs = image_transform_v2(PreprocessCfg(**settings, resize_mode=mode), is_train=False)
    ours = Preprocess(**settings, resize_mode=mode).pixels()(image)
    np.testing.assert_array_equal(ours, ((theirs(image) + 1) * 127.5).round().to(torch.uint8))
