"""What is measured: a model with its right answers, its ONNX files, and rows that are checked."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from adavipro_fast import AdaViPro, PromptConfig, load_encoder
from adavipro_fast.artifact.onnx import OnnxArtifact
from adavipro_fast.device import torch_device
from adavipro_fast.errors import VerificationError
from adavipro_fast.export import graph as onnx_graph
from adavipro_fast.export import to_onnx, verify
from adavipro_fast.export.fold import deployed
from adavipro_fast.export.patches import folding_obstacle
from adavipro_fast.export.to_onnx import Graph
from adavipro_fast.files.checkpoint import checkpoint_of
from adavipro_fast.method.config import DTYPES, Precision
from adavipro_fast.method.model import Prediction

CLASS_NAMES = tuple(f"class {number}" for number in range(10))
# The first one that divides the image's side is taken.
REGIONS = (32, 56, 16, 8)
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """A variant ready to be timed, or the reason why it cannot be."""

    name: str
    base: str
    """row of the encoder alone in the same runtime"""
    contract: str
    """encoder, prompt + encoder, or pipeline"""
    work: Callable[[], Outputs] | None = None
    build_s: float = 0.0
    """export, compilation and first call, seconds; not part of the latency"""
    skipped: str = ""


class Subject:
    """The model under test, its images, and the answers that every row must give.

    Args:
        model: open_clip name, local-dir:PATH, or demo.
        pretrained: open_clip tag or path of the weights; random ones without.
        images: how many at most.
        precision: of the encoder that is timed.
        device: where.
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
        sample = torch.cat(verify.sample_batches(encoder.preprocess, None))
        self.model.prompt.initialise(sample)
        self.sample = sample[torch.arange(images) % len(sample)]
        with torch.inference_mode():
            self.expected: Prediction = self.model(self.sample)
            self.plain = encoder(self.model.prompt.normalised(self.sample))
        self.near = verify.ties(self.model, self.sample)

    def twin(self) -> AdaViPro:
        """Return the model in the precision and on the device under test."""
        model = AdaViPro(
            self.model.encoder.with_(precision=self.precision),
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
        if self.precision == "fp32" and not error <= verify.LARGEST_ERROR_FP32:
            raise VerificationError(f"{row.name}: embeddings differ by {error:.1e}")
        least = verify.SMALLEST_COSINE if self.precision != "bf16" else 0.999
        if not cosine >= least:
            raise VerificationError(f"{row.name}: the worst cosine is {cosine:.6f}")
        if prompted:
            wrong = (outputs["mask"] != self.expected.mask[:count]) & ~self.near[:count]
            if wrong.any():
                raise VerificationError(f"{row.name}: {int(wrong.sum())} regions differ")
        return replace(row, build_s=row.build_s + first_s)


def export(subject: Subject, name: str, folder: Path) -> OnnxArtifact | str:
    """Export one ONNX row; return the reason where it cannot be run."""
    if subject.precision == "bf16" and subject.device.type == "cpu":
        return "ONNX Runtime's CPU provider cannot run bf16"
    if "folded" in name and folding_obstacle(subject.model.encoder.visual) is not None:
        return "this encoder cannot be folded"
    path = folder / f"{name.removesuffix('_again')}.onnx"
    if not path.exists():
        write(subject, path)
    return OnnxArtifact.open(path, str(subject.device))


def write(subject: Subject, path: Path) -> None:
    """Write the ONNX file that its name says, as `to_onnx` does but without its verification."""
    kind, checkpoint = path.stem.removesuffix("_uint8"), path.with_name("checkpoint.safetensors")
    stored = checkpoint_of(subject.model, CLASS_NAMES)
    stored.save(checkpoint)
    options = to_onnx.OnnxConfig(
        checkpoint,
        path,
        precision=subject.precision,
        input="uint8" if path.stem.endswith("uint8") else "float32",
        baseline=kind == "baseline",
    )
    foldable = folding_obstacle(subject.model.encoder.visual) is None
    module = deployed(
        subject.model,
        folded=foldable and kind != "pixel",
        dtype=DTYPES[subject.precision],
        uint8=options.input == "uint8",
        baseline=options.baseline,
    )
    form: Graph = "folded" if kind == "folded" else "pixel"
    onnx_graph.write(
        module,
        path,
        side=subject.model.preprocess.size,
        opset=to_onnx.OPSETS[subject.precision],
        metadata=to_onnx.describe(stored, options, form) | {"baseline": options.baseline},
    )
