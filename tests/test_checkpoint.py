import json
import os
from dataclasses import replace

import onnx
import pytest
import torch
from safetensors import safe_open

from adavipro_fast import AdaViPro, PromptConfig, open_artifact
from adavipro_fast.export import onnx_export
from adavipro_fast.files.checkpoint import checkpoint_of, load_checkpoint
from adavipro_fast.files.sealed import metadata_of, save_sealed
from adavipro_fast.files.whole import read_safetensors, safetensors_bytes, write_whole
from adavipro_fast.method.encoder import FrozenEncoder


@pytest.fixture
def model(encoder):
    embeddings = torch.nn.functional.normalize(torch.randn(3, 64), dim=-1)
    return AdaViPro(encoder, embeddings, PromptConfig(embed_dim=4)).eval()


@pytest.fixture
def path(model, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    checkpoint_of(model, ("a", "b_c", "d")).save(path)
    return path


def test_saved_and_loaded_gives_the_same_logits(model, path, encoder):
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    again = load_checkpoint(path).model(encoder)
    assert torch.equal(again(pixels).logits, model(pixels).logits)


def test_the_file_holds_what_the_contract_names(path):
    with safe_open(path, "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        shapes = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
    assert shapes == {
        "prompt": (3, 224, 224),
        "convergence.weight": (4, 3, 3, 3),
        "convergence.bias": (4,),
        "policy.weight": (2, 4, 32, 32),
        "policy.bias": (2,),
        "class_embeddings": (3, 64),
        "logit_scale": (),
    }
    assert metadata["format"] == "adavipro-fast/1"
    assert metadata["class_names"] == ["a", "b_c", "d"]
    assert metadata["preprocess"]["size"] == 224
    kept = {"size", "mean", "std", "interpolation", "resize_mode", "decoding"}
    assert set(metadata["preprocess"]) == kept
    assert set(metadata["encoder"]) == {"name", "pretrained", "sha256"}
    assert metadata["config"].items() >= {"method": "adavipro", "prompt_size": 30}.items()


def test_the_same_content_gives_the_same_bytes(model):
    metadata = {name: name for name in "abcdefgh"}
    tensors = {"x": torch.arange(3.0)}
    assert len({safetensors_bytes(tensors, metadata) for _ in range(8)}) == 1


def test_another_encoder_is_refused_by_its_hash(path, encoder):
    visual = torch.nn.Linear(2, 2)
    other = FrozenEncoder(visual, encoder.preprocess, name="other", pretrained="", logit_scale=1.0)
    with pytest.raises(ValueError, match="is not the one this checkpoint was trained on, 'demo'"):
        load_checkpoint(path).model(other)


def test_an_encoder_of_another_image_size_is_refused(path, encoder):
    checkpoint = load_checkpoint(path)
    checkpoint = replace(checkpoint, preprocess=replace(checkpoint.preprocess, size=448))
    with pytest.raises(
        ValueError, match="images of side 448 do not fit the encoder 'demo', .* 224"
    ):
        checkpoint.model(encoder)


def rewrite(path, change):
    tensors, metadata = read_safetensors(path)
    change(tensors, metadata)
    path.write_bytes(safetensors_bytes(tensors, metadata))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, _: t.update(prompt=t["prompt"][:2]),
            "'prompt' has shape .2, 224, 224.; expected .3, 224",
        ),
        (lambda t, _: t["policy.bias"].fill_(float("nan")), "'policy.bias' contains NaN"),
        (lambda t, _: t.pop("policy.weight"), "'policy.weight' is missing"),
        (
            lambda t, _: t.update(prompt=t["prompt"].half()),
            "'prompt' is torch.float16; expected fp32",
        ),
        (lambda _, m: m.update(format="other/2"), "has format 'other/2'"),
        (lambda _, m: m["config"].update(region_size=48), "48 does not divide image side 224"),
        (lambda _, m: m["config"].update(edge="canny"), "edge is 'canny'; use one of"),
        (lambda _, m: m["config"].update(prompt_size="30"), "prompt_size is '30'; expected int"),
        (lambda _, m: m.pop("class_names"), "class_names"),
        (lambda _, m: m["class_names"].pop(), "'class_embeddings' has shape .3, 64.; expected .2,"),
    ],
)
def test_a_wrong_checkpoint_is_refused_with_the_reason(path, change, message):
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_checkpoint_cut_short_is_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        load_checkpoint(path)


@pytest.mark.parametrize("ending", ["onnx", "engine"])
def test_an_exported_file_is_not_a_checkpoint(tmp_path, ending):
    exported = tmp_path / f"mine.{ending}"
    exported.write_bytes(b"graph")
    with pytest.raises(ValueError, match=f"mine.{ending} is an exported file; expected a check"):
        load_checkpoint(exported)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file: .*nothing"):
        load_checkpoint(tmp_path / "nothing")


def test_two_writers_of_one_file_do_not_share_their_halves(tmp_path, monkeypatch):
    path, seen, fsync = tmp_path / "file", [], os.fsync

    def meanwhile(descriptor):
        fsync(descriptor)
        if not seen:
            seen.extend(p.name for p in tmp_path.iterdir())
            write_whole(path, b"second")

    monkeypatch.setattr(os, "fsync", meanwhile)
    write_whole(path, b"first")
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert seen[0].startswith("file.")
    assert seen[0].endswith(".partial")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def disk_full(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("method", ["adavipro", "zero_shot"])
def test_a_mapped_head_of_older_versions_answers_as_it_did(encoder, tmp_path, method):
    torch.manual_seed(0)
    width = encoder.projection.shape[0]
    config = PromptConfig(embed_dim=4, head="linear", head_input="features")
    model = AdaViPro(encoder, torch.randn(3, width), config, class_bias=torch.randn(3)).eval()
    path, graph = tmp_path / "checkpoint.safetensors", tmp_path / "mapped.onnx"
    checkpoint = checkpoint_of(model, ("a", "b", "c"))
    checkpoint.save(path)
    onnx_export.export(onnx_export.OnnxConfig(path, graph, input="uint8"))
    older = {"head": "mapped", "head_input": "features", "method": method}
    tensors, metadata = read_safetensors(path)
    metadata["config"] |= older
    if method == "zero_shot":
        tensors = {k: v for k, v in tensors.items() if k.startswith(("class", "logit"))}
    path.write_bytes(safetensors_bytes(tensors, metadata))
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(pixels)
        if method == "zero_shot":
            expected = model.classify(model.prompt.normalised(pixels), torch.zeros(2, 7, 7))
    got = open_artifact(path, device="cpu")(pixels)
    assert torch.allclose(got.logits, expected.logits, atol=1e-3)
    if method == "adavipro":
        values = onnx.load(graph)
        written = metadata_of(values) | {"config": metadata["config"]}
        save_sealed(values, graph, written)
        again = open_artifact(graph, device="cpu")(pixels)
        assert torch.allclose(again.logits, expected.logits, atol=1e-3)
        assert open_artifact(graph, device="cpu").about.config.head == "linear"
