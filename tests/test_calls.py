"""Python calls do what the commands do."""

import pytest

from adavipro_fast import fit, open_artifact, to_onnx


def test_train_export_and_classify_from_python(folder, tmp_path):
    result = fit(
        folder, output=str(tmp_path / "run"), epochs=1, prompt_size=20, embed_dim=3, head="linear",
        cache_dir=tmp_path / "cache",
    )  # fmt: skip
    assert result["epochs"] == 1
    exported = to_onnx(result["checkpoint"], tmp_path / "f.onnx", input="uint8", images=folder)
    assert (exported["verified"], exported["mask_agreement"]) == (True, 1)
    artifact = open_artifact(tmp_path / "f.onnx", device="cpu")
    assert (artifact.about.config.head, artifact.about.config.prompt_size) == ("linear", 20)
    (answer,) = artifact.classify(next((folder / "test").rglob("*.png")))
    assert answer.name in artifact.about.class_names
    with pytest.raises(ValueError, match="already contains a run"):
        fit(folder, output=tmp_path / "run", epochs=1)


def test_a_recipe_follows_head_and_size(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("adavipro_fast.training.run.start_run", asked.append)
    fit(folder, head="linear", prompt_size=60, lr_generator=0.5)
    (config,) = asked
    assert (config.optimiser.lr_prompt, config.optimiser.lr_generator) == (4.2, 0.5)
    assert (config.prompt.head, config.data.data) == ("linear", str(folder))


def test_settings_that_do_not_exist_or_do_not_fit_are_errors(folder, tmp_path):
    with pytest.raises(TypeError, match="fit has no setting 'epoch'; did you mean epochs?"):
        fit(folder, epoch=1)
    with pytest.raises(ValueError, match="epochs is 'many'; expected int"):
        fit(folder, epochs="many")
    with pytest.raises(TypeError, match="to_onnx has no setting 'precison'; did you mean prec"):
        to_onnx("a.safetensors", tmp_path / "f.onnx", precison="int8")
    with pytest.raises(ValueError, match="precision is 'int9'; use one of fp32"):
        to_onnx("a.safetensors", tmp_path / "f.onnx", precision="int9")
