"""The rows of our own: PyTorch, ONNX files, engines, and the way from a JPEG to a class name."""

import io
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from adavipro_fast import AdaViPro
from adavipro_fast.artifact.description import Artifact
from adavipro_fast.artifact.tensorrt import EngineArtifact, compute_capability, runtime_module
from adavipro_fast.data.images import decode_image
from adavipro_fast.errors import VerificationError
from adavipro_fast.export import to_tensorrt
from adavipro_fast.method.prompt import fused_obstacle
from lib.paper_form import in_paper_form
from lib.peers import hugging_face_rows
from lib.subject import CLASS_NAMES, Outputs, Row, Subject, export

ONNX = ("baseline", "baseline_again", "pixel", "folded", "baseline_uint8", "folded_uint8")
QUICK = ("baseline", "baseline_again", "folded")
Run = Callable[[Tensor], Outputs]


@torch.inference_mode()
def torch_rows(subject: Subject, count: int, *, quick: bool) -> list[Row]:
    """Build the rows that PyTorch runs; `encoder_eager` is open_clip as it is."""
    model = subject.twin()
    images = model.prompt.normalised(subject.sample[:count].to(subject.device))
    fused = fused_obstacle(model.prompt.config)
    if subject.device.type != "cuda":
        fused = "the fused kernel needs a CUDA device"
    collapsed = AdaViPro(model.encoder, model.class_embeddings, model.prompt.config, kernel="plain")
    collapsed.prompt.load_state_dict(model.prompt.state_dict())
    collapsed = collapsed.eval().to(subject.device)

    def alone(x: Tensor) -> Outputs:
        return {"embedding": model.encoder(x)}

    def prompted(run: AdaViPro) -> Run:
        return lambda x: run(x)._asdict()

    row = partial(torch_row, images)
    no_compiled = "--quick: no compiled rows" if quick else None
    graphs = "CUDA graphs need a CUDA device" if subject.device.type != "cuda" else no_compiled
    return [
        row("encoder_eager", alone),
        row("paper_form_eager", prompted(in_paper_form(model))),
        row("collapsed_eager", prompted(collapsed)),
        row("fused", prompted(model), fused),
        row("encoder_compiled", torch.compile(alone), no_compiled),
        row("compiled", torch.compile(prompted(collapsed)), no_compiled),
        row("compiled_cuda_graph", torch.compile(prompted(model), mode="reduce-overhead"), graphs),
        *hugging_face_rows(model.encoder, images, precision=subject.precision, compiled=not quick),
    ]


def torch_row(images: Tensor, name: str, run: Run, skipped: str | None = None) -> Row:
    """Build a row that runs on normalised images (B, 3, S, S), or say why there is none."""
    base = "encoder_compiled" if "compiled" in name else "encoder_eager"
    row = Row(name, base, "encoder" if name == base else "prompt + encoder")
    if skipped:
        return replace(row, skipped=skipped)
    return replace(row, work=torch.inference_mode()(lambda: run(images)))


def onnx_rows(subject: Subject, count: int, folder: Path, *, quick: bool) -> list[Row]:
    """Build the rows that read exported ONNX files."""
    rows = []
    pixels = subject.sample[:count].to(subject.device)
    for name in ONNX:
        base = "onnx_baseline_uint8" if name.endswith("uint8") else "onnx_baseline"
        contract = "encoder" if name.startswith("baseline") else "prompt + encoder"
        row = Row(f"onnx_{name}", base, contract)
        if quick and name not in QUICK:
            rows.append(replace(row, skipped=f"--quick: no {name} row"))
            continue
        began = time.perf_counter()
        artifact = export(subject, name, folder)
        if isinstance(artifact, str):
            rows.append(replace(row, skipped=artifact))
            continue
        work = partial(artifact.run, artifact.about.image(pixels))
        rows.append(replace(row, work=work, build_s=time.perf_counter() - began))
    return rows


def pipeline_rows(subject: Subject, count: int, folder: Path, *, quick: bool) -> list[Row]:
    """Build the rows from JPEG bytes to a class name, one image at a time."""
    stored = io.BytesIO()
    Image.fromarray(subject.sample[0].permute(1, 2, 0).numpy()).save(stored, "JPEG", quality=95)
    content = stored.getvalue()
    transform = subject.model.encoder.preprocess.pixels()
    base, rows = "pipeline_onnx_baseline_uint8", []
    for name in ("baseline_uint8", "folded_uint8"):
        row = Row(f"pipeline_onnx_{name}", base, "pipeline")
        reason = "--quick: no pipeline" if quick else ""
        if count > 1:
            reason = "the pipeline takes one image at a time"
        artifact = reason or export(subject, name, folder)
        if isinstance(artifact, str):
            rows.append(replace(row, skipped=artifact))
            continue
        classify = partial(class_name, artifact, content, transform)
        expected = expected_name(subject, content, prompted=name.startswith("folded"))
        if (got := classify()["class"]) != expected:
            raise VerificationError(f"{row.name}: {got}, {expected} is right")
        rows.append(replace(row, work=classify))
    return rows


def class_name(artifact: Artifact, content: bytes, transform: Callable[..., Any]) -> dict[str, Any]:
    """Run the whole pipeline: JPEG bytes to the name of the likeliest class."""
    image = decode_image(content, "bench", artifact.about.preprocess)
    pixels = torch.from_numpy(transform(image))
    logits = artifact(pixels[None]).logits
    return {"class": artifact.about.class_names[int(logits[0].argmax())]}


@torch.inference_mode()
def expected_name(subject: Subject, content: bytes, *, prompted: bool) -> str:
    """Return what PyTorch in fp32 answers to a JPEG."""
    preprocess = subject.model.encoder.preprocess
    image = decode_image(content, "bench", preprocess)
    pixels = torch.from_numpy(preprocess.pixels()(image))[None]
    if prompted:
        logits = subject.model(pixels).logits
    else:
        images = subject.model.prompt.normalised(pixels)
        logits = subject.model.classify(images, torch.zeros(())).logits
    return CLASS_NAMES[int(logits[0].argmax())]


def engine_rows(subject: Subject, count: int, folder: Path) -> list[Row]:
    """Build the rows of TensorRT and TensorRT-RTX, from uint8 files; pixels go to the device."""
    rows = []
    for runtime in ("tensorrt", "tensorrt-rtx"):
        prefix = runtime.replace("-", "_")
        for name in ("baseline", "folded"):
            contract = "encoder" if name == "baseline" else "prompt + encoder"
            row = Row(f"{prefix}_{name}", f"{prefix}_baseline", contract)
            path = folder / f"{name}_uint8.onnx"
            rows.append(engine_row(subject, row, path, runtime=runtime, count=count))
    return rows


def engine_row(subject: Subject, row: Row, path: Path, *, runtime: str, count: int) -> Row:
    """Build an engine of an ONNX file for this GPU, or say what keeps it from running."""
    if compute_capability() is None:
        return replace(row, skipped="running an engine needs a CUDA device")
    try:
        runtime_module(runtime)
    except ImportError as error:
        return replace(row, skipped=str(error))
    began = time.perf_counter()
    artifact = export(subject, path.stem, path.parent)
    if isinstance(artifact, str):
        return replace(row, skipped=artifact)
    built = path.with_name(f"{row.name}-{count}.engine")
    to_tensorrt.command(
        to_tensorrt.TensorRtConfig(
            path,
            built,
            runtime="tensorrt" if runtime == "tensorrt" else "tensorrt-rtx",
            batch=f"{count},{count},{count}",
        )
    )
    engine, pixels = EngineArtifact.open(built), subject.sample[:count]
    return replace(row, work=lambda: engine(pixels)._asdict(), build_s=time.perf_counter() - began)
