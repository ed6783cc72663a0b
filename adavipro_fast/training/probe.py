"""A linear probe: logistic regression on frozen features, its penalty chosen on validation."""

import sys
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm import tqdm

from adavipro_fast.data.sets import Dataset
from adavipro_fast.data.split import Split
from adavipro_fast.method.encoder import FrozenEncoder
from adavipro_fast.method.functional import normalise

# Inverse strengths of the L2 penalty that are tried on validation; VP's 0.316 is among them.
STRENGTHS = tuple(10 ** (power / 2) for power in range(-6, 7))
HEAD_STEPS = 2000
BATCH = 64


@torch.no_grad()
def all_features(
    encoder: FrozenEncoder, split: Split, device: torch.device
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the features (N, F) and labels (N,) of a split."""
    encoder = encoder.to(device)
    mean, std = (
        torch.tensor(v, device=device) for v in (encoder.preprocess.mean, encoder.preprocess.std)
    )
    rows, labels = [], []
    batches = split.batches(BATCH, device)
    for images, targets in tqdm(
        batches, "features", -(-len(split) // BATCH), leave=False, disable=None
    ):
        rows.append(encoder.embed(normalise(images, mean, std))[1].cpu())
        labels.append(targets.cpu())
    return torch.cat(rows).double().numpy(), torch.cat(labels).numpy()


def fit_head(
    encoder: FrozenEncoder, dataset: Dataset, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Fit logistic regression; its penalty is chosen on validation.

    Returns:
        weight (K, F) and bias (K,).
    """
    train, labels = all_features(encoder, dataset.train, device)
    val, expected = all_features(encoder, dataset.val, device)
    best: tuple[float, LogisticRegression] | None = None
    for strength in tqdm(STRENGTHS, "penalty", leave=False, disable=None):
        head = LogisticRegression(C=strength, max_iter=HEAD_STEPS).fit(train, labels)
        top1 = 100 * float(head.score(val, expected))
        # Among equals the stronger penalty stays.
        if best is None or top1 > best[0]:
            best = top1, head
            print(f"C {strength:.3g}: val top-1 {top1:.1f} %", file=sys.stderr)
    assert best is not None
    weight, bias = torch.tensor(best[1].coef_), torch.tensor(best[1].intercept_)
    if len(weight) == 1:
        # Of two classes scikit-learn keeps the difference.
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return weight.float(), bias.float()
