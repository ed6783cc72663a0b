"""The gain of a prompt with a head over the probe that it starts from."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any


def over_probe(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the gain over the probe of the same seed: points of test top-1, mean and error.

    The standard error is over seeds. For a single seed it comes from the test images that the last
    epoch and the probe answer differently (McNemar, 1947), and it is 0 if the probe was kept.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["data"], row["line"], row["epochs"], row["limit_train"]].append(row)
    found = []
    for (data, line, epochs, limit), group in groups.items():
        points = [row["test_top1"] - row["probe_test"] for row in group]
        error = (
            statistics.stdev(points) / len(points) ** 0.5 if len(points) > 1 else _of_images(group)
        )
        found.append(
            {
                "data": data,
                "line": line,
                "epochs": epochs,
                "limit_train": limit,
                "seeds": len(points),
                "probe_test": statistics.mean(row["probe_test"] for row in group),
                "test_top1": statistics.mean(row["test_top1"] for row in group),
                "points": statistics.mean(points),
                "standard_error": error,
            }
        )
    return found


def _of_images(group: list[dict[str, Any]]) -> float:
    """Return the standard error of a single run's gain, points."""
    (row,) = group
    if not row["kept_epoch"]:
        return 0.0
    # Standard error of the difference of two equally likely counts.
    error: float = (row["test_gained"] + row["test_lost"]) ** 0.5
    images: int = row["images"]["test"]
    return 100 * error / images
