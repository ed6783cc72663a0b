"""Linear heads: where they start, that they learn with the prompt, and that every file has them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

from adavipro_fast import AdaViPro, evaluate, open_artifact
from adavipro_fast.data.metrics import Evaluation, expected_calibration_error
from adavipro_fast.data.sets import load_dataset, load_test
from adavipro_fast.evaluate import EvaluateConfig
from adavipro_fast.export import onnx_export
from adavipro_fast.export.onnx_export import OnnxConfig
from adavipro_fast.files.checkpoint import load_checkpoint
from adavipro_fast.method.calibration import Calibration
from adavipro_fast.method.clip import load_encoder
from adavipro_fast.method.config import PromptConfig
from adavipro_fast.method.head import HeadRows
from adavipro_fast.training.assemble import build, load
from adavipro_fast.training.calibrate import calibrate
from adavipro_fast.training.config import recipe
from adavipro_fast.training.judge import Judge
from adavipro_fast.training.probe import (
    STRENGTHS,
    fit_head,
    frozen_features,
    prompted_features,
    refitted_head,
    softened,
)
from adavipro_fast.training.run import resume_run, start_run
from adavipro_fast.training.state import UNTRAINED

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    """Train a method with a linear head once on the small folder."""
    done = {}

    def once(method, head_input=None):
        if (method, head_input) not in done:
            # The one rate is high enough that an epoch beats the probe by more than luck.
            config = small(tmp_path_factory.mktemp(method), epochs=2, lr_head=0.1, precision="fp32")
            head = {"head": "linear"} if method != "linear_probe" else {}
            prompt = replace(config.prompt, method=method, head_input=head_input, **head)
            config = replace(config, prompt=replace(prompt, prompt_init="zero"))
            done[method, head_input] = config, start_run(config)
        return done[method, head_input]

    return once


@pytest.mark.parametrize(("method", "count"), [("adavipro", 2), ("vp", 1), ("full_finetune", 0)])
def test_prompt_and_head_learn_together(run, method, count):
    config, result = run(method)
    before = load_file(config.output / "last.safetensors")
    rows = before["class_embeddings"]
    assert rows.shape in ((3, 160), (3, 64))
    assert before["exp_avg.class_embeddings"].any()
    assert sum(name.startswith("momentum_buffer.") for name in before) >= count
    # The head counts among what is trained.
    assert result["trainable_params"] >= rows.numel() + 3


def test_a_resumed_run_has_the_head_of_one_that_was_never_stopped(run, small, tmp_path):
    config, _ = run("vp")
    again = replace(config, output=tmp_path / "run")
    stopped = build(again, load(again))
    stopped.trainer.run(until=1)
    resume_run(tmp_path / "run")
    name = "checkpoint.safetensors"
    for file in (name, "last.safetensors"):
        ours, theirs = (load_file(folder / file) for folder in (tmp_path / "run", config.output))
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@pytest.mark.parametrize("beats", [True, False])
def test_the_head_is_fitted_again_on_prompted_images(small, tmp_path, monkeypatch, beats):
    prompt = PromptConfig(head="linear", embed_dim=4, prompt_init="zero")
    config = replace(small(tmp_path, epochs=2), prompt=prompt)
    trainer = build(config, load(config)).trainer
    monkeypatch.setattr(Judge, "beats_untrained", lambda *_: beats)
    # The probe may be right everywhere.
    monkeypatch.setattr(Judge, "score", lambda *_: 50.0)
    trainer.run()
    kept = load_checkpoint(tmp_path / "checkpoint.safetensors")
    splits = (trainer.dataset.train, trainer.dataset.val)
    known = (prompted_features(trainer.model, split, trainer.device) for split in splits)
    fitted = refitted_head(*known, trainer.model)
    trained = trainer.model.head.rows
    assert not torch.allclose(trained, fitted.rows, rtol=0.1)
    state = load_file(tmp_path / "last.safetensors")
    assert torch.equal(state["class_embeddings"], trained.detach())
    if beats:
        assert trainer.progress.best_epoch == 1
        assert torch.equal(kept.head.rows, fitted.rows)
        assert torch.equal(kept.tensors["prompt"], trainer.model.prompt.template().detach())
        val = trainer.evaluate(kept.model(trainer.model.encoder).eval(), trainer.dataset.val)
        assert val.top1 == trainer.progress.best_val
    else:
        assert trainer.progress.best_epoch == UNTRAINED
        assert not kept.tensors["prompt"].any()


def test_a_refitted_head_needs_a_likelihood_that_is_clearly_better(small, tmp_path):
    prompt = PromptConfig(head="linear", embed_dim=4, prompt_init="zero")
    config = replace(small(tmp_path), prompt=prompt)
    loaded = load(config)
    labels = torch.arange(300) % 3
    images = loaded.dataset.val.images[:1].expand(300, -1, -1, -1)
    val = replace(loaded.dataset.val, images=images, labels=labels, rows=torch.arange(300))
    trainer = build(config, replace(loaded, dataset=replace(loaded.dataset, val=val))).trainer
    signal, noise = torch.nn.functional.one_hot(labels, 3), torch.randn(300, 3)

    def evaluation(strength, of=noise):
        return Evaluation(strength * signal + of, labels, torch.zeros(300, 7, 7))

    before = evaluation(1.0)
    trainer.progress.untrained_right = "".join("01"[right] for right in before.right.tolist())
    trainer.progress.untrained_loss = trainer.judge.losses(before).tolist()
    # Surer alone is no better: a temperature undoes it.
    assert not trainer.judge.beats_untrained(evaluation(5.0, of=5 * noise), trainer.progress)
    assert not trainer.judge.beats_untrained(
        evaluation(1.0, of=torch.randn(300, 3)), trainer.progress
    )
    assert trainer.judge.beats_untrained(evaluation(1.5), trainer.progress)
    assert not trainer.judge.beats_untrained(evaluation(0.5), trainer.progress)
    # Likelier on the mean, but right less often.
    fewer = evaluation(1.5)
    wrong = torch.where(before.right)[0][:60]
    fewer.logits[wrong] = 0.1 * torch.nn.functional.one_hot((labels[wrong] + 1) % 3, 3).float()
    assert not trainer.judge.beats_untrained(fewer, trainer.progress)


@pytest.mark.parametrize("reads", ["features", "embedding"])
@pytest.mark.parametrize("factor", [20.0, 0.001])
def test_an_overconfident_head_is_softened_and_a_shy_one_stays(small, tmp_path, reads, factor):
    config = small(tmp_path)
    loaded = load(config)
    val = loaded.dataset.val
    # A third is wrong: who is sure of everything is overconfident.
    labels = val.labels.clone()
    labels[val.rows[::3]] = (labels[val.rows[::3]] + 1) % 3
    val = replace(val, labels=labels)
    features = frozen_features(loaded.frozen, val, CPU)
    fitted = fit_head(loaded.frozen, loaded.dataset, CPU, (reads,))
    head = HeadRows(factor * fitted.rows, factor * fitted.bias, fitted.reads)
    got = softened(head, loaded.frozen, features)
    if factor < 1:
        assert torch.equal(got.rows, head.rows)
        return
    ratio = got.rows / head.rows
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-4)
    assert torch.allclose(got.bias, ratio[0, 0] * head.bias)
    assert ratio[0, 0] < 1
    again = softened(got, loaded.frozen, features)
    assert torch.allclose(again.rows, got.rows, rtol=0.02)


@pytest.mark.parametrize("head_input", ["embedding", "features"])
@pytest.mark.parametrize("graph", ["folded", "pixel"])
def test_a_reader_of_the_contract_gets_the_same_logits_from_every_file(
    run, head_input, graph, tmp_path
):
    config, result = run("adavipro", head_input)
    path = Path(result["checkpoint"])
    onnx_export.export(OnnxConfig(path, tmp_path / "f.onnx", graph=graph, input="uint8"))
    _, test, _ = load_test(config.data, load_checkpoint(path).preprocess)
    pixels, _ = test.batch(torch.arange(len(test)), CPU)
    session = onnxruntime.InferenceSession(tmp_path / "f.onnx")
    logits, embedding = session.run(["logits", "embedding"], {"image": pixels.numpy()})
    tensors = load_file(path)
    if head_input == "embedding":
        scale = tensors["logit_scale"].item()
        expected = scale * embedding @ tensors["class_embeddings"].numpy().T
        np.testing.assert_allclose(logits, expected + tensors["class_bias"].numpy(), atol=1e-3)
    ours = open_artifact(path, device="cpu")(pixels)
    np.testing.assert_allclose(logits, ours.logits, atol=1e-3)
    stored = json.loads(session.get_modelmeta().custom_metadata_map["config"])
    assert (stored["head"], stored["head_input"]) == ("linear", head_input)


def test_a_probes_file_gives_scikit_learns_answers(run, tmp_path):
    config, result = run("linear_probe")
    onnx_export.export(OnnxConfig(Path(result["checkpoint"]), tmp_path / "f.onnx"))
    encoder = load_encoder("demo")
    dataset = load_dataset(config.data, encoder.preprocess)
    splits = [dataset.train, dataset.val, dataset.test]
    train, val, test = (frozen_features(encoder, split, CPU) for split in splits)
    heads = [
        LogisticRegression(C=c, max_iter=5000).fit(train.features, train.labels)
        for c in STRENGTHS["features"]
    ]
    best = max(heads, key=lambda head: head.score(val.features, val.labels))
    pixels, _ = splits[2].batch(torch.arange(len(splits[2])), CPU)
    got = open_artifact(tmp_path / "f.onnx", device="cpu")(pixels).logits.argmax(1)
    assert got.tolist() == best.predict(test.features).tolist()


def test_bad_heads_are_told_in_one_line(run, small, tmp_path):
    with pytest.raises(
        ValueError, match="zero_shot does not train a head; use --method linear_probe"
    ):
        PromptConfig(method="zero_shot", head="linear")
    probe = Path(run("linear_probe")[1]["checkpoint"])
    config = small(tmp_path / "run", epochs=1)
    prompt = replace(config.prompt, head="linear", head_input="embedding")
    with pytest.raises(ValueError, match="contains no linear head for embedding"):
        start_run(replace(config, prompt=prompt, head_from=probe))
    assert recipe("best", 30, "linear").optimiser.lr_prompt == 12


def test_the_rows_that_a_head_starts_from_stay_what_they_were(encoder):
    rows = torch.randn(3, 64)
    config = PromptConfig(embed_dim=4, head="linear", head_input="embedding")
    model = AdaViPro(encoder, rows, config, class_bias=torch.zeros(3))
    before = rows.clone()
    model.head.rows.data.add_(1)
    assert torch.equal(rows, before)
    with pytest.raises(ValueError, match="a text head only supports embeddings"):
        PromptConfig(head_input="features")


def test_a_temperature_mends_confidence_and_changes_no_answer():
    torch.manual_seed(0)
    labels = torch.randint(0, 5, (4000,))
    logits = torch.randn(4000, 5) + 2.0 * torch.nn.functional.one_hot(labels, 5)
    sharp = 5 * logits
    fitted = calibrate(sharp[:2000], labels[:2000])
    assert fitted.temperature == pytest.approx(5 * calibrate(logits, labels).temperature, rel=0.1)
    before, after = sharp[2000:].softmax(1), fitted.probabilities(sharp[2000:])
    assert torch.equal(before.argmax(1), after.argmax(1))
    errors = [expected_calibration_error(p, labels[2000:]) for p in (before, after)]
    assert errors[1] < 0.3 * errors[0]
    # A share of held-out images is rejected that validation promised.
    for rate in (0.0, 0.05, 0.5):
        rejected = (after.amax(1) < fitted.threshold(rate)).double().mean()
        assert abs(rejected - rate) < 0.03


def test_a_threshold_needs_a_calibration_and_a_share():
    with pytest.raises(ValueError, match="contains no calibration; train it again"):
        Calibration().threshold(0.1)
    with pytest.raises(ValueError, match="reject is 1.5; use a share between"):
        Calibration().threshold(1.5)


def test_every_backend_has_the_same_probabilities(run, tmp_path):
    config, result = run("adavipro", "features")
    path = Path(result["checkpoint"])
    onnx_export.export(OnnxConfig(path, tmp_path / "f.onnx"))
    keys = ("temperature", "nll", "ece", "rejected", "kept_top1")
    figures = [
        evaluate.command(EvaluateConfig(p, data=config.data, device="cpu", reject=0.2))
        for p in (path, tmp_path / "f.onnx")
    ]
    assert figures[0]["temperature"] != 1
    for key in keys:
        assert figures[0][key] == pytest.approx(figures[1][key], abs=1e-3)


def test_one_class_has_no_probe(small, tmp_path):
    for split in ("train", "val", "test"):
        place = tmp_path / "data" / split / "only"
        place.mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (20, 20), (number, 0, 0)).save(place / f"{number}.png")
    config = small(tmp_path / "run", method="linear_probe")
    config = replace(config, data=replace(config.data, data=str(tmp_path / "data")))
    with pytest.raises(ValueError, match="'only' is the only class; a probe needs two"):
        start_run(config)
