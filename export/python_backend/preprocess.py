"""Triton's Python backend: image files to the graph's pixels, task names to numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the preprocessing and the tasks' names."""
        # Imported here because Triton also imports this file to complete its configuration.
        from adavipro_fast.data.images import decode
        from adavipro_fast.method.preprocess import Preprocess, completed

        folder = Path(args["model_repository"], args["model_version"])
        about = json.loads((folder / "about.json").read_text())
        self.tasks, self.decode = about["tasks"], decode
        self.preprocess = Preprocess(**completed(about["preprocess"]))
        self.transform = self.preprocess.pixels()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request; an unreadable image fails only its own request."""
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        """Decode the image files (B, 1) of a request."""
        try:
            encoded = pb_utils.get_input_tensor_by_name(request, "encoded").as_numpy()
            images = [
                self.transform(self.decode(content, str(number), self.preprocess))
                for number, content in enumerate(encoded[:, 0])
            ]
            outputs = [pb_utils.Tensor("image", np.stack(images))]
            if self.tasks:
                named = pb_utils.get_input_tensor_by_name(request, "task").as_numpy()
                numbers = [[self.number(name)] for name in named[:, 0]]
                outputs.append(pb_utils.Tensor("number", np.array(numbers, np.int64)))
        except ValueError as error:
            reason = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=reason)
        return pb_utils.InferenceResponse(output_tensors=outputs)

    def number(self, name: bytes) -> int:
        """Return the number of a task.

        Raises:
            ValueError: there is no task of this name.
        """
        text = name.decode(errors="replace")
        if text not in self.tasks:
            raise ValueError(f"unknown task {text!r}; use one of {', '.join(self.tasks)}")
        return int(self.tasks.index(text))
