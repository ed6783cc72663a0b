"""Where a linear head starts: a probe on frozen features, or the text embeddings.

A probe is logistic regression (scikit-learn) whose penalty is chosen on validation.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm.auto import tqdm

from adavipro_fast.data.metrics import negative_log_likelihood
from adavipro_fast.data.sets import Dataset
from adavipro_fast.data.split import Split
from adavipro_fast.method.config import HeadInput
from adavipro_fast.method.encoder import FrozenEncoder
from adavipro_fast.method.functional import normalise
from adavipro_fast.method.head import HeadRows
from adavipro_fast.method.model import AdaViPro
from adavipro_fast.training.calibrate import calibrate
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


class Features(NamedTuple):
    """What an encoder makes of a split: embedding (N, E), features (N, F), labels (N,)."""

    embedding: Array
    features: Array
    labels: Array


def frozen_features(encoder: FrozenEncoder, split: Split, device: torch.device) -> Features:
    """Run the frozen encoder over a split."""
    encoder = encoder.to(device)
    mean, std = (
        torch.tensor(v, device=device) for v in (encoder.preprocess.mean, encoder.preprocess.std)
    )
    return features_of(lambda x: encoder.embed(normalise(x, mean, std)), split, device)


def prompted_features(model: AdaViPro, split: Split, device: torch.device) -> Features:
    """Run a prompted encoder over a split, with argmax masks."""
    training = model.prompt.training
    model.prompt.eval()
    try:
        return features_of(lambda x: model.encoder.embed(model.prompted(x).images), split, device)
    finally:
        model.prompt.train(training)


@torch.no_grad()
def features_of(
    embed: Callable[[Tensor], tuple[Tensor, Tensor]], split: Split, device: torch.device
) -> Features:
    """Collect embeddings and features of a split, given pixels (B, 3, S, S) to both."""
    parts = []
    batches = split.batches(BATCH, device)
    for images, labels in tqdm(
        batches, "features", -(-len(split) // BATCH), leave=False, disable=None
    ):
        embedding, features = embed(images)
        parts.append((embedding.cpu().double(), features.cpu().double(), labels.cpu()))
    return Features(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))


def fit_head(
    encoder: FrozenEncoder,
    dataset: Dataset,
    device: torch.device,
    inputs: tuple[HeadInput, ...] = ("features",),
    text: Tensor | None = None,
    *,
    val: Features | None = None,
    balanced: bool = False,
) -> HeadRows:
    """Fit probes, and take the head that is best on validation.

    Args:
        encoder: in fp32.
        dataset: its training images are fitted, its validation images decide.
        device: where the encoder runs.
        inputs: what the head may read.
        text: (K, E) unit rows, a candidate without fitting.
        val: of the validation images, where they are known.
        balanced: all classes count the same, however many images they have.
    """
    if len(dataset.class_names) < 2:
        raise ValueError(f"{dataset.class_names[0]!r} is the only class; a probe needs two")
    present = set(dataset.train.labels[dataset.train.rows].tolist())
    absent = [name for label, name in enumerate(dataset.class_names) if label not in present]
    if absent:
        raise ValueError(f"class {absent[0]!r} has no training image; a probe needs one of each")
    train = frozen_features(encoder, dataset.train, device)
    val = val or frozen_features(encoder, dataset.val, device)
    candidates = []
    for head_input in inputs:
        top1, head = _probe(train, val, head_input, balanced=balanced)
        say(f"linear probe on {head_input}: val top-1 {top1:.1f} %")
        candidates.append((top1, unscaled(head, encoder)))
    if text is not None:
        top1 = 100 * float(
            (np.argmax(val.embedding @ text.double().numpy().T, 1) == val.labels).mean()
        )
        say(f"text embeddings: val top-1 {top1:.1f} %")
        candidates.append((top1, HeadRows(text, torch.zeros(len(text)), "embedding")))
    # Among equals the first stays.
    return max(candidates, key=lambda candidate: candidate[0])[1]


def refitted_head(
    train: Features, val: Features, model: AdaViPro, *, balanced: bool = False
) -> HeadRows:
    """Fit the head once more, as a probe on the encoder's features of prompted images.

    The penalty with the lowest validation loss is chosen, which is less noisy than top-1.
    """
    head = _probe(train, val, model.head.reads, balanced=balanced, by="loss")[1]
    return unscaled(head, model.encoder)


def softened(head: HeadRows, encoder: FrozenEncoder, val: Features) -> HeadRows:
    """Divide an overconfident head by the temperature that calibrates it on validation images.

    A probe that is certain of every training image leaves the prompt no gradient.
    """
    scale = encoder.logit_scale if head.reads == "embedding" else 1.0
    logits = scale * torch.tensor(getattr(val, head.reads)).float() @ head.rows.t()
    if head.bias is not None:
        logits = logits + head.bias
    temperature = max(calibrate(logits, torch.tensor(val.labels)).temperature, 1.0)
    bias = None if head.bias is None else head.bias / temperature
    return replace(head, rows=head.rows / temperature, bias=bias)


def unscaled(head: HeadRows, encoder: FrozenEncoder) -> HeadRows:
    """Take the factor of the cosine out of a head that was fitted without it."""
    if head.reads == "features":
        return head
    return replace(head, rows=head.rows / encoder.logit_scale)


def fitted(
    known: Array, labels: Array, strength: float, *, balanced: bool
) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression: weight (K, D) and bias (K,), in fp64.

    Args:
        known: (N, D).
        labels: (N,), with all K classes.
        strength: inverse strength of the L2 penalty.
        balanced: weight classes equally.
    """
    weights = "balanced" if balanced else None
    probe = LogisticRegression(C=strength, max_iter=HEAD_STEPS, class_weight=weights)
    with warnings.catch_warnings():
        # Weak penalties may not converge; validation judges the result in any case.
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(known, labels)
    weight, bias = torch.tensor(probe.coef_), torch.tensor(probe.intercept_)
    if len(weight) == 1:
        # Of two classes scikit-learn keeps the difference.
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return weight, bias


def _probe(
    train: Features,
    val: Features,
    head_input: HeadInput,
    *,
    balanced: bool,
    by: Literal["top1", "loss"] = "top1",
) -> tuple[float, HeadRows]:
    """Fit one probe: its validation top-1, percent, and the head."""
    rows, held_out = getattr(train, head_input), getattr(val, head_input)
    best: tuple[float, float, HeadRows] | None = None
    labels = torch.tensor(val.labels)
    for strength in tqdm(STRENGTHS[head_input], "penalty", leave=False, disable=None):
        weight, bias = fitted(rows, train.labels, strength, balanced=balanced)
        logits = torch.tensor(held_out) @ weight.t() + bias
        top1 = 100 * float((logits.argmax(1) == labels).double().mean())
        score = top1
        if by == "loss":
            calibrated = calibrate(logits, labels).probabilities(logits)
            score = -negative_log_likelihood(calibrated, labels)
        # Among equals the stronger penalty stays.
        if best is None or score > best[0]:
            best = score, top1, HeadRows(weight.float(), bias.float(), head_input)
    assert best is not None
    return best[1], best[2]
