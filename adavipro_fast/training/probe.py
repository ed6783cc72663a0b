"""Where a linear head starts: a probe on frozen features, or the text embeddings.

A probe is logistic regression (scikit-learn) whose penalty is chosen on validation.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm.auto import tqdm

from adavipro_fast.data.sets import Dataset
from adavipro_fast.data.split import Split
from adavipro_fast.method.config import HeadInput
from adavipro_fast.method.encoder import FrozenEncoder
from adavipro_fast.method.functional import normalise
from adavipro_fast.method.head import HeadRows
from adavipro_fast.training.log import say

# Inverse strengths of the L2 penalty that are tried on validation; VP's 0.316 is among them. Unit
# embeddings are some ten times shorter than features and take weaker penalties.
STRENGTHS: dict[HeadInput, tuple[float, ...]] = {
    "features": tuple(10 ** (power / 2) for power in range(-6, 7)),
    "embedding": tuple(10 ** (power / 2) for power in range(-2, 11)),
}
HEAD_STEPS = 2000
BATCH = 64
Array = np.ndarray[Any, Any]


class Frozen(NamedTuple):
    """What the frozen encoder makes of a split: embedding (N, E), features (N, F), labels (N,)."""

    embedding: Array
    features: Array
    labels: Array


@torch.no_grad()
def frozen_features(encoder: FrozenEncoder, split: Split, device: torch.device) -> Frozen:
    """Run the encoder over a split."""
    encoder = encoder.to(device)
    mean, std = (
        torch.tensor(v, device=device) for v in (encoder.preprocess.mean, encoder.preprocess.std)
    )
    parts = []
    batches = split.batches(BATCH, device)
    for images, labels in tqdm(
        batches, "features", -(-len(split) // BATCH), leave=False, disable=None
    ):
        embedding, features = encoder.embed(normalise(images, mean, std))
        parts.append((embedding.cpu().double(), features.cpu().double(), labels.cpu()))
    return Frozen(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))


def fit_head(
    encoder: FrozenEncoder,
    dataset: Dataset,
    device: torch.device,
    inputs: tuple[HeadInput, ...] = ("features",),
    text: Tensor | None = None,
    *,
    balanced: bool = False,
) -> HeadRows:
    """Fit probes, and take the head that is best on validation.

    Args:
        encoder: in fp32.
        dataset: its training images are fitted, its validation images decide.
        device: where the encoder runs.
        inputs: what the head may read.
        text: (K, E) unit rows, a candidate without fitting.
        balanced: all classes count the same, however many images they have.
    """
    if len(dataset.class_names) < 2:
        raise ValueError(f"{dataset.class_names[0]!r} is the only class; a probe needs two")
    present = set(dataset.train.labels[dataset.train.rows].tolist())
    absent = [name for label, name in enumerate(dataset.class_names) if label not in present]
    if absent:
        raise ValueError(f"class {absent[0]!r} has no training image; a probe needs one of each")
    train, val = (frozen_features(encoder, s, device) for s in (dataset.train, dataset.val))
    candidates = []
    for head_input in inputs:
        top1, head = _probe(train, val, head_input, balanced=balanced)
        say(f"linear probe on {head_input}: val top-1 {top1:.1f} %")
        if head_input == "embedding":
            head = replace(head, rows=head.rows / encoder.logit_scale)
        candidates.append((top1, head))
    if text is not None:
        top1 = 100 * float(
            (np.argmax(val.embedding @ text.double().numpy().T, 1) == val.labels).mean()
        )
        say(f"text embeddings: val top-1 {top1:.1f} %")
        candidates.append((top1, HeadRows(text, torch.zeros(len(text)), "embedding")))
    # Among equals the first stays.
    return max(candidates, key=lambda candidate: candidate[0])[1]


def _probe(
    train: Frozen, val: Frozen, head_input: HeadInput, *, balanced: bool
) -> tuple[float, HeadRows]:
    """Fit one probe: its validation top-1, percent, and the head."""
    rows, held_out = getattr(train, head_input), getattr(val, head_input)
    best: tuple[float, LogisticRegression] | None = None
    weights = "balanced" if balanced else None
    for strength in tqdm(STRENGTHS[head_input], "penalty", leave=False, disable=None):
        probe = LogisticRegression(C=strength, max_iter=HEAD_STEPS, class_weight=weights)
        probe.fit(rows, train.labels)
        top1 = 100 * float(probe.score(held_out, val.labels))
        # Among equals the stronger penalty stays.
        if best is None or top1 > best[0]:
            best = top1, probe
    assert best is not None
    weight, bias = torch.tensor(best[1].coef_), torch.tensor(best[1].intercept_)
    if len(weight) == 1:
        # Of two classes scikit-learn keeps the difference.
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return best[0], HeadRows(weight.float(), bias.float(), head_input)
