"""Compare an exported file with PyTorch on the same images.

Masks must agree in all regions except ties, where Δ is within rounding of 0; ties are counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from adavipro_fast.artifact.artifact import Artifact, NotRunnableError
from adavipro_fast.artifact.onnx import OnnxArtifact
from adavipro_fast.artifact.open import OneTask
from adavipro_fast.artifact.torch import TorchArtifact
from adavipro_fast.data import world
from adavipro_fast.data.images import images_in, read_pixels, unresized
from adavipro_fast.errors import VerificationError
from adavipro_fast.files.sealed import describe_onnx
from adavipro_fast.method.config import QUANTISED
from adavipro_fast.method.functional import region_logit
from adavipro_fast.method.model import AdaViPro, Prediction
from adavipro_fast.method.preprocess import Preprocess

Classify = Callable[[Tensor], Prediction]

# Batch sizes: 1, an odd number and a large one.
BATCHES = (1, 3, 16)
LARGEST_ERROR_FP32 = 1e-5
# Relative to the largest logit, or to 1 if that is smaller.
LARGEST_LOGIT_ERROR_FP32 = 1e-4
SMALLEST_COSINE = 0.9999
# (width, height) of images for graphs that resize: landscape, portrait, tiny, the graph's own size.
SIZES = ((640, 480), (300, 500), (37, 53), (224, 224), (1, 9), (1920, 270))
# Δ is a sum of thousands of products; allow a few roundings of its largest terms.
TIE = 4e-6


@dataclass(frozen=True)
class Comparison:
    """Differences between two backends, over all images."""

    max_abs_error: float
    """of the embeddings"""
    max_logit_error: float
    """of the logits, relative to the largest one or to 1"""
    min_cosine: float
    """of the embeddings, for the worst image"""
    top1_agreement: float
    """share of images, percent"""
    mask_agreement: float
    """share of regions, 0-1; ties count as equal"""
    mask_ties: int
    """number of regions with different decisions whose Δ is within rounding of 0"""

    def complaint(self, precision: str) -> str | None:
        """Describe a difference beyond rounding in `precision`; None if there is none."""
        if self.mask_agreement < 1:
            return f"masks agree on only {self.mask_agreement:.4%} of the regions"
        if precision in QUANTISED:
            # The loss of accuracy by quantisation was already measured on images.
            return None
        if precision == "fp32" and not self.max_abs_error <= LARGEST_ERROR_FP32:
            return f"embeddings differ by {self.max_abs_error:.1e}, more than {LARGEST_ERROR_FP32}"
        if precision == "fp32" and not self.max_logit_error <= LARGEST_LOGIT_ERROR_FP32:
            return f"logits differ by {self.max_logit_error:.1e} relative to the largest one"
        if not self.min_cosine >= SMALLEST_COSINE:
            return f"the worst cosine is {self.min_cosine:.6f}, less than {SMALLEST_COSINE}"
        return None


def opened(path: Path) -> OnnxArtifact | None:
    """Open a file that was just written; None if it is bf16 and cannot run here.

    Raises:
        VerificationError: the file cannot run.
    """
    # ONNX Runtime's CPU provider does not support bf16.
    about = describe_onnx(path)
    bf16 = about.precision == "bf16"
    if bf16 and not torch.cuda.is_available():
        return None
    try:
        return OnnxArtifact.of(path, about, "cuda" if bf16 else "cpu")
    except NotRunnableError as error:
        if bf16:
            return None
        raise VerificationError(f"{path.name} was not written: {error}") from error


def sample_batches(preprocess: Preprocess, images: Sequence[Path] = ()) -> list[Tensor]:
    """Make batches of real images and noise: (B, 3, S, S) uint8 each.

    Args:
        preprocess: turns images into pixels.
        images: folders of images; if empty, the demo's procedural images are used.
    """
    generator = torch.Generator().manual_seed(0)
    count = sum(BATCHES)
    if not images:
        drawn, _ = world.render(count, world.DOWNSTREAM, generator)
        scaled = F.interpolate(drawn.float(), (preprocess.size,) * 2, mode="bilinear")
        real = scaled.round().to(torch.uint8)
    else:
        files = []
        for folder in images:
            inside = images_in(folder)
            if not inside:
                raise ValueError(f"{folder} contains no images; use a folder of images")
            files += inside
        picked = tuple(files[i * len(files) // count] for i in range(count))
        real = read_pixels(picked, preprocess)
    noise = torch.randint(0, 256, real.shape, dtype=torch.uint8, generator=generator)
    # Every third image is noise.
    mixed = torch.where((torch.arange(count) % 3 == 2).view(-1, 1, 1, 1), noise, real)
    margin, side = preprocess.margin, preprocess.size
    framed = preprocess.colour.view(3, 1, 1).expand_as(mixed).clone()
    inner = (..., slice(margin, side - margin), slice(margin, side - margin))
    framed[inner] = mixed[inner]
    return list(framed.split(BATCHES))


def ties(model: AdaViPro, pixels: Tensor) -> Tensor:
    """Return which regions' Δ is within rounding of 0: (B, G, G) bool."""
    prompt = model.prompt
    images = prompt.normalised(pixels)
    if prompt.generator is None:
        return torch.zeros(len(pixels), prompt.grid, prompt.grid, dtype=torch.bool)
    delta = prompt.delta(images)
    if prompt.config.activation != "none":
        size = 1 + delta.abs().amax()
    else:
        kernel, bias = prompt.generator.collapsed()
        # + 8 for the rounding of the edges, which are differences of pixels.
        size = region_logit(prompt.edges(images).abs() + 8, kernel.abs(), bias.abs())
    near: Tensor = delta.abs() <= TIE * size
    return near


@torch.no_grad()
def compare(
    model: AdaViPro, reference: Classify, candidate: Classify, batches: Sequence[Tensor]
) -> Comparison:
    """Run both on all batches and compare their outputs; `model` is needed to find ties."""
    errors, logit_errors, cosines, same_top1, same_mask, near = [], [], [], [], [], []
    for pixels in batches:
        expected, got = reference(pixels), candidate(pixels)
        errors.append((expected.embedding - got.embedding).abs().max())
        apart = (expected.logits - got.logits).abs().max()
        logit_errors.append(apart / expected.logits.abs().max().clamp(min=1))
        cosines.append(F.cosine_similarity(expected.embedding, got.embedding, dim=-1))
        same_top1.append(expected.logits.argmax(1) == got.logits.argmax(1))
        same_mask.append((expected.mask.int() == got.mask.int()).flatten())
        near.append(ties(model, pixels).flatten())
    same, tied = torch.cat(same_mask), torch.cat(near)
    return Comparison(
        max_abs_error=torch.stack(errors).max().item(),
        max_logit_error=torch.stack(logit_errors).max().item(),
        min_cosine=torch.cat(cosines).min().item(),
        top1_agreement=100 * torch.cat(same_top1).double().mean().item(),
        mask_agreement=(same | tied).double().mean().item(),
        mask_ties=int((~same & tied).sum()),
    )


def compare_tasks(
    references: Sequence[TorchArtifact],
    names: Sequence[str],
    candidate: Artifact,
    batches: Sequence[Tensor],
) -> Comparison:
    """Compare each task with its checkpoint, in separate batches and in a mixed batch.

    Returns:
        The worst figures of all tasks; ties are summed.
    """
    *alone, mixed = batches
    order = [names[number % len(names)] for number in range(max(len(mixed), len(names)))]
    pixels = mixed[torch.arange(len(order)) % len(mixed)]
    together = candidate(pixels, order)
    compared = []
    for reference, name in zip(references, names, strict=True):
        rows = torch.tensor([number for number, other in enumerate(order) if other == name])
        count = len(reference.about.class_names)
        own = Prediction(
            together.logits[rows, :count], together.mask[rows], together.embedding[rows]
        )
        model = reference.model
        compared += [
            compare(model, reference, OneTask(candidate, name), alone),
            compare(model, reference, lambda _, own=own: own, [pixels[rows]]),  # type: ignore[misc]
        ]
    return Comparison(
        max_abs_error=max(each.max_abs_error for each in compared),
        max_logit_error=max(each.max_logit_error for each in compared),
        min_cosine=min(each.min_cosine for each in compared),
        top1_agreement=min(each.top1_agreement for each in compared),
        mask_agreement=min(each.mask_agreement for each in compared),
        mask_ties=sum(each.mask_ties for each in compared),
    )


def compare_sizes(
    reference: Classify,
    run: Callable[[Tensor], dict[str, Tensor]],
    preprocess: Preprocess,
    images: Sequence[Path] = (),
) -> float:
    """Compare a graph that resizes with our preprocessing; return the embeddings' worst cosine.

    Args:
        reference: classifies resized pixels.
        run: returns the graph's outputs for an image of any size.
        preprocess: the graph's.
        images: see `sample_batches`.

    Raises:
        VerificationError: the graph resizes differently.
    """
    cosines, transform = [], preprocess.pixels()
    for image, size in zip(sample_batches(preprocess, images)[-1], SIZES, strict=False):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size)
        resized = reference(torch.from_numpy(transform(picture).copy())[None])
        got = run(unresized(picture))["embedding"].cpu()
        cosines.append(F.cosine_similarity(resized.embedding, got, dim=-1).item())
    if not min(cosines) >= SMALLEST_COSINE:
        raise VerificationError(
            "the graph's resizing does not match the preprocessing: worst cosine "
            f"{min(cosines):.6f}"
        )
    return min(cosines)


@dataclass(frozen=True)
class Unprompted:
    """A frozen encoder's predictions without the prompt, the reference of a baseline."""

    model: AdaViPro

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Prediction:
        """Classify (B, 3, S, S) uint8 RGB pixels."""
        prompt = self.model.prompt
        closed = torch.zeros(len(pixels), prompt.grid, prompt.grid)
        return self.model.classify(prompt.normalised(pixels), closed)
