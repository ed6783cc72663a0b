from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from adavipro_fast import cli, evaluate
from adavipro_fast.artifact.open import open_artifact
from adavipro_fast.data.sets import load_test
from adavipro_fast.evaluate import EvaluateConfig
from adavipro_fast.export.onnx_export import OnnxConfig
from adavipro_fast.export.onnx_export import export as to_onnx
from adavipro_fast.method.clip import DEMO_MODEL, load_encoder
from adavipro_fast.training.run import start_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    """Run a method on the small folder once; return its configuration and result."""
    done = {}

    def once(method):
        if method not in done:
            config = small(tmp_path_factory.mktemp(method), epochs=2, precision="fp32")
            config = replace(config, prompt=replace(config.prompt, method=method))
            done[method] = config, start_run(config)
        return done[method]

    return once


def test_zero_shot_is_open_clips_own_computation(run, folder):
    _, result = run("zero_shot")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{DEMO_MODEL}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{DEMO_MODEL}")
    names = sorted(p.name for p in (folder / "test").iterdir())
    right = []
    with torch.no_grad():
        texts = tokenizer([f"This is a photo of a {name}" for name in names])
        classes = model.eval().encode_text(texts, normalize=True)
        for label, name in enumerate(names):
            for path in sorted((folder / "test" / name).iterdir()):
                image = preprocess(Image.open(path))[None]
                logits = model.encode_image(image, normalize=True) @ classes.t()
                right.append(int(logits.argmax()) == label)
    assert result["test_top1"] == result["zero_shot_top1"] == pytest.approx(100 * np.mean(right))
    assert result["trainable_params"] == 0


def test_full_finetuning_trains_every_weight_of_the_tower(run):
    config, result = run("full_finetune")
    tower = load_encoder("demo").visual
    assert result["trainable_params"] == sum(p.numel() for p in tower.parameters())
    tuned = open_artifact(result["checkpoint"], device="cpu").model.encoder.visual
    same = [torch.equal(a, b) for a, b in zip(tower.parameters(), tuned.parameters(), strict=True)]
    assert not any(same)
    assert (config.output / "metrics.jsonl").read_text().count("\n") == 2


@pytest.mark.parametrize("method", ["zero_shot", "linear_probe", "full_finetune"])
def test_evaluate_and_the_exporters_read_the_file(run, method, tmp_path):
    config, result = run(method)
    path = Path(result["checkpoint"])
    read = evaluate.command(EvaluateConfig(path, data=config.data, device="cpu"))
    assert read["top1"] == result["test_top1"]
    exported = to_onnx(OnnxConfig(path, tmp_path / "x.onnx", input="uint8"))
    assert exported["baseline"]
    assert exported["verified"]
    _, test, _ = load_test(config.data, open_artifact(tmp_path / "x.onnx").about.preprocess)
    pixels, _ = test.batch(torch.arange(len(test)), CPU)
    ours, theirs = (open_artifact(p, device="cpu")(pixels) for p in (path, tmp_path / "x.onnx"))
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)


def test_an_artefact_of_another_encoder_is_refused(run, capsys):
    _, result = run("linear_probe")
    with pytest.raises(SystemExit):
        cli.run(lambda: open_artifact(result["checkpoint"], model="ViT-S-32-alt"))
    assert "select that one with --model" in capsys.readouterr().err
