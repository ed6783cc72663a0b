from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from adavipro_fast import cli, evaluate
from adavipro_fast.artifact import open_artifact
from adavipro_fast.baselines import STRENGTHS, all_features
from adavipro_fast.clip import DEMO_MODEL, load_encoder
from adavipro_fast.data import load_dataset
from adavipro_fast.evaluate import EvaluateConfig
from adavipro_fast.export.to_onnx import OnnxConfig
from adavipro_fast.export.to_onnx import command as to_onnx
from adavipro_fast.train import start_run

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
    assert result["checkpoint"] is None


def test_the_linear_probe_is_scikit_learns_optimum_on_the_features_before_projection(run):
    config, result = run("linear_probe")
    encoder = load_encoder("demo")
    dataset = load_dataset(config.data, encoder.preprocess)
    splits = [all_features(encoder, s, CPU) for s in (dataset.train, dataset.val, dataset.test)]
    assert splits[0][0].shape[1] == encoder.visual.proj.shape[0]
    heads = [LogisticRegression(C=c, max_iter=5000).fit(*splits[0]) for c in STRENGTHS]
    best = max(heads, key=lambda head: head.score(*splits[1]))
    assert result["test_top1"] == pytest.approx(100 * best.score(*splits[2]), abs=0.1)
    assert result["trainable_params"] == 3 * (splits[0][0].shape[1] + 1)


def test_full_finetuning_trains_every_weight_of_the_tower(run):
    config, result = run("full_finetune")
    tower = load_encoder("demo").visual
    assert result["trainable_params"] == sum(p.numel() for p in tower.parameters())
    tuned = open_artifact(result["checkpoint"], device="cpu").model.encoder.visual
    same = [torch.equal(a, b) for a, b in zip(tower.parameters(), tuned.parameters(), strict=True)]
    assert not any(same)
    assert (config.output / "metrics.jsonl").read_text().count("\n") == 2


@pytest.mark.parametrize("method", ["linear_probe", "full_finetune"])
def test_evaluate_reads_the_artefact_and_the_exporters_refuse_it(run, method, tmp_path):
    config, result = run(method)
    told = evaluate.command(EvaluateConfig(result["checkpoint"], data=config.data, device="cpu"))
    assert told["top1"] == result["test_top1"]
    with pytest.raises(ValueError, match="holds no prompt; name a checkpoint"):
        to_onnx(OnnxConfig(result["checkpoint"], tmp_path / "x.onnx"))


def test_an_artefact_of_another_encoder_is_refused(run, capsys):
    _, result = run("linear_probe")
    with pytest.raises(SystemExit):
        cli.run(lambda: open_artifact(result["checkpoint"], model="ViT-S-32-alt"))
    assert "name that one with --model" in capsys.readouterr().err
