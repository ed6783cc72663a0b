import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adavipro_fast import evaluate
from adavipro_fast.artifact.open import open_artifact
from adavipro_fast.data.sets import DataConfig
from adavipro_fast.errors import VerificationError
from adavipro_fast.export import comparison, relabel
from adavipro_fast.export.relabel import RelabelConfig
from adavipro_fast.files.checkpoint import Checkpoint, checkpoint_of, load_checkpoint
from adavipro_fast.method.calibration import UNCALIBRATED, Calibration
from adavipro_fast.method.clip import DEFAULT_TEMPLATE, NoText
from adavipro_fast.method.config import PromptConfig
from adavipro_fast.method.model import AdaViPro
from adavipro_fast.training.run import start_run

OLD = ("circle", "cross", "heart")
FEWER, MORE = ("Night_sky", "ring"), ("ring", "star", "circle", "a dark square", "triangle")
TEMPLATES = ("a photo of a {}", "a drawing of a {}")


def store(demo_clip, path, *, templates=TEMPLATES, stored=TEMPLATES, **config):
    """A checkpoint whose masks are neither open nor closed."""
    torch.manual_seed(5)
    encoder, text = demo_clip
    settings = {"embed_dim": 4, "generator_init": "avoid-edges", "prompt_size": 40} | config
    bias = torch.zeros(len(OLD)) if config.get("head") == "linear" else None
    rows = text.class_embeddings(OLD, templates)
    model = AdaViPro(encoder, rows, PromptConfig(**settings), class_bias=bias)
    model.prompt.initialise(torch.cat(comparison.sample_batches(encoder.preprocess)))
    kept = replace(checkpoint_of(model, OLD, stored), calibration=Calibration(2.0))
    kept.save(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(demo_clip, tmp_path_factory):
    return store(demo_clip, tmp_path_factory.mktemp("checkpoint") / "checkpoint.safetensors")


@pytest.fixture
def pixels(encoder):
    return comparison.sample_batches(encoder.preprocess)[-1]


def expected(demo_clip, path, names, templates=TEMPLATES):
    """Build the model that has the new names' embeddings in the place of the old ones."""
    encoder, text = demo_clip
    rows = text.class_embeddings(names, templates)
    kept = load_checkpoint(path)
    tensors = kept.tensors | {"class_embeddings": rows}
    return replace(kept, tensors=tensors, class_names=names).model(encoder)


def check(demo_clip, source, written, names, pixels, tolerance=1e-4):
    artifact = open_artifact(written, device="cpu")
    assert artifact.about.class_names == names
    assert artifact.about.calibration == UNCALIBRATED
    with torch.inference_mode():
        wanted = expected(demo_clip, source, names)(pixels)
    got = artifact(pixels)
    torch.testing.assert_close(got.logits, wanted.logits, rtol=0, atol=tolerance)
    assert torch.equal(got.mask.int(), wanted.mask.int())


@pytest.mark.parametrize("names", [FEWER, MORE], ids=["fewer", "more"])
def test_a_checkpoint_classifies_as_one_that_was_made_with_the_new_names(
    names, checkpoint, demo_clip, pixels, tmp_path, capsys
):
    before, path = checkpoint.read_bytes(), tmp_path / "new.safetensors"
    result = relabel.command(RelabelConfig(checkpoint, path, names))
    check(demo_clip, checkpoint, path, names, pixels)
    kept = load_checkpoint(path)
    assert kept.templates == TEMPLATES
    for name, value in load_checkpoint(checkpoint).tensors.items():
        assert name == "class_embeddings" or torch.equal(kept.tensors[name], value)
    assert result["verified"]
    assert (result["classes_before"], result["classes"]) == (3, len(names))
    assert result["bytes"] == path.stat().st_size
    assert checkpoint.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert f"trained for other classes than these {len(names)}; measure it" in warnings[0]


def test_training_keeps_its_templates_and_zero_shot_takes_new_names_without_a_warning(
    small, tmp_path, capsys
):
    config = replace(small(tmp_path / "run", method="zero_shot"), template=("a {} on paper",))
    path = Path(start_run(config)["checkpoint"])
    assert load_checkpoint(path).templates == ("a {} on paper",)
    capsys.readouterr()
    written = tmp_path / "new.safetensors"
    # The same names: the same figures.
    names = load_checkpoint(path).class_names
    assert relabel.command(RelabelConfig(path, written, names))["templates"] == ("a {} on paper",)
    assert capsys.readouterr().err == ""
    data = DataConfig(config.data.data, cache_dir=config.data.cache_dir)
    old, new = (
        evaluate.command(evaluate.EvaluateConfig(each, data, device="cpu"))
        for each in (path, written)
    )
    assert new["per_class"] == old["per_class"]


def test_a_template_that_is_named_is_taken_and_kept(checkpoint, demo_clip, tmp_path):
    path = tmp_path / "new.safetensors"
    relabel.command(RelabelConfig(checkpoint, path, FEWER, template=("the {}",)))
    rows = demo_clip[1].class_embeddings(FEWER, ["the {}"])
    kept = load_checkpoint(path)
    torch.testing.assert_close(kept.tensors["class_embeddings"], rows)
    assert kept.templates == ("the {}",)


def test_a_file_of_before_templates_were_kept_is_probed(demo_clip, tmp_path):
    ours = store(demo_clip, tmp_path / "a.safetensors", templates=[DEFAULT_TEMPLATE], stored=())
    output = tmp_path / "new.safetensors"
    relabel.command(RelabelConfig(ours, output, FEWER))
    assert load_checkpoint(output).templates == (DEFAULT_TEMPLATE,)
    other = store(demo_clip, tmp_path / "b.safetensors", stored=())
    with pytest.raises(ValueError, match="do not match its names .*; set --template"):
        relabel.command(RelabelConfig(other, output, FEWER))
    assert relabel.command(RelabelConfig(other, output, FEWER, template=TEMPLATES))["verified"]


REFUSED = [
    ((), "no class given; use --classes"),
    (("a", ""), "class 2 of 2 has an empty name"),
    (("_", "a"), "class 1 of 2 has an empty name"),
    (("a", "b", "a"), "2 class names are all read as 'a'; make"),
    (("Red_fox", "owl", "red-fox"), "2 class names are all read as 'red fox'"),
]


@pytest.mark.parametrize(("names", "message"), REFUSED, ids=str)
def test_names_that_cannot_be_told_apart_are_refused(names, message, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=message):
        relabel.command(RelabelConfig(checkpoint, tmp_path / "new.safetensors", names))
    assert list(tmp_path.iterdir()) == []


def test_files_whose_rows_are_not_embedded_names_are_refused(checkpoint, demo_clip, tmp_path):
    def refused(file, message, output=None, **options):
        path = output or tmp_path / f"new{file.suffix}"
        with pytest.raises(ValueError, match=message):
            relabel.command(RelabelConfig(file, path, FEWER, **options))
        assert not path.exists()

    for name in ("f.engine", "f.onnx"):
        refused(tmp_path / name, f"{name} cannot be relabelled; relabel its checkpoint and exp")
    refused(checkpoint, "new.onnx must end in .safetensors", tmp_path / "new.onnx")
    refused(checkpoint, "template 'a photo' has no {}", template=("a photo",))
    linear = store(demo_clip, tmp_path / "l.safetensors", head="linear", head_input="embedding")
    refused(linear, "has a linear head, which cannot be relabelled")


def test_a_checkpoint_that_classifies_otherwise_gets_no_name(checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "new.safetensors"
    path.write_bytes(b"what lay there")
    model = Checkpoint.model

    def other(kept, encoder):
        made = model(kept, encoder)
        if kept.class_names == FEWER:
            classify = made.classify
            made.classify = lambda *given: flipped(classify(*given))
        return made

    def flipped(prediction):
        return prediction._replace(logits=prediction.logits.flip(1))

    monkeypatch.setattr(Checkpoint, "model", other)
    with pytest.raises(VerificationError, match="was not written: logits differ by"):
        relabel.command(RelabelConfig(checkpoint, path, FEWER))
    assert path.read_bytes() == b"what lay there"
    assert list(tmp_path.iterdir()) == [path]


def test_another_encoder_and_one_without_text_are_refused(
    checkpoint, demo_clip, tmp_path, monkeypatch
):
    kept, source = load_checkpoint(checkpoint), tmp_path / "other.safetensors"
    replace(kept, encoder=replace(kept.encoder, sha256="0" * 64)).save(source)
    with pytest.raises(ValueError, match="is not the one this checkpoint was trained on"):
        relabel.command(RelabelConfig(source, tmp_path / "new.safetensors", FEWER))
    none = NoText("timm:x")
    monkeypatch.setattr(
        "adavipro_fast.artifact.torch.load_clip", lambda *_, **__: (demo_clip[0], none)
    )
    with pytest.raises(ValueError, match="'timm:x' has no text encoder to embed class names"):
        relabel.command(RelabelConfig(checkpoint, tmp_path / "new.safetensors", FEWER))
    assert list(tmp_path.iterdir()) == [source]


def test_the_command_takes_names_with_spaces_and_ends_with_json(
    checkpoint, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "new.safetensors"
    flags = ["--classes", "a red ring", "star", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", ["relabel", str(checkpoint), *flags])
    relabel.main()
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert (result["path"], result["classes"], result["verified"]) == (str(path), 2, True)
    assert load_checkpoint(path).class_names == ("a red ring", "star")
    assert "2 classes in place of 3, verified; probabilities are not calibrated" in err
