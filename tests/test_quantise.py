"""INT8 and FP8: what is rounded, what is left, and when there is no file."""

import shutil
from collections import Counter
from dataclasses import replace

import accuracy
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from adavipro_fast import AdaViPro, open_artifact
from adavipro_fast.artifact.torch import encoder_of
from adavipro_fast.data.sets import DataConfig
from adavipro_fast.errors import VerificationError
from adavipro_fast.export import comparison, gate, onnx_export, quantise, to_tensorrt
from adavipro_fast.export.gate import quantised_products
from adavipro_fast.export.onnx_export import OnnxConfig
from adavipro_fast.export.open_tasks import folded_task
from adavipro_fast.export.quantise import Quantiser, observed, products, runner, search
from adavipro_fast.files.checkpoint import checkpoint_of, load_checkpoint
from adavipro_fast.method.config import PromptConfig


@pytest.fixture(scope="module")
def checkpoint(demo_clip, folder, tmp_path_factory):
    """A prompt for the classes of the small folder."""
    torch.manual_seed(5)
    encoder, text = demo_clip
    names = tuple(sorted(path.name for path in (folder / "test").iterdir()))
    config = PromptConfig(embed_dim=4, generator_init="avoid-edges", edge="laplacian-magnitude")
    model = AdaViPro(encoder, text.class_embeddings(names, ["{}"]), config)
    model.prompt.initialise(torch.cat(comparison.sample_batches(encoder.preprocess)))
    path = tmp_path_factory.mktemp("quantise") / "checkpoint.safetensors"
    checkpoint_of(model, names).save(path)
    return path


@pytest.fixture(scope="module")
def exported(checkpoint):
    """An fp32 graph, and feeds for it."""
    path = checkpoint.with_name("fp32.onnx")
    onnx_export.export(OnnxConfig(checkpoint, path, input="uint8"))
    pixels = torch.cat(comparison.sample_batches(open_artifact(path).about.preprocess)).numpy()
    return path, [{"image": part} for part in np.array_split(pixels, 4)]


def embeddings(model, feeds, precision="fp32"):
    run = runner(model, precision, ["embedding"])
    return np.concatenate([run(fed)[0] for fed in feeds])


def test_smoothing_changes_nothing_before_it_is_rounded(exported):
    path, feeds = exported
    model = onnx.load(path)
    exact = embeddings(model, feeds)
    quantiser = Quantiser(model, "int8", feeds)
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    moved = [node for node in norms if "_smooth_" in node.input[1]]
    assert len(moved) >= len(norms) // 2
    np.testing.assert_allclose(embeddings(quantiser.model, feeds), exact, atol=1e-5)


@pytest.mark.parametrize(("kind", "worst"), [("int8", 0.99), ("fp8", 0.98)])
def test_every_product_with_weights_is_rounded_and_nothing_else(exported, kind, worst):
    path, feeds = exported
    model = onnx.load(path)
    exact = embeddings(model, feeds)
    quantiser = Quantiser(model, kind, feeds)
    got = quantiser.quantised(list(quantiser.products))
    assert quantised_products(got, kind) == len(quantiser.products)
    named = Counter(node.name.split("/")[0] for node in products(model))
    assert not [name for name in named if name.startswith(("decide", "head"))]
    assert len(quantiser.products) == 4 * sum(name.endswith(".qkv") for name in named)
    # Cosines of unit rows.
    cosines = (embeddings(got, feeds, kind) * exact).sum(1)
    assert worst < cosines.min() < 1 - 1e-6
    few = quantiser.quantised(list(quantiser.products)[:1])
    assert quantised_products(few, kind) == 1


def test_a_range_is_cut_off_where_the_product_suffers_least(exported):
    path, feeds = exported
    quantiser = Quantiser(onnx.load(path), "int8", feeds)
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(8, 4)).astype(np.float32)
    tailed = generator.exponential(size=(20_000, 8)).astype(np.float32)
    assert 0.3 < quantiser.cut_off(tailed.max(), tailed, weight) / tailed.max() < 0.9
    even = generator.uniform(size=(20_000, 8)).astype(np.float32)
    assert quantiser.cut_off(1.0, even, weight) == 1.0
    tails = [n.input[0] for name, n in quantiser.products.items() if ".c_proj/" in name]
    channels, _ = observed(quantiser.model, tails, (), feeds)
    cuts = [quantiser.ranges[name] / channels[name].max() for name in tails]
    assert min(cuts) < 0.95
    assert max(cuts) < 1.001


def two_products(wide):
    """image (B, 1) to embedding (B, 2): one product of even numbers, one with an outlier."""
    first = np.array([[1.0, -0.5, wide]], np.float32)
    second = np.array([[1.0, 0.2], [0.3, 1.0], [1e-3, 0.0]], np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["image", "a"], ["hidden"], name="first"),
            helper.make_node("MatMul", ["hidden", "b"], ["embedding"], name="second"),
        ],
        "two",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(first, "a"), numpy_helper.from_array(second, "b")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_the_product_that_rounding_hurts_is_left_wide():
    images = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
    quantiser = Quantiser(two_products(1000.0), "int8", [{"image": images}])
    exact = embeddings(quantiser.model, [{"image": images}])

    def loss(model):
        return 100 * float(np.abs(embeddings(model, [{"image": images}]) - exact).max())

    model, lost, wide = search(quantiser, loss, {"image": images}, most=2.0)
    assert (wide, lost <= 2.0) == (["second"], True)
    assert quantised_products(model, "int8") == 1
    none, _, wide = search(quantiser, loss, {"image": images}, most=0.0)
    assert (none, wide) == (None, ["second"])


@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_a_file_is_judged_by_the_accuracy_on_labelled_images(checkpoint, folder, tmp_path, kind):
    output = tmp_path / "f.onnx"
    config = OnnxConfig(
        checkpoint, output, precision=kind, input="uint8", images=(folder,), largest_loss=20.0
    )
    result = onnx_export.export(config)
    assert (result["measure"], result["judged_images"], result["calibration_images"]) == (
        "accuracy", 9, 30,
    )  # fmt: skip
    assert result["verified"]
    assert (result["mask_agreement"], result["wide"]) == (1, [])
    assert result["min_cosine"] > 0.97
    assert result["loss_points"] <= 20
    artifact = open_artifact(output, device="cpu")
    assert artifact.about.precision == kind
    own = open_artifact(checkpoint, device="cpu")
    pixels = torch.randint(0, 256, (3, 3, 224, 224), dtype=torch.uint8)
    assert torch.equal(artifact(pixels).mask, own(pixels).mask.int())
    weights = onnx.load(output).graph.initializer
    stored = sum(len(w.raw_data) for w in weights if w.data_type == quantise.ELEMENTS[kind][0])
    assert stored > sum(len(w.raw_data) for w in weights) / 3


@pytest.fixture(scope="module")
def two_tasks(checkpoint, folder, tmp_path_factory):
    """Another prompt for the same classes, and one for the first two, with its own folder."""
    place = tmp_path_factory.mktemp("two")
    first = load_checkpoint(checkpoint)
    names = first.class_names[:2]
    tensors = dict(first.tensors)
    tensors["class_embeddings"] = tensors["class_embeddings"][:2].flip(0)
    tensors["prompt"] = -tensors["prompt"]
    replace(first, class_names=names, tensors=tensors).save(place / "other.safetensors")
    for split in ("train", "val", "test"):
        for name in names:
            shutil.copytree(folder / split / name, place / "images" / split / name)
    return (checkpoint, place / "other.safetensors"), (folder, place / "images")


@pytest.mark.parametrize("tasks", ["baked", "open"])
def test_several_tasks_are_judged_each_on_its_own_images(two_tasks, tmp_path, tasks):
    (first, other), folders = two_tasks
    output = tmp_path / "f.onnx"
    config = OnnxConfig(
        first, output, more=(other,), task=("a", "b"), tasks=tasks, precision="int8",
        input="uint8", images=folders, largest_loss=40.0,
    )  # fmt: skip
    result = onnx_export.export(config)
    assert set(result["losses"]) == {"a", "b"}
    assert result["loss_points"] == max(result["losses"].values())
    assert (result["judged_images"], result["calibration_images"]) == (9 + 6, 30 + 20)
    assert (result["verified"], result["mask_agreement"], result["wide"]) == (True, 1, [])
    assert quantised_products(onnx.load(output), "int8") == result["products"]
    artifact = open_artifact(output, device="cpu")
    if tasks == "open":
        for name, path in (("a", first), ("b", other)):
            task = load_checkpoint(path)
            artifact.add(folded_task(name, task, task.model(encoder_of(task))))
    pixels = torch.randint(0, 256, (4, 3, 224, 224), dtype=torch.uint8)
    mixed = artifact(pixels, ["a", "b", "b", "a"])
    for name, path, rows in (("a", first, [0, 3]), ("b", other, [1, 2])):
        own = open_artifact(path, device="cpu")(pixels[rows])
        assert torch.equal(mixed.mask[rows], own.mask.int())
        cosines = torch.cosine_similarity(mixed.embedding[rows], own.embedding)
        assert 0.97 < cosines.min() < 1 - 1e-6, name


def test_the_task_that_loses_most_is_named(two_tasks, tmp_path, monkeypatch):
    (first, other), folders = two_tasks

    def lost(gate, _):
        gate.points = [0.1, 7.5]
        return 7.5

    monkeypatch.setattr("adavipro_fast.export.gate.Gate.loss", lost)
    config = OnnxConfig(
        first, tmp_path / "f.onnx", more=(other,), task=("a", "b"), precision="int8", images=folders
    )
    with pytest.raises(VerificationError, match="loses 7.5 points of accuracy in task 'b' on 6 im"):
        onnx_export.export(config)
    with pytest.raises(ValueError, match="differ from the checkpoint's of task 'a': "):
        onnx_export.export(replace(config, images=folders[::-1]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_other_images_are_judged_by_agreement(checkpoint, folder, tmp_path):
    config = OnnxConfig(
        checkpoint, tmp_path / "f.onnx", precision="int8", input="any", images=(folder / "test",)
    )
    result = onnx_export.export(replace(config, largest_loss=50.0))
    assert (result["measure"], result["judged_images"]) == ("agreement", 6)
    assert result["any_size_cosine"] > 0.9999


def test_a_loss_that_is_too_large_leaves_no_file(checkpoint, folder, tmp_path, monkeypatch):
    def lost(gate, _):
        gate.points = [3.25]
        return 3.25

    monkeypatch.setattr("adavipro_fast.export.gate.Gate.loss", lost)
    config = OnnxConfig(checkpoint, tmp_path / "f.onnx", precision="int8", images=(folder,))
    with pytest.raises(VerificationError, match=r"loses 3.2 points of accuracy on 9 images with "):
        onnx_export.export(config)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_quantised_is_refused(checkpoint, folder, tmp_path):
    config = OnnxConfig(checkpoint, tmp_path / "f.onnx", precision="int8", images=(folder,))
    for changed, reason in [
        ({"images": ()}, "needs images for its calibration; add --images"),
        (
            {"more": (checkpoint,), "task": ("a", "b"), "images": (folder,) * 3},
            "2 checkpoints, but 3 folders of --images; give one folder for all, or one for each",
        ),
        ({"largest_loss": -1.0}, "largest_loss is -1.0"),
        ({"images": (tmp_path,)}, "contains 0 images; use several hundred"),
    ]:
        with pytest.raises(ValueError, match=reason):
            onnx_export.export(replace(config, **changed))
    for split in ("train", "val", "test"):
        place = tmp_path / "other" / split / "x"
        place.mkdir(parents=True)
        for image in sorted((folder / "test").rglob("*.*"))[:3]:
            (place / image.name).write_bytes(image.read_bytes())
    with pytest.raises(ValueError, match="differ from the checkpoint's"):
        onnx_export.export(replace(config, images=(tmp_path / "other",)))
    assert not (tmp_path / "f.onnx").exists()


@pytest.mark.slow
def test_an_encoder_that_needs_a_second_file_is_refused(checkpoint, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("adavipro_fast.export.onnx_file.ONE_FILE_BYTES", 1)
    config = OnnxConfig(checkpoint, tmp_path / "f.onnx", precision="int8", images=(folder,))
    with pytest.raises(ValueError, match="too large to quantise to int8"):
        onnx_export.export(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_an_engine_keeps_what_is_quantised(checkpoint, folder, tmp_path, kind):
    pytest.importorskip("tensorrt_rtx")
    config = OnnxConfig(
        checkpoint, tmp_path / "f.onnx", precision=kind, images=(folder,), largest_loss=50.0
    )
    onnx_export.export(config)
    built = to_tensorrt.command(
        to_tensorrt.TensorRtConfig(
            tmp_path / "f.onnx", tmp_path / "f.engine", runtime="tensorrt-rtx",
            compute_capability=("8.9", "12.0"), builder_level=0,
        )
    )  # fmt: skip
    assert built["precision"] == kind


@pytest.mark.slow
def test_the_accuracy_bench_tells_figures_or_a_reason_of_every_file(checkpoint, folder, tmp_path):
    pytest.importorskip("openvino")
    chart = tmp_path / "p.svg"
    config = accuracy.AccuracyConfig(
        checkpoint, DataConfig(str(folder), cache_dir=tmp_path), seconds=0.1, plot=chart
    )
    rows = {row["name"]: row for row in accuracy.command(config)["rows"]}
    assert {name for name, row in rows.items() if "skipped" in row} >= {"tensorrt_fp16"}
    for name in ("torch_fp32", "onnx_folded_fp32_any", "openvino_folded_fp32_uint8"):
        row = rows[name]
        assert (row["turned"], row["mask_agreement"], row["n"]) == (0, 1, 12)
        assert ("images_per_s" in row) == (not name.endswith("_any"))
    rounded = rows["onnx_folded_int8_uint8"]
    assert "skipped" in rounded or len(rounded["wide"]) < rounded["products"]
    assert chart.read_text().startswith("<?xml")


def test_classes_in_another_order_are_the_same_classes(checkpoint, folder):
    names = load_checkpoint(checkpoint).class_names
    preprocess = load_checkpoint(checkpoint).preprocess
    usual = gate.quantisation_images(folder, names, preprocess)
    turned = gate.quantisation_images(folder, names[::-1], preprocess)
    assert torch.equal(usual.held_out, turned.held_out)
    assert torch.equal(turned.labels, len(names) - 1 - usual.labels)
    with pytest.raises(ValueError, match="demo is not a folder; --images needs a folder"):
        gate.quantisation_images(folder / "demo", names, preprocess)
