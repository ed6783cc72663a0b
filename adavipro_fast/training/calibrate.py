"""Fit probabilities to validation images."""

import math

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from adavipro_fast.method.calibration import LEAST, MOST, QUANTILES, Calibration


def calibrate(logits: Tensor, labels: Tensor) -> Calibration:
    """Fit a temperature, and the confidences under it, to validation images.

    Args:
        logits: (N, K).
        labels: (N,).
    """
    logits = logits.double()

    def loss(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        return torch.nn.functional.cross_entropy(scaled, labels).item()

    bounds = (math.log(LEAST), math.log(MOST))
    temperature = math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)
    temperature = min(max(temperature, LEAST), MOST)
    confidence = (logits / temperature).softmax(1).amax(1)
    at = torch.linspace(0, 1, QUANTILES, dtype=torch.double)
    return Calibration(temperature, tuple(confidence.quantile(at).tolist()))
