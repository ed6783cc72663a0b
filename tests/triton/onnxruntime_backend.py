"""A stand-in for Triton's ONNX Runtime backend, for machines that have its Python backend alone.

Follows https://github.com/triton-inference-server/onnxruntime_backend on the CPU: which file is
loaded, what a configuration must say of it, how requests become one run. Triton itself does the
rest: batching, labels, ensembles, versions, protocols.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

TYPES = {
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32",
    "tensor(bool)": "TYPE_BOOL",
}
LEVELS = {
    -1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}


class TritonPythonModel:
    """One instance of a model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the file and check the configuration against it."""
        config = json.loads(args["model_config"])
        if args["model_instance_kind"] != "CPU":
            raise pb_utils.TritonModelException("this stand-in runs KIND_CPU only")
        file = config["default_model_filename"] or "model.onnx"
        path = Path(args["model_repository"], args["model_version"], file)
        if path.is_dir():
            path /= "model.onnx"
        if not path.exists():
            raise pb_utils.TritonModelException(f"unable to find '{path}'")
        self.session = onnxruntime.InferenceSession(
            str(path), options(config), providers=["CPUExecutionProvider"]
        )
        check(config, self.session)
        self.batched = config["max_batch_size"] > 0
        self.inputs = [each.name for each in self.session.get_inputs()]
        self.outputs = [each["name"] for each in config["output"]]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Run a batch of requests at once; what fails, fails for all of them."""
        try:
            if not self.batched and len(requests) > 1:
                raise ValueError(f"{len(requests)} requests, the model takes no batches")
            rows = [self.arrays(request) for request in requests]
            feed = {name: np.concatenate([row[name] for row in rows]) for name in self.inputs}
            results = dict(zip(self.outputs, self.session.run(self.outputs, feed), strict=True))
        except Exception as error:  # ONNX Runtime's exceptions have no common public base.
            # One error object of several responses would be freed by the first.
            return [
                pb_utils.InferenceResponse(
                    error=pb_utils.TritonError(f"onnx runtime error: {error}")
                )
                for _ in requests
            ]
        answers, first = [], 0
        for request, row in zip(requests, rows, strict=True):
            following = first + len(row[self.inputs[0]])
            part = slice(first, following) if self.batched else slice(None)
            answers.append(answer(request, {name: a[part] for name, a in results.items()}))
            first = following
        return answers

    def arrays(self, request: Any) -> dict[str, Any]:
        """Return a request's inputs by name."""
        return {
            name: pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            for name in self.inputs
        }


def answer(request: Any, results: dict[str, Any]) -> Any:
    """Return the outputs that a request asks for."""
    wanted = request.requested_output_names()
    tensors = [pb_utils.Tensor(name, a) for name, a in results.items() if name in wanted]
    return pb_utils.InferenceResponse(output_tensors=tensors)


def options(config: dict[str, Any]) -> Any:
    """Read the settings of a session."""
    made = onnxruntime.SessionOptions()
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    made.graph_optimization_level = LEVELS.get(
        level, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    )
    parameters = config.get("parameters", {})
    for key, name in (("intra_op_thread_count", "intra"), ("inter_op_thread_count", "inter")):
        threads = int(parameters.get(key, {}).get("string_value", 0))
        if threads > 0:
            setattr(made, f"{name}_op_num_threads", threads)
    return made


def check(config: dict[str, Any], session: Any) -> None:
    """Refuse a configuration that Triton's own backend refuses: names, types and shapes."""
    name, batched = config["name"], config["max_batch_size"] > 0
    inputs = {each.name: each for each in session.get_inputs()}
    outputs = {each.name: each for each in session.get_outputs()}
    if len(config["input"]) != len(inputs):
        raise pb_utils.TritonModelException(
            f"unable to load model '{name}', configuration expects {len(config['input'])} inputs, "
            f"model provides {len(inputs)}"
        )
    for kind, known in (("input", inputs), ("output", outputs)):
        for tensor in config[kind]:
            if tensor["name"] not in known:
                raise pb_utils.TritonModelException(
                    f"unable to load model '{name}', unexpected {kind} '{tensor['name']}'; there "
                    f"are {', '.join(known)}"
                )
            fault = mismatch(tensor, known[tensor["name"]], batched, exact=kind == "output")
            if fault:
                raise pb_utils.TritonModelException(
                    f"unable to load model '{name}', {kind} '{tensor['name']}': {fault}"
                )


def mismatch(tensor: dict[str, Any], real: Any, batched: bool, *, exact: bool) -> str | None:
    """Say how a configured tensor differs from the file's."""
    if TYPES.get(real.type) != tensor["data_type"]:
        return f"configuration expects {tensor['data_type']}, model provides {real.type}"
    shape = [size if isinstance(size, int) else -1 for size in real.shape]
    dims = [int(size) for size in tensor.get("reshape", {"shape": tensor["dims"]})["shape"]]
    full = [-1, *dims] if batched else dims
    fits = len(full) == len(shape) and all(
        want == got or (got == -1 and not exact) for want, got in zip(full, shape, strict=True)
    )
    return None if fits else f"configuration expects {full}, model provides {shape}"
