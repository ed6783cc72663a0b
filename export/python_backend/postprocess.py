"""Triton's Python backend: the graph's logits to class names and calibrated probabilities."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read names, temperatures and links, each a list with one entry per task."""
        folder = Path(args["model_repository"], args["model_version"])
        about = json.loads((folder / "about.json").read_text())
        self.names, self.temperatures = about["class_names"], about["temperatures"]
        # Repositories written by older versions have no links.
        self.links = about.get("links", ["softmax"] * len(self.names))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request."""
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        """Turn logits (B, K) of tasks (B, 1) into class names and probabilities."""
        logits = pb_utils.get_input_tensor_by_name(request, "logits").as_numpy()
        named = pb_utils.get_input_tensor_by_name(request, "task")
        tasks = np.zeros(len(logits), int) if named is None else named.as_numpy()[:, 0]
        classes, probabilities = [], []
        for row, task in zip(logits.astype(np.float64), tasks, strict=True):
            names = self.names[task]
            scaled = row[: len(names)] / self.temperatures[task]
            classes.append([names[int(scaled.argmax())].encode()])
            probabilities.append([highest(scaled, self.links[task])])
        return pb_utils.InferenceResponse(
            output_tensors=[
                pb_utils.Tensor("class", np.array(classes, object)),
                pb_utils.Tensor("probability", np.array(probabilities, np.float32)),
            ]
        )


def highest(scaled: np.ndarray[Any, Any], link: str) -> float:
    """Return the highest probability, from logits (K,) divided by the temperature."""
    if link == "sigmoid":
        return float(1 / (1 + np.exp(-scaled.max())))
    weights = np.exp(scaled - scaled.max())
    return float(weights.max() / weights.sum())
