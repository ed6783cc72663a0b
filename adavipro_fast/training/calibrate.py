"""Fit a model's calibration to validation images."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from adavipro_fast.method.calibration import LEAST, MOST, QUANTILES, Calibration, Link


def calibrate(logits: Tensor, labels: Tensor, link: Link = "softmax") -> Calibration:
    """Fit a temperature to validation images, and compute the confidences with it.

    Args:
        logits: (N, K).
        labels: (N,).
        link: turns logits into probabilities.
    """
    logits = logits.double()

    def loss(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        if link == "sigmoid":
            own = F.one_hot(labels, logits.shape[1]).double()
            return F.binary_cross_entropy_with_logits(scaled, own).item()
        return F.cross_entropy(scaled, labels).item()

    bounds = (math.log(LEAST), math.log(MOST))
    temperature = math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)
    temperature = min(max(temperature, LEAST), MOST)
    fitted = Calibration(temperature, link=link)
    at = torch.linspace(0, 1, QUANTILES, dtype=torch.double)
    confidence = fitted.probabilities(logits).amax(1)
    return replace(fitted, confidences=tuple(confidence.quantile(at).tolist()))
