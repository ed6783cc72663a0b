"""What a prediction says in words: class names, probabilities, `unknown`, the mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adavipro_fast.files.about import Description
from adavipro_fast.method.model import Prediction

SHOWN_CLASSES = 5
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Answer:
    """What a picture was classified as."""

    name: str
    """of the likeliest class, or `unknown` where it is rejected"""
    probability: float
    """of the likeliest class"""
    rejected: bool
    """the confidence is below what `reject` asks for"""
    classes: tuple[tuple[str, float], ...]
    """names and probabilities, the likeliest first"""
    mask: tuple[tuple[int, ...], ...]
    """(G, G): 1 where the prompt is added"""

    @classmethod
    def of(cls, described: dict[str, Any]) -> "Answer":
        """Take what `answers` describes."""
        classes = tuple((row["name"], row["probability"]) for row in described["classes"])
        mask = tuple(map(tuple, described["mask"]))
        return cls(described["answer"], classes[0][1], described["rejected"], classes, mask)


def answers(
    about: Description,
    prediction: Prediction,
    reject: float | None = None,
    shown: int = SHOWN_CLASSES,
) -> list[dict[str, Any]]:
    """Describe each image's prediction, its likeliest classes first.

    Args:
        about: the artifact, of one task.
        prediction: of B images.
        reject: share of known images that may be answered `unknown`; none answers all.
        shown: how many classes.

    Raises:
        ValueError: `reject` is no share, or the file holds no calibration.
    """
    least = 0.0 if reject is None else about.calibration.threshold(reject)
    probabilities = about.calibration.probabilities(prediction.logits)
    return [
        described(row, mask, about.class_names, least, shown)
        for row, mask in zip(probabilities, prediction.mask, strict=True)
    ]


def answers_of_tasks(
    about: Description,
    prediction: Prediction,
    tasks: Sequence[str] | None,
    reject: float | None = None,
    shown: int = SHOWN_CLASSES,
) -> list[dict[str, Any]]:
    """Describe each image's prediction by the task that it was classified for.

    Args:
        about: the artifact.
        prediction: of B images.
        tasks: B names; None of an artifact of one task.
        reject: see `answers`.
        shown: how many classes.

    Raises:
        ValueError: a task is not there; else as `answers`.
    """
    if tasks is None:
        return answers(about, prediction, reject, shown)
    # Finding a task goes through all of the file's.
    known = {task: about.of_task(task) for task in dict.fromkeys(tasks)}
    found = []
    for row, task in enumerate(tasks):
        part = Prediction(*(values[row : row + 1] for values in prediction))
        part = part._replace(logits=part.logits[:, : len(known[task].class_names)])
        found += answers(known[task], part, reject, shown)
    return found


def described(
    probabilities: Tensor, mask: Tensor, class_names: tuple[str, ...], least: float, shown: int
) -> dict[str, Any]:
    """Describe one prediction; below a confidence of `least` the answer is `unknown`."""
    top = probabilities.topk(min(shown, len(probabilities)))
    classes = [
        {"name": class_names[index], "probability": value}
        for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]
    known = classes[0]["probability"] >= least
    answer = classes[0]["name"] if known else UNKNOWN
    return {
        "answer": answer,
        # A class may be called `unknown`, too.
        "rejected": not known,
        "classes": classes,
        "mask": mask.int().tolist(),
    }
