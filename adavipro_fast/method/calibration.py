"""Calibrated probabilities: a temperature, and the threshold for answering `unknown`."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Bounds of the fitted temperature; on a few images that are all right it would go to 0.
LEAST, MOST = 0.05, 20.0
QUANTILES = 101
Link = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Calibration:
    """A model's calibration on validation images; stored in every file."""

    temperature: float = 1.0
    """logits are divided by it before the softmax (Guo et al., 2017)"""
    confidences: tuple[float, ...] = ()
    """quantiles of the highest probability on validation images, in ascending order"""
    link: Link = "softmax"
    """sigmoid for a text head on an encoder that was trained with one (Zhai et al., 2023): each
    class has a separate probability, and they need not sum to 1"""

    def __post_init__(self) -> None:
        if not LEAST <= self.temperature <= MOST:
            raise ValueError(f"temperature is {self.temperature}; use {LEAST} to {MOST}")
        if self.link not in ("softmax", "sigmoid"):
            raise ValueError(f"unknown link {self.link!r}; use softmax or sigmoid")
        if len(self.confidences) not in (0, QUANTILES):
            raise ValueError(f"got {len(self.confidences)} confidences; expected {QUANTILES}")
        if not all(0 <= value <= 1 for value in self.confidences):
            raise ValueError("confidences must be between 0 and 1")

    @property
    def without(self) -> "Calibration":
        """The same link, uncalibrated."""
        return Calibration(link=self.link)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn logits (B, K) into probabilities; the likeliest class stays the same."""
        scaled = logits / self.temperature
        return scaled.sigmoid() if self.link == "sigmoid" else scaled.softmax(1)

    def threshold(self, rate: float) -> float:
        """Return the `rate` quantile of the confidences on validation images.

        Raises:
            ValueError: the rate is not in [0, 1), or the file contains no calibration.
        """
        if not 0 <= rate < 1:
            raise ValueError(f"reject is {rate}; use a share between 0 and 1")
        if not self.confidences:
            raise ValueError("the file contains no calibration; train it again to use --reject")
        quantiles = torch.tensor(self.confidences, dtype=torch.double)
        position = rate * (QUANTILES - 1)
        below, share = math.floor(position), position - math.floor(position)
        return float(torch.lerp(quantiles[below], quantiles[below + 1], share))


UNCALIBRATED = Calibration()
