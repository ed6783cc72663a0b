"""What the prompt costs at inference: latency of every runtime, beside its encoder alone.

    python bench/latency.py --batch 1 --batch 16 --json FILE

Rows are interleaved in one process, each only after it gave the right answer. A row's ratio is to
the encoder alone in the same runtime, with its 95 % interval; `onnx_baseline_again` is that encoder
a second time and shows the noise. Three timing contracts: `encoder` and `prompt + encoder` start
from the graph's input in memory, `pipeline` starts from JPEG bytes and ends with class names.
"""

import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from measure import (
    draw,
    paired_ratio,
    peak_device_mib,
    percentiles,
    publish,
    ratio_interval,
    until_steady,
)
from peers import Outputs, Row, hugging_face_rows, in_paper_form, openvino_row, plain_onnx_rows
from PIL import Image
from torch import Tensor

from adavipro_fast import AdaViPro, PromptConfig, cli, load_encoder
from adavipro_fast.artifact.description import Artifact
from adavipro_fast.artifact.onnx import OnnxArtifact
from adavipro_fast.artifact.tensorrt import EngineArtifact, compute_capability, runtime_module
from adavipro_fast.data.images import decode_image
from adavipro_fast.device import full_fp32, torch_device
from adavipro_fast.errors import VerificationError
from adavipro_fast.export import graph as onnx_graph
from adavipro_fast.export import to_onnx, to_tensorrt, verify
from adavipro_fast.export.encoder import folding_obstacle
from adavipro_fast.export.fold import deployed
from adavipro_fast.export.to_onnx import Graph
from adavipro_fast.files.checkpoint import checkpoint_of
from adavipro_fast.method.config import DTYPES, Precision
from adavipro_fast.method.model import Prediction
from adavipro_fast.method.prompt import fused_obstacle

CLASS_NAMES = tuple(f"class {number}" for number in range(10))
ONNX = ("baseline", "baseline_again", "pixel", "folded", "baseline_uint8", "folded_uint8")
QUICK, QUICK_S = ("baseline", "baseline_again", "folded"), 10.0
# The first one that divides the image's side is taken.
REGIONS = (32, 56, 16, 8)


@dataclass(frozen=True)
class LatencyConfig:
    """Time inference with and without the prompt in every runtime at hand."""

    model: str = "ViT-B-32"
    """open_clip name (random weights without --pretrained), local-dir:PATH, or demo"""
    pretrained: str = ""
    """open_clip tag or path of the weights"""
    batch: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """images per call; repeatable (default: 1)"""
    precision: Precision = "fp32"
    """of the encoder"""
    seconds: float = 180.0
    """longest time to measure a batch size for; it ends earlier when medians are within 2 %"""
    quick: bool = False
    """under a minute: no compiled, pixel, uint8, pipeline or peer rows, fewer calls"""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    json: Path | None = None
    """file for the rows"""
    plot: Path | None = None
    """picture of the rows, PNG or SVG"""


class Subject:
    """The model under test, its images, and the answers that every row must give."""

    def __init__(self, config: LatencyConfig) -> None:
        torch.manual_seed(0)
        self.config, self.device = config, torch_device(config.device)
        encoder = load_encoder(config.model, config.pretrained)
        side = encoder.preprocess.size
        with torch.inference_mode():
            width = encoder(torch.zeros(1, 3, side, side)).shape[1]
        classes = F.normalize(torch.randn(len(CLASS_NAMES), width), dim=-1)
        prompt = PromptConfig(
            edge="laplacian-magnitude",
            edge_padding="replicate",
            generator_init="avoid-edges",
            region_size=next(region for region in REGIONS if side % region == 0),
        )
        self.model = AdaViPro(encoder, classes, prompt, kernel="plain").eval()
        sample = torch.cat(verify.sample_batches(encoder.preprocess, None))
        self.model.prompt.initialise(sample)
        self.sample = sample[torch.arange(max(batches(config))) % len(sample)]
        with torch.inference_mode():
            self.expected: Prediction = self.model(self.sample)
            self.plain = encoder(self.model.prompt.normalised(self.sample))
        self.near = verify.ties(self.model, self.sample)

    def twin(self) -> AdaViPro:
        """Return the model in the precision and on the device under test."""
        model = AdaViPro(
            self.model.encoder.with_(precision=self.config.precision),
            self.model.class_embeddings,
            self.model.prompt.config,
            kernel="auto",
        )
        model.prompt.load_state_dict(self.model.prompt.state_dict())
        return model.eval().to(self.device)

    def checked(self, row: Row, count: int) -> Row:
        """Call a row once, and let it pass if it gives the right answer on the first images.

        Raises:
            VerificationError: it computes something else.
        """
        if row.work is None or row.contract == "pipeline":
            return row
        began = time.perf_counter()
        outputs = {name: value.cpu() for name, value in row.work().items()}
        first_s = time.perf_counter() - began
        prompted = row.contract == "prompt + encoder"
        expected = (self.expected.embedding if prompted else self.plain)[:count]
        got = outputs["embedding"].float()
        error = (got - expected).abs().max().item()
        cosine = F.cosine_similarity(got, expected, dim=-1).min().item()
        if self.config.precision == "fp32" and not error <= verify.LARGEST_ERROR_FP32:
            raise VerificationError(f"{row.name}: embeddings differ by {error:.1e}")
        least = verify.SMALLEST_COSINE if self.config.precision != "bf16" else 0.999
        if not cosine >= least:
            raise VerificationError(f"{row.name}: the worst cosine is {cosine:.6f}")
        if prompted:
            wrong = (outputs["mask"] != self.expected.mask[:count]) & ~self.near[:count]
            if wrong.any():
                raise VerificationError(f"{row.name}: {int(wrong.sum())} regions differ")
        return replace(row, build_s=row.build_s + first_s)


def batches(config: LatencyConfig) -> tuple[int, ...]:
    """Return the batch sizes to measure."""
    return config.batch or (1,)


@torch.inference_mode()
def torch_rows(subject: Subject, count: int) -> list[Row]:
    """Build the rows that PyTorch runs; `encoder_eager` is open_clip as it is."""
    model, config = subject.twin(), subject.config
    images = model.prompt.normalised(subject.sample[:count].to(subject.device))
    fused = fused_obstacle(model.prompt.config)
    if subject.device.type != "cuda":
        fused = "the fused kernel needs a CUDA device"
    collapsed = AdaViPro(model.encoder, model.class_embeddings, model.prompt.config, kernel="plain")
    collapsed.prompt.load_state_dict(model.prompt.state_dict())
    collapsed = collapsed.eval().to(subject.device)

    def alone(x: Tensor) -> Outputs:
        return {"embedding": model.encoder(x)}

    def prompted(run: AdaViPro) -> Callable[[Tensor], Outputs]:
        return lambda x: run(x)._asdict()

    def row(name: str, run: Callable[[Tensor], Outputs], skipped: str | None = None) -> Row:
        base = "encoder_compiled" if "compiled" in name else "encoder_eager"
        contract = "encoder" if name == base else "prompt + encoder"
        if skipped:
            return Row(name, base, contract, skipped=skipped)
        return Row(name, base, contract, torch.inference_mode()(lambda: run(images)))

    quick = "--quick: no compiled rows" if config.quick else None
    graphs = "CUDA graphs need a CUDA device" if subject.device.type != "cuda" else quick
    return [
        row("encoder_eager", alone),
        row("paper_form_eager", prompted(in_paper_form(model))),
        row("collapsed_eager", prompted(collapsed)),
        row("fused", prompted(model), fused),
        row("encoder_compiled", torch.compile(alone), quick),
        row("compiled", torch.compile(prompted(collapsed)), quick),
        row("compiled_cuda_graph", torch.compile(prompted(model), mode="reduce-overhead"), graphs),
        *hugging_face_rows(
            model.encoder, images, precision=config.precision, compiled=not config.quick
        ),
    ]


def export(subject: Subject, name: str, folder: Path) -> OnnxArtifact | str:
    """Export one ONNX row; return the reason where it cannot be run."""
    kind = name.removesuffix("_uint8").removesuffix("_again")
    config = subject.config
    if config.precision == "bf16" and subject.device.type == "cpu":
        return "ONNX Runtime's CPU provider cannot run bf16"
    foldable = folding_obstacle(subject.model.encoder.visual) is None
    if kind == "folded" and not foldable:
        return "this encoder cannot be folded"
    path = folder / f"{name.removesuffix('_again')}.onnx"
    checkpoint = folder / "checkpoint.safetensors"
    if not path.exists():
        stored = checkpoint_of(subject.model, CLASS_NAMES)
        stored.save(checkpoint)
        wanted = to_onnx.OnnxConfig(
            checkpoint,
            path,
            precision=config.precision,
            input="uint8" if name.endswith("uint8") else "float32",
            baseline=kind == "baseline",
        )
        module = deployed(
            subject.model,
            folded=foldable and kind != "pixel",
            dtype=DTYPES[config.precision],
            uint8=wanted.input == "uint8",
            baseline=wanted.baseline,
        )
        form: Graph = "folded" if kind == "folded" else "pixel"
        about = to_onnx.describe(stored, wanted, form) | {"baseline": wanted.baseline}
        opset = to_onnx.OPSETS[config.precision]
        side = subject.model.preprocess.size
        onnx_graph.write(module, path, side=side, opset=opset, metadata=about)
    return OnnxArtifact.open(path, str(subject.device))


def onnx_rows(subject: Subject, count: int, folder: Path) -> list[Row]:
    """Build the rows that read exported ONNX files."""
    rows = []
    pixels = subject.sample[:count].to(subject.device)
    for name in ONNX:
        base = "onnx_baseline_uint8" if name.endswith("uint8") else "onnx_baseline"
        contract = "encoder" if name.startswith("baseline") else "prompt + encoder"
        row = Row(f"onnx_{name}", base, contract)
        if subject.config.quick and name not in QUICK:
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


def peer_rows(subject: Subject, count: int, folder: Path) -> list[Row]:
    """Build the rows of a plain export, and of OpenVINO on our files."""
    images = subject.model.prompt.normalised(subject.sample[:count]).to(subject.device)
    if subject.config.quick:
        names = ("onnx_plain_encoder", "onnx_paper_form", "openvino_baseline", "openvino_folded")
        return [Row(name, name, "", skipped="--quick: no peer rows") for name in names]
    rows = plain_onnx_rows(subject.twin(), images, folder)
    for name in ("baseline", "folded"):
        path = folder / f"{name}.onnx"
        if path.exists() and subject.config.precision == "fp32":
            rows.append(openvino_row(name, path, images))
        else:
            reason = "OpenVINO is measured on folded fp32 files only"
            rows.append(Row(f"openvino_{name}", "openvino_baseline", "", skipped=reason))
    return rows


def pipeline_rows(subject: Subject, count: int, folder: Path) -> list[Row]:
    """Build the rows from JPEG bytes to a class name, one image at a time."""
    stored = io.BytesIO()
    Image.fromarray(subject.sample[0].permute(1, 2, 0).numpy()).save(stored, "JPEG", quality=95)
    content = stored.getvalue()
    transform = subject.model.encoder.preprocess.pixels()
    base, rows = "pipeline_onnx_baseline_uint8", []
    for name in ("baseline_uint8", "folded_uint8"):
        row = Row(f"pipeline_onnx_{name}", base, "pipeline")
        reason = "--quick: no pipeline" if subject.config.quick else ""
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
            rows.append(engine_row(subject, row, f"{name}_uint8", runtime, count, folder))
    return rows


def engine_row(
    subject: Subject, row: Row, name: str, runtime: str, count: int, folder: Path
) -> Row:
    """Build an engine of an ONNX file for this GPU, or say what keeps it from running."""
    if compute_capability() is None:
        return replace(row, skipped="running an engine needs a CUDA device")
    try:
        runtime_module(runtime)
    except ImportError as error:
        return replace(row, skipped=str(error))
    began = time.perf_counter()
    artifact = export(subject, name, folder)
    if isinstance(artifact, str):
        return replace(row, skipped=artifact)
    path = folder / f"{row.name}-{count}.engine"
    to_tensorrt.command(
        to_tensorrt.TensorRtConfig(
            folder / f"{name}.onnx",
            path,
            runtime="tensorrt" if runtime == "tensorrt" else "tensorrt-rtx",
            batch=f"{count},{count},{count}",
        )
    )
    engine, pixels = EngineArtifact.open(path), subject.sample[:count]
    return replace(row, work=lambda: engine(pixels)._asdict(), build_s=time.perf_counter() - began)


def time_rows(subject: Subject, rows: list[Row], count: int) -> list[dict[str, Any]]:
    """Check every row, then time all of them in turn."""
    rows = [subject.checked(row, count) for row in rows]
    works = {row.name: row.work for row in rows if row.work is not None}
    seconds = QUICK_S if subject.config.quick else subject.config.seconds
    bases = {row.name: row.base for row in rows if row.name in works and row.base in works}
    times = until_steady(works, subject.device, seconds=seconds, bases=bases)
    result = []
    for row in rows:
        told: dict[str, Any] = {"name": row.name, "batch": count}
        if row.name not in times:
            result.append(told | {"skipped": row.skipped})
            continue
        told |= {"contract": row.contract, **percentiles(times[row.name])}
        told |= {"ms_per_image": told["p50_ms"] / count}
        if row.name in bases:
            low, high = ratio_interval(times[row.name], times[row.base])
            told |= {
                "base": row.base,
                "ratio": paired_ratio(times[row.name], times[row.base]),
                "ratio_low": low,
                "ratio_high": high,
            }
        told |= {"build_s": row.build_s}
        if subject.device.type == "cuda":
            told |= {"peak_device_mib": peak_device_mib(works[row.name], subject.device)}
        result.append(told)
    return result


def main() -> None:
    """Parse, check, measure, print."""
    config = cli.parse(LatencyConfig)
    cli.run(lambda: command(config))


@full_fp32()
def command(config: LatencyConfig) -> dict[str, Any]:
    """Measure all rows at all batch sizes.

    Raises:
        VerificationError: a row computes something else; nothing is timed.
    """
    if min(batches(config)) < 1:
        raise ValueError(f"batch {min(batches(config))} is below 1")
    subject = Subject(config)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in batches(config):
            built = [
                *torch_rows(subject, count),
                *onnx_rows(subject, count, folder),
                *peer_rows(subject, count, folder),
                *pipeline_rows(subject, count, folder),
                *engine_rows(subject, count, folder),
            ]
            rows += time_rows(subject, built, count)
    if config.plot is not None:
        label = "median latency, ms per image; ratio to the encoder alone in the same runtime"
        draw(rows, config.plot, value="ms_per_image", label=label)
    title = f"latency: {config.model}, {config.precision}, {subject.device}"
    hidden = ("contract", "base", "calls", "ms_per_image")
    return publish(rows, subject.device, config.json, title, hidden)


if __name__ == "__main__":
    main()
