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
        """Read names and temperatures, a list for each task."""
        folder = Path(args["model_repository"], args["model_version"])
        about = json.loads((folder / "about.json").read_text())
        self.names, self.temperatures = about["class_names"], about["temperatures"]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request."""
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        """Say logits (B, K) of tasks (B, 1) in words."""
        logits = pb_utils.get_input_tensor_by_name(request, "logits").as_numpy()
        named = pb_utils.get_input_tensor_by_name(request, "task")
        tasks = np.zeros(len(logits), int) if named is None else named.as_numpy()[:, 0]
        classes, probabilities = [], []
        for row, task in zip(logits.astype(np.float64), tasks, strict=True):
            names = self.names[task]
            scaled = row[: len(names)] / self.temperatures[task]
            weights = np.exp(scaled - scaled.max())
            classes.append([names[int(weights.argmax())].encode()])
            probabilities.append([weights.max() / weights.sum()])
        return pb_utils.InferenceResponse(
            output_tensors=[
                pb_utils.Tensor("class", np.array(classes, object)),
                pb_utils.Tensor("probability", np.array(probabilities, np.float32)),
            ]
        )
