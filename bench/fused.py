"""Time the fused kernel against PyTorch, eager and compiled, with a correctness gate first.

    python bench/fused.py --json bench/results/fused.json
    python bench/fused.py --tune

uint8 pixels in, bf16 images out. Bytes are counted, not measured: what the pass must move once.
Without a CUDA device only the gate runs, in Triton's interpreter, and the rows say so.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported, which open_clip already does.
    os.environ["TRITON_INTERPRET"] = "1"

from torch import Tensor

from adavipro_fast import PromptConfig, cli
from adavipro_fast.device import full_fp32, torch_device
from adavipro_fast.errors import VerificationError
from adavipro_fast.kernels import adaptive_prompt as kernels
from adavipro_fast.method.config import Kernel
from adavipro_fast.method.functional import Edge, apply_prompt, decide, logistic_noise
from adavipro_fast.method.prompt import AdaptivePrompt
from lib.machine import peak_device_mib
from lib.paper_form import PaperForm
from lib.table import Json, publish
from lib.timing import interleaved_ms, summary

SIDE = 224
LARGEST_ERROR = 1e-5
Work = Callable[[], Any]


@dataclass(frozen=True)
class FusedConfig:
    """Time the fused kernel against PyTorch, eager and compiled."""

    batch: int = 256
    """images per call"""
    region_size: int = 32
    """side of a region, pixels"""
    edge: Edge = "laplacian-magnitude"
    """edge detector"""
    rounds: int = 50
    """timed calls of each row"""
    tune: bool = False
    """time launch options instead, to choose those of `launch_options`"""
    json: Json = None


def build(config: FusedConfig, kernel: Kernel, device: torch.device, side: int) -> AdaptivePrompt:
    """Make a prompt whose weights depend on nothing but the configuration."""
    torch.manual_seed(0)
    prompt = PromptConfig(
        region_size=config.region_size, edge=config.edge, edge_padding="replicate"
    )
    built = AdaptivePrompt(side, prompt, mean=(0.5,) * 3, std=(0.25,) * 3, kernel=kernel)
    return built.to(device).train()


def gate(config: FusedConfig, device: torch.device) -> float:
    """Compare masks and gradients with float64; return the largest relative error.

    Raises:
        VerificationError: it is above the limit.
    """
    side = 2 * config.region_size
    fused, truth = (build(config, kernel, device, side) for kernel in ("fused", "plain"))
    truth.double()
    pixels = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, device=device)
    noise = logistic_noise(0, 0, (3, 2, 2), device)
    upstream = torch.randn(3, 3, side, side, device=device)
    got = fused(pixels, tau=1.0, noise=noise)
    assert truth.template is not None
    delta = truth.delta(truth.normalised(pixels))
    mask = decide(delta, "hard", tau=1.0, noise=noise.double())
    prompted = apply_prompt(truth.normalised(pixels), truth.template(), mask)
    (got.images * upstream).sum().backward()
    (prompted * upstream).sum().backward()
    pairs = [(got.images, prompted), (got.delta, delta)]
    for ours, theirs in zip(fused.parameters(), truth.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        pairs.append((ours.grad, theirs.grad))
    worst = max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)
    if not worst <= LARGEST_ERROR:
        raise VerificationError(f"the fused kernel is wrong by {worst:.1e}; no time is printed")
    return worst


def variants(config: FusedConfig, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Name the forward passes, all with the same noise and bf16 results."""
    grid = SIDE // config.region_size
    pixels = torch.randint(0, 256, (config.batch, 3, SIDE, SIDE), dtype=torch.uint8, device=device)
    noise = logistic_noise(0, 0, (config.batch, grid, grid), device)
    plain, fused = (build(config, kernel, device, SIDE) for kernel in ("plain", "fused"))
    written = PaperForm.of(plain)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def paper_form() -> Tensor:
        prompted: Tensor = written(pixels, tau=1.0, noise=noise).images
        return prompted.bfloat16()

    def collapsed() -> Tensor:
        prompted: Tensor = plain(pixels, tau=1.0, noise=noise).images
        return prompted.bfloat16()

    return {
        "paper_form_eager": paper_form,
        "paper_form_compiled": torch.compile(paper_form),
        "collapsed_eager": collapsed,
        "collapsed_compiled": torch.compile(collapsed),
        "fused": lambda: fused(pixels, dtype=dtype, tau=1.0, noise=noise).images,
    }


def passes(forward: Callable[[], Tensor]) -> dict[str, Work]:
    """Split a forward pass into forward, backward and both."""
    prompted = forward()
    upstream = torch.randn_like(prompted)
    return {
        "forward": torch.no_grad()(forward),
        "backward": lambda: prompted.backward(upstream, retain_graph=True),
        "both": lambda: forward().backward(upstream),
    }


def copy_gb_s(device: torch.device, rounds: int) -> float:
    """Measure the device's copy bandwidth on 2 GiB, bytes read and written."""
    source = torch.empty(2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = interleaved_ms({"copy": lambda: target.copy_(source)}, device, rounds=rounds)
    return 2 * source.numel() / summary(times["copy"])["median_ms"] / 1e6


def timed_rows(config: FusedConfig, device: torch.device) -> Iterator[dict[str, Any]]:
    """Time every variant and pass; count bytes, and the share of the copy bandwidth."""
    forwards = variants(config, device)
    split = {name: passes(forward) for name, forward in forwards.items()}
    copied = copy_gb_s(device, config.rounds)
    # Read uint8 pixels, and write or read bf16 images.
    pixels = config.batch * 3 * SIDE * SIDE
    bytes_moved = {"forward": 3 * pixels, "backward": 3 * pixels, "both": 6 * pixels}
    for part, count in bytes_moved.items():
        works = {name: work[part] for name, work in split.items()}
        times = interleaved_ms(works, device, rounds=config.rounds, warm_up=5)
        fused_ms = summary(times["fused"])["median_ms"]
        for name, work in works.items():
            figures = summary(times[name])
            gb_s = count / figures["median_ms"] / 1e6
            yield {
                "name": f"{name}_{part}",
                **figures,
                "ratio_to_fused": figures["median_ms"] / fused_ms,
                "bytes": count,
                "gb_s": gb_s,
                "share_of_copy": gb_s / copied,
                "peak_mib": peak_device_mib(work, device),
            }
    yield {"name": "copy", "gb_s": copied}


@contextmanager
def launched_with(options: dict[str, Any]) -> Iterator[None]:
    """Launch the fused kernel with these options instead of its own."""
    chosen = kernels.launch_options
    kernels.launch_options = lambda *sizes: chosen(*sizes) | options
    try:
        yield
    finally:
        kernels.launch_options = chosen


def tuned_rows(config: FusedConfig, device: torch.device) -> Iterator[dict[str, Any]]:
    """Time launch options of the fused kernel, forward and backward."""
    forward = variants(config, device)["fused"]
    for images, warps in product((2, 4, 8, 16), (1, 2, 4, 8)):
        options = {"IMAGES": images, "num_warps": warps, "BLOCK": 32 * warps}
        options["EVEN"] = config.batch % images == 0
        with launched_with(options):
            works = passes(forward)
            times = interleaved_ms(works, device, rounds=config.rounds, warm_up=5)
        medians = {f"{part}_ms": summary(t)["median_ms"] for part, t in times.items()}
        yield {"name": f"images_{images}_warps_{warps}", **options, **medians}


def skipped_rows(reason: str) -> Iterator[dict[str, Any]]:
    """Say of every time why there is none."""
    names = ("paper_form_eager", "paper_form_compiled", "collapsed_eager", "collapsed_compiled")
    for name, part in product((*names, "fused"), ("forward", "backward", "both")):
        yield {"name": f"{name}_{part}", "skipped": reason}


@full_fp32()
def command(config: FusedConfig) -> dict[str, Any]:
    """Run the gate, then what the device allows."""
    device = torch_device("auto")
    rows: list[dict[str, Any]] = [{"name": "gate", "largest_error": gate(config, device)}]
    if device.type == "cuda":
        rows += (tuned_rows if config.tune else timed_rows)(config, device)
    else:
        rows += skipped_rows(
            "times need a CUDA device; here the kernel runs in Triton's interpreter"
        )
    return publish(rows, device, config.json, "fused kernel")


def main() -> None:
    """Parse, measure, print."""
    cli.main(FusedConfig, command)


if __name__ == "__main__":
    main()
