"""Balanced weights: a small class counts as much as a large one."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from adavipro_fast.data.metrics import Evaluation, balanced, macro_of
from adavipro_fast.training.assemble import build, load
from adavipro_fast.training.batches import Batch
from adavipro_fast.training.probe import fit_head


def test_weights_make_all_classes_count_the_same():
    labels = torch.tensor([0] * 8 + [1] * 2 + [3] * 2)
    weights = balanced(labels, 4)
    totals = torch.zeros(4).index_add(0, labels, weights[labels])
    assert torch.equal(totals[[0, 1, 3]], torch.full((3,), 3.0))


def unbalanced(loaded, kept):
    """Keep so many training images of the first class, and all of the others."""
    train = loaded.dataset.train
    labels = train.labels[train.rows]
    rows = torch.cat([train.rows[labels == 0][:kept], train.rows[labels != 0]])
    return replace(loaded, dataset=replace(loaded.dataset, train=replace(train, rows=rows)))


@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_training_and_probe_follow_the_flag(small, tmp_path, weights):
    config = small(tmp_path / weights, class_weights=weights)
    loaded = unbalanced(load(config), 1)
    trainer = build(config, loaded).trainer
    labels = loaded.dataset.train.labels[loaded.dataset.train.rows]
    images, some = loaded.dataset.train.batch(torch.arange(8), trainer.device)
    logits = torch.randn(8, 3)
    trainer._logits = lambda *_: logits.requires_grad_()
    loss, _, _ = trainer._step(Batch(images, some, torch.arange(8), 8), tau=1.0)
    expected = F.cross_entropy(logits, some, reduction="none")
    if weights == "balanced":
        expected = expected * balanced(labels, 3)[some]
    assert loss == pytest.approx(expected.sum().item() / 8, rel=1e-5)
    heads = [
        fit_head(loaded.frozen, loaded.dataset, trainer.device, balanced=flag)
        for flag in (False, True)
    ]
    assert not torch.equal(heads[0].rows, heads[1].rows)


@pytest.mark.parametrize(("judge", "kept"), [("top1", True), ("macro", False)])
def test_the_judge_chooses_the_epoch(small, tmp_path, judge, kept):
    """Nine gained images of a large class against all three of a small one."""
    config = small(tmp_path / judge, judge=judge)
    loaded = load(config)
    labels = torch.tensor([0] * 20 + [1] * 3 + [2] * 3)
    val = replace(loaded.dataset.val, labels=labels, rows=torch.arange(len(labels)))
    run = build(config, replace(loaded, dataset=replace(loaded.dataset, val=val)))
    trainer = run.trainer
    before = torch.tensor([True] * 11 + [False] * 9 + [True] * 6)
    after = torch.tensor([True] * 20 + [False] * 3 + [True] * 3)
    trainer.progress.untrained_right = "".join("01"[right] for right in before.tolist())

    def evaluation(right):
        predicted = torch.where(right, labels, (labels + 1) % 3)
        return Evaluation(F.one_hot(predicted, 3).float(), labels, torch.zeros(len(labels), 7, 7))

    now = evaluation(after)
    assert trainer.judge.beats_untrained(now, trainer.progress) == kept
    expected = macro_of(now.per_class(("a", "b", "c"))) if judge == "macro" else now.top1
    assert trainer.judge.score(now) == pytest.approx(expected)
