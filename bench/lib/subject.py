"""The model under test: its expected answers, its ONNX files, and checked rows."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adavipro_fast import AdaViPro, PromptConfig, load_encoder
from adavipro_fast.artifact.artifact import NotRunnableError
from adavipro_fast.artifact.onnx import OnnxArtifact
from adavipro_fast.artifact.open import open_onnx
from adavipro_fast.artifact.openvino import OpenVinoArtifact
from adavipro_fast.device import torch_device
from adavipro_fast.errors import VerificationError
from adavipro_fast.export import comparison
from adavipro_fast.export.gate import QuantisationImages, quantise_file
from adavipro_fast.export.graph import Form
from adavipro_fast.export.onnx_export import Source, Trial, write_graph
from adavipro_fast.export.patches import folding_obstacle
from adavipro_fast.files.checkpoint import checkpoint_of
from adavipro_fast.method.config import Input, Precision, Runtime
from adavipro_fast.method.model import Prediction
from lib.machine import no_openvino

CLASS_NAMES = tuple(f"class {number}" for number in range(10))
# Region sizes; the first that divides the image side is used.
REGIONS = (32, 56, 16, 8)
LEAST_COSINE = {
    "fp32": comparison.SMALLEST_COSINE,
    "fp16": comparison.SMALLEST_COSINE,
    "bf16": 0.999,
    # For random weights with all products quantised, since there is no accuracy to measure.
    "int8": 0.98,
}
# Suffix of a file's name: its input, and its precision if it differs from the subject's.
ENDINGS: dict[str, tuple[Input, Literal["int8"] | None]] = {
    "": ("float32", None),
    "uint8": ("uint8", None),
    "any": ("any", None),
    "int8": ("uint8", "int8"),
}
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """A variant ready to be timed, or the reason why it cannot be."""

    name: str
    base: str
    """row of the encoder alone in the same runtime; for a graph that resizes, the file that does
    not"""
    contract: str
    """encoder, prompt + encoder, or pipeline"""
    work: Callable[[], Outputs] | None = None
    int8: bool = False
    """whether its products are quantised"""
    peer: bool = False
    """another way to run the model, which is also compared with our fastest row"""
    other: str = ""
    """another row to compare with"""
    build_s: float = 0.0
    """compilation or opening, and the first call, seconds; not part of the latency"""
    cosine: float = 1.0
    """smallest cosine between embeddings of this row and of PyTorch in fp32"""
    note: str = ""
    """how it actually runs, if that differs from its name"""
    skipped: str = ""


class Subject:
    """The model under test, its images, and the expected answers of every row.

    Args:
        model: open_clip name, local-dir:PATH, or demo.
        pretrained: open_clip tag or path of the weights; random weights if empty.
        images: largest number of images.
        precision: of the timed encoder.
        device: to run on.
    """

    def __init__(
        self,
        model: str,
        pretrained: str = "",
        *,
        images: int,
        precision: Precision = "fp32",
        device: str = "auto",
    ) -> None:
        torch.manual_seed(0)
        self.precision, self.device = precision, torch_device(device)
        encoder = load_encoder(model, pretrained)
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
        sample = torch.cat(comparison.sample_batches(encoder.preprocess))
        self.model.prompt.initialise(sample)
        self.various = sample
        self.sample = sample[torch.arange(images) % len(sample)]
        with torch.inference_mode():
            self.expected: Prediction = self.model(self.sample)
            self.plain = encoder(self.model.prompt.normalised(self.sample))
        self.near = comparison.ties(self.model, self.sample)

    def twin(self, *, lean: bool = True) -> AdaViPro:
        """Return the model in the precision and on the device under test.

        Args:
            lean: use our attention instead of open_clip's.
        """
        model = AdaViPro(
            self.model.encoder.with_(precision=self.precision, lean=lean),
            self.model.head.rows,
            self.model.prompt.config,
            kernel="auto",
        )
        model.prompt.load_state_dict(self.model.prompt.state_dict())
        return model.eval().to(self.device)

    def checked(self, row: Row, count: int) -> Row:
        """Call a row once and check its answers on the first images; return the row.

        Raises:
            VerificationError: the answers are wrong.
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
        if self.precision == "fp32" and not (row.int8 or error <= comparison.LARGEST_ERROR_FP32):
            raise VerificationError(f"{row.name}: embeddings differ by {error:.1e}")
        least = LEAST_COSINE["int8" if row.int8 else self.precision]
        if not cosine >= least:
            raise VerificationError(f"{row.name}: the worst cosine is {cosine:.6f}")
        if prompted:
            wrong = (outputs["mask"] != self.expected.mask[:count]) & ~self.near[:count]
            if wrong.any():
                raise VerificationError(f"{row.name}: {int(wrong.sum())} regions differ")
        return replace(row, build_s=row.build_s + first_s, cosine=cosine)


def export(
    subject: Subject, name: str, folder: Path, runtime: Runtime = "onnxruntime"
) -> OnnxArtifact | OpenVinoArtifact | str:
    """Export the ONNX file of a row and open it; return the reason if it cannot run.

    Args:
        subject: the model under test.
        name: a form with a suffix: folded, folded_uint8, baseline_int8, ...
        folder: of the files; existing files are reused.
        runtime: runs the file.
    """
    if reason := obstacle(subject, name, runtime):
        return reason
    path = written(subject, name, folder)
    try:
        return open_onnx(path, str(subject.device), runtime)
    except NotRunnableError as error:
        return str(error)


def obstacle(subject: Subject, name: str, runtime: Runtime) -> str | None:
    """Return why a file cannot be measured, or None; arguments are those of `export`."""
    if subject.precision == "bf16" and subject.device.type == "cpu":
        return "ONNX Runtime's CPU provider cannot run bf16"
    if name.endswith("_int8") and subject.precision != "fp32":
        return "int8 is measured beside fp32"
    if name.endswith("_int8") and subject.device.type == "cuda":
        return "int8 files were never run on a GPU; they are measured on CPUs"
    if "folded" in name and folding_obstacle(subject.model.encoder.visual) is not None:
        return "this encoder cannot be folded"
    return no_openvino(subject.device) if runtime == "openvino" else None


def written(subject: Subject, name: str, folder: Path) -> Path:
    """Return the ONNX file of a row, and write it if it does not exist."""
    path = folder / f"{name.removesuffix('_again')}.onnx"
    if not path.exists():
        write(subject, path)
    return path


def write(subject: Subject, path: Path) -> None:
    """Write the ONNX file that the path's name describes, without verifying it."""
    form, _, ending = path.stem.partition("_")
    kind, precision = ENDINGS[ending]
    foldable = folding_obstacle(subject.model.encoder.visual) is None
    source = Source(checkpoint_of(subject.model, CLASS_NAMES), subject.model)
    form_of_file = Form(
        "folded" if foldable and form != "pixel" else "pixel",
        precision or subject.precision,
        kind,
        baseline=form == "baseline",
    )
    write_sources(subject, [source], path, form_of_file)


def write_sources(subject: Subject, sources: Sequence[Source], path: Path, form: Form) -> None:
    """Write sources as one file, without verifying it; int8 quantises every product.

    Random weights have no accuracy to lose. Each task is calibrated on its share of the images.
    """
    write_graph(path, sources, form)
    if form.precision == "int8":
        share = max(len(subject.various) // len(sources), 2)
        images = [QuantisationImages(subject.various[:share], subject.various[:1])] * len(sources)
        tables = Trial(path, sources, form).tables() if form.tasks == "open" else {}
        quantise_file(path, form.precision, images, largest_loss=100.0, tables=tables)
