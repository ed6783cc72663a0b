"""The exported modules in PyTorch: eager, as CUDA graphs, compiled, and with AOTInductor.

Their input is uint8 pixels. A row's base is the encoder alone in the same runtime.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adavipro_fast.export.graph import Form, Graph, deployed
from lib.rows import Chosen
from lib.subject import Outputs, Row, Subject
from lib.timing import graphed

FORMS = {
    "baseline": Form(input="uint8", baseline=True),
    "folded": Form(input="uint8"),
    "pixel": Form("pixel", input="uint8"),
}
RUNTIMES = ("deployed", "cuda_graph", "deployed_compiled", "aoti")
LARGEST_BATCH = 1024


def deployed_rows(
    subject: Subject, count: int, folder: Path, *, quick: bool, chosen: Chosen
) -> list[Row]:
    """Build the rows of every runtime and form; a form that fails becomes a row with the reason."""
    rows = []
    modules: dict[str, Graph] = {}
    for runtime, form in product(RUNTIMES, FORMS):
        contract = "encoder" if form == "baseline" else "prompt + encoder"
        row = Row(f"{runtime}_{form}", f"{runtime}_baseline", contract)
        if not chosen(row.name) or (form == "pixel" and runtime in ("deployed_compiled", "aoti")):
            continue
        if reason := obstacle(subject, runtime, quick=quick):
            rows.append(replace(row, skipped=reason))
            continue
        began = time.perf_counter()
        try:
            if form not in modules:
                modules[form] = module(subject, form)
            image = subject.sample[:count].to(subject.device)
            run = RUNNERS[runtime](modules[form], image, folder / f"{form}-{subject.precision}.pt2")
            work = outputs_of(run, modules[form])
            rows.append(replace(row, work=work, build_s=time.perf_counter() - began))
        except Exception as error:
            reason = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:600]}"
            rows.append(replace(row, skipped=reason))
    return rows


def obstacle(subject: Subject, runtime: str, *, quick: bool) -> str | None:
    """Return why a runtime is not measured; None if it is."""
    if runtime == "cuda_graph" and subject.device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    if quick and runtime in ("deployed_compiled", "aoti"):
        return "--quick: no compiled rows"
    return None


def module(subject: Subject, form: str) -> Graph:
    """Build a form in the subject's precision, on its device."""
    built = deployed([subject.model], replace(FORMS[form], precision=subject.precision))
    return built.eval().to(subject.device)


def outputs_of(run: Callable[[], Any], module: Graph) -> Callable[[], Outputs]:
    """Return a call that gives the runner's outputs by name."""

    @torch.inference_mode()
    def work() -> Outputs:
        return dict(zip(module.outputs, run(), strict=True))

    return work


def eagerly(module: Graph, image: Tensor, package: Path) -> Callable[[], Any]:
    """Return a call of the module in eager mode."""
    return lambda: module(image)


@torch.inference_mode()
def as_graph(module: Graph, image: Tensor, package: Path) -> Callable[[], Any]:
    """Capture the module for this batch as a CUDA graph; return its replay."""
    kept: dict[str, Any] = {}

    def once(_: int) -> None:
        kept["outputs"] = module(image)

    replay = graphed(once, image.device)

    def run() -> Any:
        replay()
        return kept["outputs"]

    return run


def compiled(module: Graph, image: Tensor, package: Path) -> Callable[[], Any]:
    """Compile the module for this batch, at the first call."""
    run = torch.compile(module, dynamic=False)
    return lambda: run(image)


def ahead_of_time(module: Graph, image: Tensor, package: Path) -> Callable[[], Any]:
    """Compile the module once to a package for batches of 1 to 1024, and load it."""
    if not package.exists():
        with torch.no_grad():
            example = tuple(part.to(image.device) for part in module.example())
            batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
            program = torch.export.export(module, example, dynamic_shapes=module.dynamic(batch))
            part = package.with_suffix(".part.pt2")
            torch._inductor.aoti_compile_and_package(program, package_path=str(part))
            part.replace(package)
    run = torch._inductor.aoti_load_package(str(package))
    return lambda: run(image)


RUNNERS: dict[str, Callable[[Graph, Tensor, Path], Callable[[], Any]]] = {
    "deployed": eagerly,
    "cuda_graph": as_graph,
    "deployed_compiled": compiled,
    "aoti": ahead_of_time,
}
