"""ONNX Runtime on tensors that stay on a GPU: plain, and as its own CUDA graph.

Rows `onnx_bound_*` and `onnx_graph_*`. A session is first opened with all nodes required to run on
the GPU; if that fails, the row allows nodes on the CPU and notes the reason.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adavipro_fast.artifact.onnx import session_options
from lib.rows import Chosen
from lib.subject import Outputs, Row, Subject, write

TYPES: dict[str, tuple[torch.dtype, Any]] = {
    "tensor(float)": (torch.float32, np.float32),
    "tensor(float16)": (torch.float16, np.float16),
    "tensor(int32)": (torch.int32, np.int32),
}


def bound_rows(
    subject: Subject, count: int, folder: Path, *, quick: bool, chosen: Chosen
) -> list[Row]:
    """Build the rows from the uint8 files."""
    rows = []
    for kind, form in product(("bound", "graph"), ("baseline", "folded")):
        contract = "encoder" if form == "baseline" else "prompt + encoder"
        row = Row(f"onnx_{kind}_{form}", f"onnx_{kind}_baseline", contract)
        if not chosen(row.name):
            continue
        reason = "tensors that stay on a GPU need a CUDA device"
        if subject.device.type == "cuda":
            reason = "--quick: no such row" if quick else ""
        if kind == "graph" and count > 16:
            reason = reason or "a graph saves the host's time, which a large batch hides"
        if reason:
            rows.append(replace(row, skipped=reason))
            continue
        try:
            rows.append(bound_row(subject, row, count, folder / f"{form}_uint8.onnx"))
        except Exception as error:
            reason = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:600]}"
            rows.append(replace(row, skipped=reason))
    return rows


def bound_row(subject: Subject, row: Row, count: int, path: Path) -> Row:
    """Open a file and bind its tensors."""
    began = time.perf_counter()
    if not path.exists():
        write(subject, path)
    graph, note = "graph" in row.name, "all nodes on the GPU"
    try:
        session = opened(subject, path, strict=True, graph=graph)
    except Exception as error:
        note = f"some nodes on the CPU: {' '.join(str(error).split())[:300]}"
        session = opened(subject, path, strict=False, graph=graph)
    work = bound(session, subject, count)
    return replace(row, work=work, note=note, build_s=time.perf_counter() - began)


def opened(subject: Subject, path: Path, *, strict: bool, graph: bool) -> Any:
    """Open a session on the subject's GPU.

    Raises:
        RuntimeError: the CUDA provider does not run it.
    """
    import onnxruntime

    options = session_options(subject.precision)
    if strict:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    cuda = {"device_id": subject.device.index or 0, "use_tf32": "0"}
    cuda |= {"enable_cuda_graph": "1"} if graph else {}
    provider = ("CUDAExecutionProvider", cuda)
    session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise RuntimeError(f"{session.get_providers()} run it")
    return session


def bound(session: Any, subject: Subject, count: int, place: str = "cuda") -> Callable[[], Outputs]:
    """Bind input and outputs to tensors, and return a call that waits for the result."""
    device = subject.device
    image = subject.sample[:count].to(device).contiguous()
    binding, number = session.io_binding(), device.index or 0
    binding.bind_input("image", place, number, np.uint8, tuple(image.shape), image.data_ptr())
    outputs = {}
    for output in session.get_outputs():
        shape = [part if isinstance(part, int) else count for part in output.shape]
        kind, named = TYPES[output.type]
        tensor = outputs[output.name] = torch.zeros(shape, dtype=kind, device=device)
        binding.bind_output(output.name, place, number, named, tuple(shape), tensor.data_ptr())
    if device.type == "cuda":
        torch.cuda.synchronize(device)

    def run() -> Outputs:
        # Refer to the image here, so that its memory lives as long as the binding.
        assert image.data_ptr()
        session.run_with_iobinding(binding)
        return outputs

    return run
