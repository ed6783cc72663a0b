"""Which model a run keeps: scores on validation, and when a trained model beats the untrained."""

import math
from typing import Literal

import torch
from torch import Tensor

from adavipro_fast.data.metrics import Evaluation, balanced, negative_log_likelihoods
from adavipro_fast.method.calibration import Link
from adavipro_fast.training.calibrate import calibrate
from adavipro_fast.training.state import Progress

# How much better the likelihood of a refitted model must be than without the prompt.
STANDARD_ERRORS = 2


class Judge:
    """Judges models by their predictions for the validation images.

    Args:
        labels: (N,) of the validation images.
        classes: K.
        by: weight all images equally (top1) or all classes (macro).
        link: turns logits into probabilities.
    """

    def __init__(
        self, labels: Tensor, classes: int, by: Literal["top1", "macro"], link: Link
    ) -> None:
        self.link = link
        ones = torch.ones(len(labels))
        self.weights = balanced(labels, classes)[labels] if by == "macro" else ones

    def score(self, val: Evaluation) -> float:
        """Return the score that chooses among epochs, percent."""
        return 100 * float((val.right * self.weights).sum() / self.weights.sum())

    def losses(self, val: Evaluation) -> Tensor:
        """Return each image's cross-entropy (N,) under calibrated probabilities."""
        calibration = calibrate(val.logits, val.labels, self.link)
        return negative_log_likelihoods(calibration.probabilities(val.logits), val.labels)

    def beats_untrained(self, val: Evaluation, progress: Progress) -> bool:
        """Return whether a model is clearly better than the untrained one.

        Its score must be better by one standard error (Breiman et al., 1984) of the difference,
        since both models see the same images. If the head is fitted again, the likelihood must
        instead be better by two standard errors than that of a head fitted in the same way without
        the prompt, and the score must not be lower than the probe's: a likelihood says more about
        few images than a count of right answers.

        Args:
            val: the model's predictions.
            progress: the run's progress, with the figures of the untrained model.
        """
        before = progress.untrained_right
        if not before:
            return val.top1 > progress.least_val
        right = torch.tensor([letter == "1" for letter in before])
        changed = (val.right.float() - right.float()) * self.weights
        if not progress.untrained_loss:
            return bool(changed.sum() > changed.square().sum().sqrt())
        untrained = torch.tensor(progress.untrained_loss, dtype=torch.double)
        gained = (untrained - self.losses(val)) * self.weights
        error = gained.std() / math.sqrt(len(gained))
        return bool(changed.sum() >= 0 and gained.mean() > STANDARD_ERRORS * error)
