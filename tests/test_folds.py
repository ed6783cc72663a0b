"""Fold heads: no image is scored by a head that has seen it, and a run goes on with them."""

from dataclasses import replace

import pytest
import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression

from adavipro_fast.method.config import PromptConfig
from adavipro_fast.training.assemble import build, load
from adavipro_fast.training.folds import FITS, FOLDS, FoldHeads, folded, folds_of
from adavipro_fast.training.probe import STRENGTHS, Features
from adavipro_fast.training.run import start_run
from adavipro_fast.training.state import UNTRAINED

CPU = torch.device("cpu")
LINEAR = PromptConfig(
    head="linear",
    head_input="features",
    embed_dim=4,
    prompt_init="zero",
    edge="laplacian-magnitude",
)


def heads_of(labels, classes, reads="features", balanced=False, epochs=4):
    return FoldHeads(labels, classes, reads, epochs=epochs, seed=0, balanced=balanced, device=CPU)


def features_of(labels, classes, noise=1.0):
    torch.manual_seed(1)
    rows = 2.0 * F.one_hot(labels, classes) + noise * torch.randn(len(labels), classes)
    rows = rows.double()
    return Features(F.normalize(rows).numpy(), rows.numpy(), labels.numpy())


def test_classes_are_spread_evenly_and_a_lonely_image_is_in_no_fold():
    labels = torch.tensor([0] * 23 + [1] * 5 + [2] + [3] * 2)[torch.randperm(31)]
    fold = folds_of(labels, seed=3)
    assert torch.equal(fold, folds_of(labels, seed=3))
    assert not torch.equal(fold, folds_of(labels, seed=4))
    assert fold[labels == 2].tolist() == [-1]
    for label in (0, 1, 3):
        counts = fold[labels == label].bincount(minlength=FOLDS)
        assert counts.max() - counts.min() <= 1
    counts = fold[fold >= 0].bincount(minlength=FOLDS)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("reads", ["features", "embedding"])
@pytest.mark.parametrize(("classes", "balanced"), [(3, False), (3, True), (2, False)])
def test_each_image_is_scored_by_the_head_that_has_not_seen_it(reads, classes, balanced):
    labels = torch.arange(60) % classes
    train = features_of(labels, classes)
    heads = heads_of(labels, classes, reads, balanced)
    heads.fit(train)
    embedding, features = (torch.tensor(part).float() for part in train[:2])
    images = torch.randperm(60)
    logits = heads.logits(embedding[images], features[images], images)
    known = getattr(train, reads)
    for row, image in zip(logits, images.tolist(), strict=True):
        seen = (heads.fold != heads.fold[image]).numpy()
        weights = "balanced" if balanced else None
        alone = LogisticRegression(
            C=STRENGTHS[reads][heads.chosen], max_iter=2000, class_weight=weights
        )
        alone.fit(known[seen], labels.numpy()[seen])
        expected = torch.tensor(alone.predict_log_proba(known[image : image + 1])[0]).float()
        assert torch.allclose(row.log_softmax(0), expected, atol=1e-3)


def test_the_penalty_is_that_of_the_least_loss_on_images_left_out_and_moves_in_steps():
    labels = torch.arange(90) % 3
    train = features_of(labels, 3, noise=3.0)
    heads = heads_of(labels, 3)
    heads.fit(train)
    strengths = STRENGTHS["features"]

    def loss(strength):
        rows, bias = heads._heads(train.features, strength)
        logits = torch.einsum("bd,fkd->bfk", torch.tensor(train.features), rows) + bias
        own = logits[torch.arange(90), heads.fold]
        return F.cross_entropy(own, labels).item()

    first = heads.chosen
    assert loss(strengths[first]) == min(map(loss, strengths))
    # Without noise the weakest penalty is the best one, which is many steps away.
    heads.fit(features_of(labels, 3, noise=0.0))
    assert heads.chosen == first + 1


@pytest.mark.parametrize(("epochs", "fits"), [(4, [0, 1, 2, 3]), (50, [*range(0, 50, 7)])])
def test_heads_are_fitted_so_many_times_at_most(epochs, fits):
    heads = heads_of(torch.arange(30) % 3, 3, epochs=epochs)
    heads.rows = torch.zeros(FOLDS, 3, 2)
    assert [epoch for epoch in range(epochs) if heads.due(epoch, 0)] == fits
    assert len(fits) <= FITS
    assert not heads.due(0, 1)
    # A run that was started without them.
    heads.rows = torch.zeros(0)
    assert heads.due(epochs - 1, 1)


def test_only_few_images_of_enough_a_class_have_fold_heads():
    assert folded(50, 10)
    assert not folded(49, 10)
    assert not folded(100_000, 10)


@pytest.mark.parametrize("reads", ["features", "embedding"])
def test_the_prompt_learns_from_fold_heads_and_the_head_is_their_mean(small, tmp_path, reads):
    prompt = replace(LINEAR, head_input=reads)
    config = replace(small(tmp_path / "run", epochs=2, precision="fp32"), prompt=prompt)
    # Without the names, which would be as good a start as a probe on the embedding.
    loaded = replace(load(config), embeddings=None)
    trainer = build(config, loaded).trainer
    assert [part.flag for part in trainer.parts] == ["--lr-prompt", "--lr-generator"]
    trainer.run()
    assert trainer.model.prompt.template().any()
    read = torch.randn(5, trainer.folds.rows.shape[2])
    heads = torch.einsum("bd,fkd->fbk", read, trainer.folds.rows)
    mean = (heads + trainer.folds.bias[:, None]).mean(0)
    assert torch.allclose(trainer.model.head(read, read), mean, atol=1e-4)
    state = load_file(tmp_path / "run" / "last.safetensors")
    assert torch.equal(state["folds.rows"], trainer.folds.rows)


def test_a_prompt_that_does_nothing_never_replaces_the_probe(small, tmp_path):
    config = small(tmp_path / "run", epochs=1, precision="fp32", lr_prompt=0, lr_generator=0)
    config = replace(config, prompt=LINEAR)
    loaded = load(config)
    torch.manual_seed(5)
    # Labels of chance: a head with another penalty is often likelier than the probe.
    for split in (loaded.dataset.train, loaded.dataset.val):
        split.labels.copy_(split.labels[torch.randperm(len(split.labels))])
    trainer = build(config, loaded).trainer
    trainer.run()
    assert trainer.progress.best_epoch == UNTRAINED
    with trainer._refitted():
        again = trainer.judge.losses(trainer.evaluate(trainer.model, trainer.dataset.val))
    assert again.tolist() == pytest.approx(trainer.progress.untrained_loss, abs=1e-6)


@pytest.mark.parametrize("missing", ["folds.rows", "folds.penalty", "all"])
def test_a_state_without_fold_heads_is_gone_on_with(small, tmp_path, missing):
    config = replace(small(tmp_path / "run", epochs=2, precision="fp32"), prompt=LINEAR)
    loaded = load(config)
    first = build(config, loaded).trainer
    first.run(until=1)
    path = tmp_path / "run" / "last.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {n: t for n, t in load_file(path).items() if n != missing}
    if missing == "all":
        tensors = {n: t for n, t in tensors.items() if not n.startswith("folds.")}
    save_file(tensors, path, metadata)
    again = build(config, loaded).trainer
    again.restore()
    again.progress.step = 1
    again.run()
    assert again.progress.epoch == 2
    assert again.folds.chosen is not None


@pytest.mark.parametrize("start", ["text", "probe"])
def test_a_text_start_and_many_images_leave_the_head_to_gradient_steps(
    small, tmp_path, monkeypatch, start
):
    prompt = replace(LINEAR, head_input=None if start == "text" else "features")
    config = replace(small(tmp_path / "run", epochs=1), prompt=prompt)
    if start == "probe":
        monkeypatch.setattr("adavipro_fast.training.folds.LARGEST", 29)
    trainer = build(config, load(config)).trainer
    # On so few images the names are as good as any probe of the embedding or the features.
    assert (trainer.model.head.bias == 0).all() == (start == "text")
    assert trainer.folds is None
    assert "--lr-head" in [part.flag for part in trainer.parts]


def test_a_run_interrupted_within_an_epoch_ends_in_the_same_bytes(small, tmp_path, monkeypatch):
    from adavipro_fast.training.run import resume_run
    from adavipro_fast.training.trainer import Trainer

    config = small(tmp_path / "whole", epochs=2, precision="fp32")
    config = replace(config, prompt=LINEAR)
    start_run(config)
    step, steps = Trainer._step, []

    def stopping(self, batch, tau):
        steps.append(batch.total)
        if len(steps) == self.steps + 2:
            self.stop()
        return step(self, batch, tau)

    monkeypatch.setattr(Trainer, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        start_run(replace(config, output=tmp_path / "cut"))
    resume_run(tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
