import hashlib
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import open_clip
import pytest
import torch

from adavipro_fast import AdaViPro, open_artifact
from adavipro_fast.errors import EncoderWarning
from adavipro_fast.files.checkpoint import checkpoint_of, load_checkpoint
from adavipro_fast.method import weights
from adavipro_fast.method.clip import DEMO_MODEL, load_clip


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("ViT-B/32", "ViT-B-32"),
        ("vit-b-32", "ViT-B-32"),
        ("ViT-L-14/336", "ViT-L-14-336"),
        ("hf-hub:a/b", "hf-hub:a/b"),
        (str(DEMO_MODEL), f"local-dir:{DEMO_MODEL}"),
    ],
)
def test_names_that_people_type_are_understood(typed, name):
    assert weights.resolved_name(typed) == name


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("openai/clip-vit-base-patch32", "use --model ViT-B-32 --pretrained openai"),
        ("clip-vit-large-patch14-336", "use --model ViT-L-14-336 --pretrained openai"),
        ("ViT-B32", "open_clip has no model .*; use demo, .* ViT-B-32"),
        ("SigLIP-B-16", "ViT-B-16-SigLIP"),
        ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "or hf-hub:laion/CLIP"),
    ],
)
def test_unknown_names_are_answered_by_the_nearest(typed, message):
    with pytest.raises(ValueError, match=message):
        load_clip(typed)


def test_a_folder_of_transformers_is_recognised(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    for model in (str(tmp_path), f"local-dir:{tmp_path}"):
        with pytest.raises(ValueError, match="contains a 'siglip' model of transformers, but"):
            load_clip(model)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no open_clip_config.json"):
        load_clip(str(tmp_path))


def test_a_file_has_what_all_published_weights_of_its_name_agree_on(tmp_path):
    file = tmp_path / "weights.pt"
    file.write_bytes(b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        siglip = weights.settings_of_file("ViT-B-16-SigLIP", file)
        resnet = weights.settings_of_file("RN50", file)
    assert (siglip["mean"], siglip["resize_mode"]) == ((0.5, 0.5, 0.5), "squash")
    assert resnet["quick_gelu"]
    with pytest.warns(EncoderWarning, match="--model ViT-B-32-quickgelu for QuickGELU"):
        several = weights.settings_of_file("ViT-B-32", file)
    assert "quick_gelu" not in several
    assert several["resize_mode"] == "shortest"


def test_a_published_file_is_known_by_its_hash(tmp_path, monkeypatch):
    file = tmp_path / "ViT-B-32.pt"
    file.write_bytes(b"weights")
    own = open_clip.get_pretrained_cfg("ViT-B-32", "openai")
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setitem(own, "url", f"https://example.org/{digest}/ViT-B-32.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert weights.settings_of_file("ViT-B-32", file)["quick_gelu"]


def test_without_a_network_the_file_to_fetch_is_named_in_one_line(tmp_path):
    program = (
        "from adavipro_fast import cli; from adavipro_fast.method.clip import load_clip\n"
        "cli.run(lambda: load_clip('ViT-B-32', 'openai'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "HF_HUB_OFFLINE is set; download open_clip_model.safetensors of " in line
    assert "vit_base_patch32_clip_224.openai" in line
    assert "--pretrained FILE" in line


def test_weights_of_a_file_run_as_they_were_trained(tmp_path, monkeypatch):
    name = "ViT-S-32-alt"
    file = tmp_path / "weights.pt"
    model = open_clip.create_model(name)
    torch.save(model.state_dict(), file)
    published = {"quick_gelu": True, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    published |= {"resize_mode": "squash", "interpolation": "bilinear", "url": ""}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda _: ["one", "two"])
    monkeypatch.setattr(
        open_clip, "get_pretrained_cfg", lambda _, tag: published if tag in ("one", "two") else {}
    )
    encoder, _ = load_clip(name, str(file))
    kept = encoder.preprocess
    assert (kept.mean, kept.resize_mode, kept.interpolation) == ((0.5,) * 3, "squash", "bilinear")
    assert any("QuickGELU" in type(module).__name__ for module in encoder.visual.modules())


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("safe", [True, False])
def test_a_clip_of_transformers_computes_the_same(tmp_path, act, safe):
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    tower |= {"intermediate_size": 96, "hidden_act": act}
    config = transformers.CLIPConfig(
        vision_config=tower | {"image_size": 64, "patch_size": 16},
        text_config=tower | {"bos_token_id": 49406, "eos_token_id": 49407},
        projection_dim=32,
    )
    theirs = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    if not safe:
        (tmp_path / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    prepared = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(prepared))
    encoder, text = load_clip(str(tmp_path))
    assert encoder.preprocess.std == (0.25,) * 3
    assert (encoder.preprocess.size, encoder.preprocess.interpolation) == (64, "bilinear")
    assert encoder.logit_scale == pytest.approx(theirs.logit_scale.exp().item())
    images = torch.randn(2, 3, 64, 64)
    tokens = text.tokenizer(["a photo of a cat", "dog"])
    with torch.no_grad():
        expected = theirs(input_ids=tokens, pixel_values=images)
        torch.testing.assert_close(encoder(images), expected.image_embeds, atol=1e-5, rtol=0)
        got = text.model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(got, expected.text_embeds, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kept", [True, False, None])
def test_a_checkpoint_keeps_the_activation_that_it_was_trained_with(tmp_path, monkeypatch, kept):
    name, file = "ViT-S-32-alt", tmp_path / "weights.pt"
    torch.save(open_clip.create_model(name).state_dict(), file)
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda _: ["one"])
    published = {"quick_gelu": True}
    monkeypatch.setattr(
        open_clip, "get_pretrained_cfg", lambda _, tag: published if tag == "one" else {}
    )
    encoder, _ = load_clip(name, str(file), quick_gelu=kept)
    model = AdaViPro(encoder, torch.eye(3, encoder.projection.shape[1]))
    path = tmp_path / "checkpoint.safetensors"
    checkpoint_of(model, ("a", "b", "c")).save(path)
    if kept is None:
        assert load_checkpoint(path).encoder.quick_gelu
    if kept is False:
        # As files of older versions are, which had GELU with weights of a file.
        checkpoint = load_checkpoint(path)
        replace(checkpoint, encoder=replace(checkpoint.encoder, quick_gelu=None)).save(path)
    opened = open_artifact(path, device="cpu")
    quick = any("QuickGELU" in type(m).__name__ for m in opened.model.encoder.visual.modules())
    assert quick == (kept is not False)
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.inference_mode():
        expected = model.eval()(pixels)
    torch.testing.assert_close(opened(pixels).logits, expected.logits)


def test_a_folder_called_as_a_model_is_not_the_model(tmp_path, monkeypatch):
    (tmp_path / "ViT-B-32").mkdir()
    monkeypatch.chdir(tmp_path)
    assert weights.resolved_name("ViT-B-32") == "ViT-B-32"
