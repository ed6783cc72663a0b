"""Probabilities that mean something: a temperature, and when to answer `unknown`."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# The temperature is sought between these; few images that are all right would drive it to 0.
LEAST, MOST = 0.05, 20.0
QUANTILES = 101
Link = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Calibration:
    """What validation images say about a model's confidence; travels in every file."""

    temperature: float = 1.0
    """logits are divided by it before the softmax (Guo et al., 2017)"""
    confidences: tuple[float, ...] = ()
    """highest probability on validation images: its quantiles, from the least to the most"""
    link: Link = "softmax"
    """sigmoid where names are the head of an encoder that was trained so (Zhai et al., 2023): each
    class has a probability of its own, and they need not sum to 1"""

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
        """The same kind of probabilities, nothing fitted."""
        return Calibration(link=self.link)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn logits (B, K) into probabilities; the likeliest class stays what it was."""
        scaled = logits / self.temperature
        return scaled.sigmoid() if self.link == "sigmoid" else scaled.softmax(1)

    def threshold(self, rate: float) -> float:
        """Return the confidence that a share `rate` of validation images stays below.

        Raises:
            ValueError: the rate is no share, or the model was trained before there were any.
        """
        if not 0 <= rate < 1:
            raise ValueError(f"reject is {rate}; use a share between 0 and 1")
        if not self.confidences:
            raise ValueError("the file contains no calibration; train it again to use --reject")
        quantiles = torch.tensor(self.confidences, dtype=torch.double)
        place = rate * (QUANTILES - 1)
        below, share = math.floor(place), place - math.floor(place)
        return float(torch.lerp(quantiles[below], quantiles[below + 1], share))


UNCALIBRATED = Calibration()
