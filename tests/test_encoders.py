"""Families of encoders: a prompt trains, is exported and computes the same behind each of them."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from encoders import NAMES, stepped, tried

from adavipro_fast import open_artifact
from adavipro_fast.artifact.answers import answers
from adavipro_fast.export import onnx_export, relabel
from adavipro_fast.export.onnx_export import OnnxConfig
from adavipro_fast.export.relabel import RelabelConfig
from adavipro_fast.files.checkpoint import checkpoint_of
from adavipro_fast.method.calibration import Calibration
from adavipro_fast.method.clip import load_clip
from adavipro_fast.training.calibrate import calibrate
from lib.families import ENCODERS

SIGLIP = next(encoder for encoder in ENCODERS if encoder.family == "SigLIP")
FORMS = ("own_fp32", "own_fp16", "pixel_fp32")


@pytest.mark.parametrize(
    "encoder",
    [pytest.param(e, marks=() if e.quick else pytest.mark.slow) for e in ENCODERS],
    ids=lambda encoder: f"{encoder.family}, {encoder.name}",
)
def test_a_prompt_trains_and_is_exported_for_a_family(encoder):
    row = tried(encoder, engines=not encoder.quick)
    refused = tuple(key.removesuffix("_refused") for key in row if key.endswith("_refused"))
    assert refused == encoder.refused, row
    folded = row["not_folded"] is None
    assert row["own_fp32_graph"] == ("folded" if folded else "pixel")
    for form in set(FORMS if folded else FORMS[:2]) - set(refused):
        assert row[f"{form}_masks"] == 1
        assert row[f"{form}_cosine"] >= 0.9999
    assert row["own_fp32_error"] <= 1e-5
    assert encoder.quick or encoder.refused or row["engine"]


def test_the_list_is_long():
    assert len({(e.family, e.name) for e in ENCODERS}) >= 25
    assert len({e.family for e in ENCODERS}) >= 10


@pytest.fixture
def siglip(tmp_path):
    """A small SigLIP with a prompt, and where it lies."""
    (tmp_path / "model").mkdir()
    model, _ = SIGLIP.written(tmp_path / "model")
    encoder, text = load_clip(model)
    return model, stepped(encoder, text)


def test_a_sigmoids_bias_is_in_the_logits_of_every_backend(siglip, tmp_path):
    name, model = siglip
    encoder = model.encoder
    assert encoder.logit_bias == -10
    assert encoder.logit_scale == pytest.approx(math.exp(math.log(1 / 0.07)), rel=1e-5)
    side = encoder.preprocess.size
    pixels = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    with torch.inference_mode():
        got = model(pixels)
    cosine = got.embedding @ model.head.rows.t()
    torch.testing.assert_close(got.logits, encoder.logit_scale * cosine - 10)
    logits = got.logits + 3 * F.one_hot(torch.tensor([0, 1, 2]), 3)
    fitted = calibrate(logits, torch.tensor([0, 1, 2]), "sigmoid")
    saved = replace(checkpoint_of(model, NAMES), calibration=fitted)
    saved.save(tmp_path / "checkpoint.safetensors")
    assert "class_bias" not in saved.tensors
    result = onnx_export.export(
        OnnxConfig(tmp_path / "checkpoint.safetensors", tmp_path / "f.onnx", model=name)
    )
    assert result["graph"] == "folded"
    exported = open_artifact(tmp_path / "f.onnx", device="cpu")
    same = open_artifact(tmp_path / "checkpoint.safetensors", device="cpu")
    for artifact in (exported, same):
        torch.testing.assert_close(artifact(pixels).logits, got.logits, rtol=0, atol=1e-3)
        (first, *_) = answers(artifact.about, got)
        alone = (got.logits[0] / fitted.temperature).sigmoid().max().item()
        assert first["classes"][0]["probability"] == pytest.approx(alone)


def test_a_sigmoids_temperature_lowers_its_own_loss():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (400,), generator=generator)
    logits = torch.randn(400, 4, generator=generator) + 2 * F.one_hot(labels, 4) - 1
    own = F.one_hot(labels, 4).float()
    fitted = calibrate(5 * logits, labels, "sigmoid")
    loss = F.binary_cross_entropy(fitted.probabilities(5 * logits), own)
    assert loss < F.binary_cross_entropy(fitted.without.probabilities(5 * logits), own)
    assert fitted.probabilities(5 * logits).sum(1).ne(1).all()


@pytest.mark.parametrize("names", [("ring", "star"), ("ring", "star", "a cat", "a dog")])
@pytest.mark.parametrize("ending", [".safetensors", ".onnx"])
def test_a_sigmoids_file_is_relabelled_with_its_bias_and_its_link(siglip, tmp_path, names, ending):
    name, model = siglip
    checkpoint = tmp_path / "checkpoint.safetensors"
    fitted = Calibration(2.0, link="sigmoid")
    replace(checkpoint_of(model, NAMES, ("{}",)), calibration=fitted).save(checkpoint)
    output = tmp_path / "new.safetensors"
    assert relabel.command(RelabelConfig(checkpoint, output, names, model=name))["verified"]
    if ending == ".onnx":
        source, output = output, output.with_suffix(ending)
        assert onnx_export.export(OnnxConfig(source, output, model=name))["verified"]
    new = open_artifact(output, device="cpu")
    assert new.about.calibration == Calibration(link="sigmoid")
    side = model.preprocess.size
    pixels = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    got = new(pixels)
    assert got.logits.shape == (3, len(names))
    rows = load_clip(name)[1].class_embeddings(names, ("{}",))
    expected = model.encoder.logit_scale * got.embedding @ rows.t() - 10
    torch.testing.assert_close(got.logits, expected, rtol=0, atol=1e-3)
