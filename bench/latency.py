"""What the prompt costs at inference: latency of every runtime, beside its encoder alone.

    python bench/latency.py --batch 1 --batch 16 --json bench/results/latency-cpu.json

Rows are interleaved in one process, each only after it gave the right answer. A row's ratio is to
the encoder alone in the same runtime, with its 95 % interval; `onnx_baseline_again` is that encoder
a second time and shows the noise. Three timing contracts: `encoder` and `prompt + encoder` start
from the graph's input in memory, `pipeline` starts from JPEG bytes and ends with class names.
"""

import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from measure import paired_ratio, percentiles, publish, ratio_interval, until_steady
from PIL import Image
from torch import Tensor
from training import PaperForm

from adavipro_fast import AdaViPro, PromptConfig, cli, load_encoder
from adavipro_fast.artifact import OnnxArtifact, torch_device
from adavipro_fast.checkpoint import checkpoint_of
from adavipro_fast.clip import DTYPES, Precision
from adavipro_fast.data import decode_image
from adavipro_fast.engine import compute_capability
from adavipro_fast.export import to_onnx, verify
from adavipro_fast.export.fold import Deployed, folding_obstacle
from adavipro_fast.prompt import Prediction, fused_obstacle

CLASS_NAMES = tuple(f"class {number}" for number in range(10))
ONNX = ("baseline", "baseline_again", "pixel", "folded", "baseline_uint8", "folded_uint8")
ENGINES = ("tensorrt_baseline", "tensorrt_folded", "tensorrt_rtx_baseline", "tensorrt_rtx_folded")
Outputs = dict[str, Tensor]


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
    seconds: float = 90.0
    """longest time to measure a batch size for; it ends earlier when medians are within 2 %"""
    quick: bool = False
    """under a minute: no compiled rows, no pipeline, fewer calls"""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    json: Path | None = None
    """file for the rows"""
    plot: Path | None = None
    """picture of the rows, PNG or SVG"""


@dataclass(frozen=True)
class Row:
    """A variant ready to be timed, or the reason why it cannot be."""

    name: str
    base: str
    contract: str
    work: Callable[[], Outputs] | None = None
    skipped: str = ""


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
            edge="laplacian-magnitude", edge_padding="replicate", generator_init="avoid-edges"
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
            self.model.encoder.in_precision(self.config.precision),
            self.model.class_embeddings,
            self.model.prompt.config,
            kernel="auto",
        )
        model.prompt.load_state_dict(self.model.prompt.state_dict())
        return model.eval().to(self.device)

    def check(self, row: Row, count: int) -> None:
        """Raise VerificationError unless a row gives the right answer on the first images."""
        assert row.work is not None
        outputs = {name: value.cpu() for name, value in row.work().items()}
        prompted = "mask" in outputs
        expected = (self.expected.embedding if prompted else self.plain)[:count]
        got = outputs["embedding"].float()
        error = (got - expected).abs().max().item()
        cosine = F.cosine_similarity(got, expected, dim=-1).min().item()
        if self.config.precision == "fp32" and not error <= verify.LARGEST_ERROR_FP32:
            raise cli.VerificationError(f"{row.name}: embeddings differ by {error:.1e}")
        least = verify.SMALLEST_COSINE if self.config.precision != "bf16" else 0.999
        if not cosine >= least:
            raise cli.VerificationError(f"{row.name}: the worst cosine is {cosine:.6f}")
        if prompted:
            wrong = (outputs["mask"] != self.expected.mask[:count]) & ~self.near[:count]
            if wrong.any():
                raise cli.VerificationError(f"{row.name}: {int(wrong.sum())} regions differ")


def batches(config: LatencyConfig) -> tuple[int, ...]:
    """Return the batch sizes to measure."""
    return config.batch or (1,)


@torch.inference_mode()
def torch_rows(subject: Subject, count: int) -> list[Row]:
    """Build the rows that PyTorch runs."""
    model, config = subject.twin(), subject.config
    images = model.prompt.normalised(subject.sample[:count].to(subject.device))
    paper = PaperForm(images.shape[-1], model.prompt.config).to(subject.device)
    paper.load_state_dict(model.prompt.state_dict())
    uncollapsed = replace_prompt(model, paper.eval())
    fused = fused_obstacle(model.prompt.config)
    if subject.device.type != "cuda":
        fused = "the fused kernel needs a CUDA device"

    def timed(run: Callable[[Tensor], Outputs]) -> Callable[[], Outputs]:
        return torch.inference_mode()(lambda: run(images))

    def alone(x: Tensor) -> Outputs:
        return {"embedding": model.encoder(x)}

    def named(run: AdaViPro) -> Callable[[Tensor], Outputs]:
        return lambda x: run(x)._asdict()

    collapsed = replace_prompt(model, model.prompt)
    rows = [
        Row("encoder_eager", "encoder_eager", "encoder", timed(alone)),
        Row("paper_form_eager", "encoder_eager", "prompt + encoder", timed(named(uncollapsed))),
        Row("collapsed_eager", "encoder_eager", "prompt + encoder", timed(named(collapsed))),
    ]
    if fused:
        rows.append(Row("fused", "encoder_eager", "prompt + encoder", skipped=fused))
    else:
        rows.append(Row("fused", "encoder_eager", "prompt + encoder", timed(named(model))))
        collapsed.prompt.kernel = "plain"
    compiled = (
        Row("encoder_compiled", "encoder_compiled", "encoder"),
        Row("compiled", "encoder_compiled", "prompt + encoder"),
    )
    if config.quick:
        return rows + [replace(row, skipped="--quick: no compiled rows") for row in compiled]
    works = (timed(torch.compile(alone)), timed(torch.compile(named(collapsed))))
    return rows + [replace(r, work=work) for r, work in zip(compiled, works, strict=True)]


def replace_prompt(model: AdaViPro, prompt: torch.nn.Module) -> AdaViPro:
    """Return the same model behind another prompt module."""
    twin = AdaViPro(
        model.encoder, model.class_embeddings, model.prompt.config, kernel=model.prompt.kernel
    )
    if isinstance(prompt, PaperForm):
        twin.prompt = prompt
    else:
        twin.prompt.load_state_dict(prompt.state_dict())
    return twin.eval().to(model.class_embeddings.device)


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
        module = Deployed(
            subject.model,
            folded=foldable and kind != "pixel",
            dtype=DTYPES[config.precision],
            uint8=wanted.input == "uint8",
            baseline=wanted.baseline,
        )
        about = to_onnx.describe(stored, wanted, "folded" if kind == "folded" else "pixel")
        opset = to_onnx.OPSETS[config.precision]
        to_onnx.write(
            module, path, side=subject.model.encoder.preprocess.size, opset=opset, metadata=about
        )
    return OnnxArtifact.open(path, str(subject.device))


def onnx_rows(subject: Subject, count: int, folder: Path) -> list[Row]:
    """Build the rows that ONNX Runtime runs."""
    rows = []
    for name in ONNX[:4] if subject.config.quick else ONNX:
        base = "onnx_baseline_uint8" if name.endswith("uint8") else "onnx_baseline"
        contract = "encoder" if name.startswith("baseline") else "prompt + encoder"
        row = Row(f"onnx_{name}", base, contract)
        artifact = export(subject, name, folder)
        if isinstance(artifact, str):
            rows.append(replace(row, skipped=artifact))
            continue
        image = artifact.about.image(subject.sample[:count].to(subject.device))
        rows.append(replace(row, work=partial(artifact.run, image)))
    return rows


def pipeline_rows(subject: Subject, folder: Path) -> list[Row]:
    """Build the rows from JPEG bytes to a class name, one image at a time."""
    stored = io.BytesIO()
    Image.fromarray(subject.sample[0].permute(1, 2, 0).numpy()).save(stored, "JPEG", quality=95)
    transform = subject.model.encoder.preprocess.pixels()
    rows = []
    for name in ("baseline_uint8", "folded_uint8"):
        row = Row(f"pipeline_onnx_{name}", "pipeline_onnx_baseline_uint8", "pipeline")
        artifact = export(subject, name, folder)
        if isinstance(artifact, str):
            rows.append(replace(row, skipped=artifact))
            continue

        def work(artifact: OnnxArtifact = artifact) -> Outputs:
            pixels = torch.from_numpy(transform(decode_image(stored.getvalue(), "bench")))
            prediction = artifact(pixels[None])
            assert artifact.about.class_names[int(prediction.logits[0].argmax())]
            return {}

        rows.append(replace(row, work=work))
    return rows


def engine_rows() -> list[Row]:
    """Say why no engine is timed."""
    reason = "export/to_tensorrt.py builds the engine; it needs a CUDA device to run"
    if compute_capability() is not None:
        reason = "this bench cannot time engines yet"
    return [
        Row(
            name,
            name.rsplit("_", 1)[0] + "_baseline",
            "encoder" if name.endswith("baseline") else "prompt + encoder",
            skipped=reason,
        )
        for name in ENGINES
    ]


def time_rows(subject: Subject, rows: list[Row], count: int) -> list[dict[str, Any]]:
    """Check every row, then time all of them in turn."""
    for row in rows:
        if row.work is not None and row.contract != "pipeline":
            subject.check(row, count)
    works = {row.name: row.work for row in rows if row.work is not None}
    seconds = 12.0 if subject.config.quick else subject.config.seconds
    times = until_steady(works, subject.device, seconds=seconds)
    result = []
    for row in rows:
        told: dict[str, Any] = {"name": row.name, "batch": count, "contract": row.contract}
        if row.name in times:
            told |= percentiles(times[row.name])
        else:
            told |= {"skipped": row.skipped}
        if row.name in times and row.base in times:
            low, high = ratio_interval(times[row.name], times[row.base])
            told |= {
                "ratio": paired_ratio(times[row.name], times[row.base]),
                "ratio_low": low,
                "ratio_high": high,
                "base": row.base,
            }
        result.append(told)
    return result


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the rows' medians as bars, their ratios beside them."""
    mpl.use("Agg")
    timed = [row for row in rows if "p50_ms" in row]
    figure = Figure(figsize=(8, 0.4 + 0.32 * len(timed)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['name']} (batch {row['batch']})" for row in timed]
    bars = axes.barh(names, [row["p50_ms"] / row["batch"] for row in timed])
    labels = [f"{row['ratio']:.2f}x" if "ratio" in row else "" for row in timed]
    axes.bar_label(bars, labels, padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("median latency, ms per image; ratio to the encoder alone")
    figure.savefig(path)


def main() -> None:
    """Parse, check, measure, print."""
    config = cli.parse(LatencyConfig)
    cli.run(lambda: command(config))


def command(config: LatencyConfig) -> dict[str, Any]:
    """Measure all rows at all batch sizes.

    Raises:
        VerificationError: a row computes something else; nothing is timed.
    """
    if min(batches(config)) < 1:
        raise ValueError(f"batch {min(batches(config))} is below 1")
    subject = Subject(config)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for count in batches(config):
            built = torch_rows(subject, count) + onnx_rows(subject, count, Path(folder))
            if count == 1 and not config.quick:
                built += pipeline_rows(subject, Path(folder))
            rows += time_rows(subject, built + engine_rows(), count)
    if config.plot is not None:
        draw(rows, config.plot)
    return publish(rows, subject.device, config.json)


if __name__ == "__main__":
    main()
