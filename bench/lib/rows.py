"""Our own rows: PyTorch, ONNX files, engines, and the pipeline from a JPEG to a class name."""

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
from adavipro_fast.artifact.onnx import OnnxArtifact
from adavipro_fast.artifact.tensorrt import EngineArtifact, compute_capability, runtime_module
from adavipro_fast.data.images import decode, decode_image, unresized
from adavipro_fast.errors import VerificationError
from adavipro_fast.export import to_tensorrt
from adavipro_fast.method.config import Runtime
from adavipro_fast.method.prompt import fused_obstacle
from lib.paper_form import in_paper_form
from lib.peers import hugging_face_rows
from lib.subject import CLASS_NAMES, Outputs, Row, Subject, export, obstacle, written

FILES: dict[Runtime, tuple[str, ...]] = {
    "onnxruntime": (
        *("baseline", "baseline_again", "pixel", "folded", "baseline_uint8", "folded_uint8"),
        *("baseline_int8", "folded_int8"),
    ),
    "openvino": (
        *("baseline", "folded", "baseline_uint8", "folded_uint8", "baseline_int8", "folded_int8"),
    ),
}
PREFIXES: dict[Runtime, str] = {"onnxruntime": "onnx", "openvino": "openvino"}
QUICK = ("baseline", "baseline_again", "folded")
# Width and height of a pipeline's pictures, enlarged: typical of the web and of a camera.
PICTURES = {"": (500, 375), "_12_mp": (4000, 3000)}
Run = Callable[[Tensor], Outputs]
Chosen = Callable[[str], bool]


def chosen_by(prefixes: tuple[str, ...]) -> Chosen:
    """Return a filter of rows by the prefixes of their names; without prefixes, all pass."""
    return lambda name: not prefixes or name.startswith(prefixes)


@torch.inference_mode()
def torch_rows(subject: Subject, count: int, *, quick: bool) -> list[Row]:
    """Build the rows of PyTorch; `open_clip` is the encoder with open_clip's attention."""
    model = subject.twin()
    images = model.prompt.normalised(subject.sample[:count].to(subject.device))
    fused = fused_obstacle(model.prompt.config)
    if subject.device.type != "cuda":
        fused = "the fused kernel needs a CUDA device"
    collapsed = AdaViPro(model.encoder, model.head.rows, model.prompt.config, kernel="plain")
    collapsed.prompt.load_state_dict(model.prompt.state_dict())
    collapsed = collapsed.eval().to(subject.device)

    def alone(x: Tensor) -> Outputs:
        return {"embedding": model.encoder(x)}

    def prompted(run: AdaViPro) -> Run:
        return lambda x: run(x)._asdict()

    original = subject.twin(lean=False).encoder

    def stock(x: Tensor) -> Outputs:
        return {"embedding": original(x)}

    row = partial(torch_row, images)
    # Static shapes: compile again for each batch size.
    compiled = partial(torch.compile, dynamic=False)
    no_compiled = "--quick: no compiled rows" if quick else None
    graphs = "CUDA graphs need a CUDA device" if subject.device.type != "cuda" else no_compiled
    return [
        row("encoder_eager", alone),
        row("paper_form_eager", prompted(in_paper_form(model))),
        row("collapsed_eager", prompted(collapsed)),
        row("fused", prompted(model), fused),
        row("encoder_compiled", compiled(alone), no_compiled),
        row("compiled", compiled(prompted(collapsed)), no_compiled),
        row("compiled_cuda_graph", torch.compile(prompted(model), mode="reduce-overhead"), graphs),
        replace(row("open_clip_eager", stock), peer=True),
        replace(row("open_clip_compiled", compiled(stock), no_compiled), peer=True),
        *hugging_face_rows(model.encoder, images, precision=subject.precision, compiled=not quick),
    ]


def torch_row(images: Tensor, name: str, run: Run, skipped: str | None = None) -> Row:
    """Build a row for normalised images (B, 3, S, S), or a skipped row with the reason."""
    base = "encoder_compiled" if "compiled" in name else "encoder_eager"
    alone = name == base or name.startswith("open_clip")
    row = Row(name, base, "encoder" if alone else "prompt + encoder")
    if skipped:
        return replace(row, skipped=skipped)
    return replace(row, work=torch.inference_mode()(lambda: run(images)))


def file_rows(
    subject: Subject, count: int, folder: Path, *, quick: bool, chosen: Chosen
) -> list[Row]:
    """Build the rows of exported ONNX files, in each runtime.

    All files are written before any is opened: sessions opened between exports ran up to 9 % slower
    than the first one, depending on the memory that was left to them.
    """
    rows = [
        (name, runtime)
        for runtime, names in FILES.items()
        for name in names
        if chosen(f"{PREFIXES[runtime]}_{name}")
    ]
    for name, runtime in rows:
        if not (skipped_by_quick(name, runtime, quick=quick) or obstacle(subject, name, runtime)):
            written(subject, name, folder)
    return [file_row(subject, name, count, folder, runtime, quick=quick) for name, runtime in rows]


def skipped_by_quick(name: str, runtime: Runtime, *, quick: bool) -> bool:
    """Report whether --quick leaves a file out."""
    return quick and (name not in QUICK or runtime == "openvino")


def file_row(
    subject: Subject, name: str, count: int, folder: Path, runtime: Runtime, *, quick: bool
) -> Row:
    """Build the row of one file in one runtime, or a skipped row with the reason."""
    prefix = PREFIXES[runtime]
    kind, _, ending = name.removesuffix("_again").partition("_")
    row = Row(
        f"{prefix}_{name}",
        "_".join(filter(None, (prefix, "baseline", ending))),
        "encoder" if kind == "baseline" else "prompt + encoder",
        int8=ending == "int8",
        other=f"{prefix}_{kind}_uint8" if ending == "int8" else "",
    )
    if skipped_by_quick(name, runtime, quick=quick):
        return replace(row, skipped=f"--quick: no {row.name} row")
    began = time.perf_counter()
    artifact = export(subject, name, folder, runtime)
    if isinstance(artifact, str):
        return replace(row, skipped=artifact)
    image = artifact.about.image(subject.sample[:count].to(subject.device))
    return replace(row, work=partial(artifact.run, image), build_s=time.perf_counter() - began)


def pipeline_rows(subject: Subject, count: int, folder: Path, *, quick: bool) -> list[Row]:
    """Build the rows from JPEG bytes to a class name, one image at a time.

    Files whose input is `any` resize in the graph, the others before it.
    """
    rows = []
    transform = subject.model.preprocess.pixels()
    for ending, size in PICTURES.items():
        stored = io.BytesIO()
        picture = Image.fromarray(subject.sample[0].permute(1, 2, 0).numpy())
        picture.resize(size, Image.Resampling.BICUBIC).save(stored, "JPEG", quality=95)
        for name in ("baseline_uint8", "folded_uint8", "folded_any"):
            base = "folded_uint8" if name == "folded_any" else "baseline_uint8"
            row = Row(f"pipeline_onnx_{name}{ending}", f"pipeline_onnx_{base}{ending}", "pipeline")
            reason = "--quick: no pipeline" if quick else ""
            if count > 1:
                reason = "the pipeline takes one image at a time"
            artifact = reason or export(subject, name, folder)
            if not isinstance(artifact, OnnxArtifact):
                rows.append(replace(row, skipped=str(artifact)))
                continue
            content = stored.getvalue()
            classify = partial(class_name, artifact, content, transform)
            expected = expected_name(subject, content, prompted=name.startswith("folded"))
            if (got := classify()["class"]) != expected:
                raise VerificationError(f"{row.name}: {got}, {expected} is right")
            rows.append(replace(row, work=classify))
    return rows


def class_name(
    artifact: OnnxArtifact, content: bytes, transform: Callable[..., Any]
) -> dict[str, Any]:
    """Run the complete pipeline: JPEG bytes to the name of the likeliest class."""
    about = artifact.about
    if about.input == "any":
        pixels = unresized(decode_image(content, "bench", about.preprocess))
    else:
        pixels = torch.from_numpy(transform(decode(content, "bench", about.preprocess)))[None]
    logits = artifact.run(pixels.to(artifact.device))["logits"]
    return {"class": about.class_names[int(logits[0].argmax())]}


@torch.inference_mode()
def expected_name(subject: Subject, content: bytes, *, prompted: bool) -> str:
    """Return the class name that PyTorch in fp32 predicts for a JPEG."""
    preprocess = subject.model.encoder.preprocess
    pixels = torch.from_numpy(preprocess.pixels()(decode(content, "bench", preprocess)))[None]
    if prompted:
        logits = subject.model(pixels).logits
    else:
        images = subject.model.prompt.normalised(pixels)
        logits = subject.model.classify(images, torch.zeros(())).logits
    return CLASS_NAMES[int(logits[0].argmax())]


def engine_rows(subject: Subject, count: int, folder: Path) -> list[Row]:
    """Build the rows of TensorRT and TensorRT-RTX from uint8 files, with the copy to the GPU."""
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
    """Build an engine of an ONNX file for this GPU, or a skipped row with the reason."""
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
