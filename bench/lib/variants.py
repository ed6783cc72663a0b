"""The prompt's forward pass in every form: fused kernel, collapsed, and as in the paper."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adavipro_fast import PromptConfig
from adavipro_fast.errors import VerificationError
from adavipro_fast.method.config import Kernel
from adavipro_fast.method.functional import Edge, apply_prompt, decide, logistic_noise
from adavipro_fast.method.prompt import AdaptivePrompt
from lib.launches import MEAN, STD
from lib.paper_form import PaperForm
from lib.timing import interleaved_ms, summary

NAMES = (
    *("fused", "collapsed_compiled", "collapsed_eager"),
    *("paper_form_eager", "paper_form_compiled"),
)
LARGEST_ERROR = 1e-5


@dataclass(frozen=True)
class Setting:
    """Sizes, edge detector and device of the prompts."""

    batch: int
    region: int
    edge: Edge
    side: int
    device: torch.device


@dataclass(frozen=True)
class Variant:
    """A forward pass from pixels to prompted images, and its parameters."""

    forward: Callable[[Tensor], Tensor]
    parameters: list[Tensor]

    def both(self, pixels: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        """Run forward and backward; return the gradients."""
        return torch.autograd.grad(self.forward(pixels), self.parameters, upstream)


def build(setting: Setting, kernel: Kernel) -> AdaptivePrompt:
    """Make a prompt with weights that depend only on the setting."""
    torch.manual_seed(0)
    config = PromptConfig(
        region_size=setting.region,
        edge=setting.edge,
        edge_padding="replicate",
        prompt_size=min(30, setting.side // 2),
    )
    built = AdaptivePrompt(setting.side, config, mean=MEAN, std=STD, kernel=kernel)
    return built.to(setting.device).train()


def pixels_of(setting: Setting) -> Tensor:
    """Draw pixels (B, 3, S, S)."""
    shape = (setting.batch, 3, setting.side, setting.side)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=setting.device)


def noise_of(setting: Setting) -> Tensor:
    """Draw the noise (B, G, G) that all forms use."""
    grid = setting.side // setting.region
    return logistic_noise(0, 0, (setting.batch, grid, grid), setting.device)


def errors(setting: Setting) -> dict[str, float]:
    """Compare the fused kernel with float64: relative errors of outputs and gradients."""
    fused, truth = build(setting, "fused"), build(setting, "plain").double()
    pixels, noise = pixels_of(setting), noise_of(setting)
    upstream = torch.randn(pixels.shape, device=setting.device)
    got = fused(pixels, tau=1.0, noise=noise)
    assert truth.template is not None
    delta = truth.delta(truth.normalised(pixels))
    mask = decide(delta, "hard", tau=1.0, noise=noise.double())
    prompted = apply_prompt(truth.normalised(pixels), truth.template(), mask)
    (got.images * upstream).sum().backward()
    (prompted * upstream).sum().backward()
    pairs = {"images": (got.images, prompted), "delta": (got.delta, delta)}
    for (name, ours), theirs in zip(fused.named_parameters(), truth.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        pairs[name] = (ours.grad, theirs.grad)
    with torch.no_grad():
        return {name: float((a.double() - b).norm() / b.norm()) for name, (a, b) in pairs.items()}


def gate(setting: Setting) -> float:
    """Return the largest of `errors`.

    Raises:
        VerificationError: the error is above the limit.
    """
    worst = max(errors(setting).values())
    if not worst <= LARGEST_ERROR:
        raise VerificationError(f"the fused kernel is wrong by {worst:.1e}; no time is printed")
    return worst


@torch.no_grad()
def mask_differences(setting: Setting, images: int) -> dict[str, int]:
    """Count regions where fused and plain argmax masks differ; near-ties are counted separately."""
    counts = {"images": images, "regions": 0, "ties": 0, "different": 0}
    fused, plain = (build(setting, kernel).eval() for kernel in ("fused", "plain"))
    device, batch, side = setting.device, setting.batch, setting.side
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(images // batch):
        # Noise at three scales: flat, textured and busy regions.
        coarse = torch.rand(batch, 3, 14, 14, device=device, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, side, mode="bilinear")
        fine = torch.rand(batch, 3, side, side, device=device, generator=generator) * coarse.mean()
        pixels = (255 * (0.7 * smooth + 0.3 * fine * smooth)).to(torch.uint8)
        a, b = fused(pixels), plain(pixels)
        tie = b.delta.abs() < 1e-5 * b.delta.abs().max()
        counts["regions"] += tie.numel()
        counts["ties"] += int(tie.sum())
        counts["different"] += int((a.mask != b.mask)[~tie].sum())
    return counts


def variants(setting: Setting) -> dict[str, Variant]:
    """Return the forward passes by name, all with the same noise and output type."""
    noise = noise_of(setting)
    plain, fused = build(setting, "plain"), build(setting, "fused")
    written = PaperForm.of(plain)
    # Triton's interpreter cannot store bf16.
    dtype = torch.bfloat16 if setting.device.type == "cuda" else torch.float32

    def paper_form(pixels: Tensor) -> Tensor:
        prompted: Tensor = written(pixels, tau=1.0, noise=noise).images
        return prompted.to(dtype)

    def collapsed(pixels: Tensor) -> Tensor:
        prompted: Tensor = plain(pixels, tau=1.0, noise=noise).images
        return prompted.to(dtype)

    def in_one(pixels: Tensor) -> Tensor:
        prompted: Tensor = fused(pixels, dtype=dtype, tau=1.0, noise=noise).images
        return prompted

    forwards = {
        "fused": (in_one, fused),
        "collapsed_compiled": (torch.compile(collapsed, dynamic=False), plain),
        "collapsed_eager": (collapsed, plain),
        "paper_form_eager": (paper_form, written),
        "paper_form_compiled": (torch.compile(paper_form, dynamic=False), written),
    }
    return {name: Variant(run, list(of.parameters())) for name, (run, of) in forwards.items()}


def copy_gb_s(device: torch.device, size: int, rounds: int) -> float:
    """Measure the device's copy bandwidth with `size` bytes, counting bytes read and written."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = interleaved_ms({"copy": lambda: target.copy_(source)}, device, rounds=rounds)
    return 2 * size / summary(times["copy"])["median_ms"] / 1e6
