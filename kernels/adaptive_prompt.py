"""Fused kernels: edge detector, decision, dilation and multiply-add, and their gradient.

A program processes one region of a few images, in two phases. Forward: sum the products of the
region's edges with the collapsed generator's kernel K and decide; then write the pixels, with the
prompt added if the mask is open. Backward: compute the gradients of template and mask from the
output's gradient; then dK from the edges.

The outer loop is over parts of the region and the inner, unrolled loop over images, so that
addresses, K and P are computed or loaded once for all images of a program. `regions` contains the
work of a thread.

Each program stores a partial sum over its images; the partial sums are added afterwards. Without
atomics, gradients are deterministic. Axes and terms are those of `functional.py`. Compile-time
constants:

    SIDE, R     sides of image and region        BLOCK    threads per program
    IMAGES      images per program, at most      PIXELS   adjacent pixels that a thread writes
    EVEN        every program has IMAGES         GIVEN    noise is read from memory, not drawn
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adavipro_fast.kernels.regions import (
    ROWS,
    decide,
    edge_parts,
    edge_places,
    form_edges,
    gathered,
    logistic,
    of_channel,
    pixel_parts,
    pixel_places,
    scale_and_zero,
    scattered,
    zeros,
)

MODES = ("soft", "hard", "argmax")
EDGES = ("laplacian", "laplacian-magnitude")
MOST_IMAGES = 16
# Enough warps to hide memory latency on a GPU with 128 multiprocessors.
ENOUGH_WARPS = 2048


@triton.jit(do_not_specialize=["batch", "tau", "seed", "offset"])
def _forward(
    images_ptr, template_ptr, kernel_ptr, bias_ptr, noise_ptr, prompted_ptr, delta_ptr, mask_ptr,
    batch, tau, seed, offset, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    SIDE: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
    IMAGES: tl.constexpr, EVEN: tl.constexpr, UINT8: tl.constexpr, REPLICATE: tl.constexpr,
    MAGNITUDE: tl.constexpr, MODE: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """Δ = Σ e K + b;  m = decide(Δ);  x' = x + m P, for one region of IMAGES images."""
    region, first = tl.program_id(0), tl.program_id(1).to(tl.int64) * IMAGES
    grid: tl.constexpr = SIDE // R
    image_size: tl.constexpr = 3 * SIDE * SIDE
    gy, gx = region // grid, region % grid
    scales, shifts = (scale_r, scale_g, scale_b), (shift_r, shift_g, shift_b)
    count = tl.minimum(IMAGES, batch - first).to(tl.int32)
    images_ptr += first * image_size
    prompted_ptr += first * image_size
    totals = zeros(IMAGES, BLOCK)
    for part in range(edge_parts(R, BLOCK)):
        channel, weight, _, inside, around = edge_places(part, gy, gx, SIDE, R, BLOCK)
        scale, zero = scale_and_zero(channel, scales, shifts, UINT8)
        weights = ()
        for step in tl.static_range(ROWS):
            at = kernel_ptr + weight + step * (R + 2)
            # Edges are computed from raw pixels, so K is multiplied by the pixels' scale.
            weights += (scale * tl.load(at, mask=inside[step], other=0.0),)
        sums = ()
        for image in tl.static_range(IMAGES):
            total = totals[image]
            if EVEN or image < count:
                image_ptr = images_ptr + image * image_size
                edges = form_edges(image_ptr, around, zero, UINT8, REPLICATE, MAGNITUDE)
                for step in tl.static_range(ROWS):
                    total += edges[step] * weights[step]
            sums += (total,)
        totals = sums
    delta = gathered(totals, IMAGES) + tl.load(bias_ptr)
    lane = tl.arange(0, IMAGES)
    place = (first + lane) * (grid * grid) + region
    mask, _ = decide(delta, noise_ptr, place, lane < count, tau, seed, offset, MODE, GIVEN)
    tl.store(delta_ptr + place, delta, mask=lane < count)
    tl.store(mask_ptr + place, mask, mask=lane < count)
    masks = scattered(mask, IMAGES)
    for part in range(pixel_parts(R, BLOCK, PIXELS)):
        channel, pixels, real = pixel_places(part, gy, gx, SIDE, R, BLOCK, PIXELS)
        template = tl.load(template_ptr + pixels)
        scale = of_channel(channel, scales)[:, None]
        shift = of_channel(channel, shifts)[:, None]
        for image in tl.static_range(IMAGES):
            if EVEN or image < count:
                values = tl.load(images_ptr + image * image_size + pixels).to(tl.float32)
                if UINT8:
                    values = values * scale + shift
                values += masks[image] * template
                tl.store(prompted_ptr + image * image_size + pixels, values, mask=real)


@triton.jit
def _template_gradient(
    grad_ptr, template_ptr, template_grad_ptr, mask, count, gy, gx,
    SIDE: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
    IMAGES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Store dP = Σ m g over images; return dm = Σ g P over pixels, one lane per image."""
    masks, totals = scattered(mask, IMAGES), zeros(IMAGES, BLOCK)
    for part in range(pixel_parts(R, BLOCK, PIXELS)):
        _, pixels, real = pixel_places(part, gy, gx, SIDE, R, BLOCK, PIXELS)
        template = tl.load(template_ptr + pixels, mask=real, other=0.0)
        template_grad = tl.zeros((BLOCK, PIXELS), tl.float32)
        sums = ()
        for image in tl.static_range(IMAGES):
            total = totals[image]
            if EVEN or image < count:
                grad = tl.load(grad_ptr + image * (3 * SIDE * SIDE) + pixels).to(tl.float32)
                template_grad += masks[image] * grad
                total += tl.sum(grad * template, 1)
            sums += (total,)
        totals = sums
        tl.store(template_grad_ptr + pixels, template_grad, mask=real)
    return gathered(totals, IMAGES)


@triton.jit
def _kernel_gradient(
    images_ptr, kernel_grad_ptr, delta_grad, count, gy, gx, scales, shifts,
    SIDE: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, IMAGES: tl.constexpr,
    EVEN: tl.constexpr, UINT8: tl.constexpr, REPLICATE: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """Store dK = Σ dΔ e over images; 0 where K is outside the image."""
    delta_grads = scattered(delta_grad, IMAGES)
    for part in range(edge_parts(R, BLOCK)):
        channel, weight, exist, inside, around = edge_places(part, gy, gx, SIDE, R, BLOCK)
        scale, zero = scale_and_zero(channel, scales, shifts, UINT8)
        totals = zeros(ROWS, BLOCK)
        for image in tl.static_range(IMAGES):
            if EVEN or image < count:
                image_ptr = images_ptr + image * (3 * SIDE * SIDE)
                edges = form_edges(image_ptr, around, zero, UINT8, REPLICATE, MAGNITUDE)
                sums = ()
                for step in tl.static_range(ROWS):
                    sums += (totals[step] + delta_grads[image] * edges[step],)
                totals = sums
        for step in tl.static_range(ROWS):
            total = tl.where(inside[step], scale * totals[step], 0.0)
            tl.store(kernel_grad_ptr + weight + step * (R + 2), total, mask=exist[step])


@triton.jit(do_not_specialize=["batch", "tau", "seed", "offset"])
def _backward(
    images_ptr, template_ptr, noise_ptr, delta_ptr, grad_ptr,
    template_grad_ptr, kernel_grad_ptr, bias_grad_ptr,
    batch, tau, seed, offset, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    SIDE: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
    IMAGES: tl.constexpr, EVEN: tl.constexpr, UINT8: tl.constexpr, REPLICATE: tl.constexpr,
    MAGNITUDE: tl.constexpr, MODE: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """dP = Σ m g;  dΔ = (Σ g P) σ (1 - σ) / τ;  dK = Σ dΔ e;  db = Σ dΔ, for IMAGES images."""
    region, block = tl.program_id(0), tl.program_id(1).to(tl.int64)
    grid: tl.constexpr = SIDE // R
    image_size: tl.constexpr = 3 * SIDE * SIDE
    gy, gx = region // grid, region % grid
    first = block * IMAGES
    count = tl.minimum(IMAGES, batch - first).to(tl.int32)
    lane = tl.arange(0, IMAGES)
    place = (first + lane) * (grid * grid) + region
    delta = tl.load(delta_ptr + place, mask=lane < count, other=0.0)
    mask, soft = decide(delta, noise_ptr, place, lane < count, tau, seed, offset, MODE, GIVEN)
    mask_grad = _template_gradient(
        grad_ptr + first * image_size, template_ptr, template_grad_ptr + block * image_size,
        mask, count, gy, gx, SIDE, R, BLOCK, PIXELS, IMAGES, EVEN,
    )  # fmt: skip
    if MODE != "argmax":
        delta_grad = mask_grad * soft * (1.0 - soft) / tau
        partial = block * (grid * grid) + region
        tl.store(bias_grad_ptr + partial, tl.sum(delta_grad, 0))
        _kernel_gradient(
            images_ptr + first * image_size, kernel_grad_ptr + partial * (3 * (R + 2) * (R + 2)),
            delta_grad, count, gy, gx, (scale_r, scale_g, scale_b), (shift_r, shift_g, shift_b),
            SIDE, R, BLOCK, IMAGES, EVEN, UINT8, REPLICATE, MAGNITUDE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count", "seed", "offset"])
def _logistic_noise(noise_ptr, count, seed, offset, BLOCK: tl.constexpr):
    """Store the noise ε of numbers `offset` to `offset + count` of the stream."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    noise = logistic(tl.rand(seed, offset + place))
    tl.store(noise_ptr + place, noise, mask=place < count)


def logistic_noise(
    seed: int, offset: int, count: int, device: torch.device | None = None
) -> Tensor:
    """Draw the same noise as the kernel: numbers `offset` to `offset + count` of the stream."""
    noise = torch.empty(count, device=device)
    # Triton launches on the current device, even if its arguments are on another one.
    with torch.cuda.device_of(noise):
        _logistic_noise[(triton.cdiv(count, 1024),)](noise, count, seed, offset, BLOCK=1024)
    return noise


def launch_options(side: int, region_size: int, batch: int) -> dict[str, Any]:
    """Choose the warps and images per program; `bench/fused.py --tune` measures the choices.

    More images share one read of K and P and one partial sum, and need fewer instructions each;
    with fewer, a small batch has enough programs. Fewer warps waste less of a small region, but a
    multiprocessor cannot hold enough programs of one warp. bench/results/kernels-aot.json has the
    estimates.
    """
    warps = 2 if region_size <= 16 else 4
    regions, images = (side // region_size) ** 2, MOST_IMAGES
    while images > 1 and regions * triton.cdiv(batch, images) * warps < ENOUGH_WARPS:
        images //= 2
    return {
        "BLOCK": 32 * warps,
        # Stores of 8 pixels would take as long and fit small regions worse.
        "PIXELS": next(width for width in (4, 2, 1) if region_size % width == 0),
        "IMAGES": images,
        "EVEN": batch % images == 0,
        "num_warps": warps,
    }


def _check(images: Tensor, template: Tensor, kernel: Tensor, mode: str, edge: str) -> None:
    """Raise ValueError if the fused kernel does not support the arguments."""
    side, region = images.shape[-1], kernel.shape[-1] - 2
    if images.ndim != 4 or images.shape[1:] != (3, side, side):
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, 3, S, S)")
    if template.shape != (3, side, side) or kernel.shape != (3, region + 2, region + 2):
        raise ValueError(
            f"template {tuple(template.shape)} or kernel {tuple(kernel.shape)} does not fit images "
            f"of side {side}; expected (3, S, S) and (3, R + 2, R + 2)"
        )
    if region < 2 or side % region:
        raise ValueError(f"region size {region} does not divide image side {side}, or is below 2")
    if mode not in MODES or edge not in EDGES:
        raise ValueError(f"mode {mode!r} or edge {edge!r} is unknown; use {MODES} and {EDGES}")
    if not (images.is_contiguous() and template.is_contiguous() and kernel.is_contiguous()):
        raise ValueError("images, template and kernel must be contiguous; call .contiguous() first")


def _constants(images: Tensor, kernel: Tensor, **chosen: Any) -> dict[str, Any]:
    batch, side, region = images.shape[0], images.shape[-1], kernel.shape[-1] - 2
    shape = {"SIDE": side, "R": region, "UINT8": images.dtype == torch.uint8}
    return shape | chosen | launch_options(side, region, batch)


def _affine(images: Tensor, mean: list[float], std: list[float]) -> tuple[float, ...]:
    """Return scale and shift of each channel, which normalise uint8 pixels.

    For float images, which are already normalised, scales are 1 and shifts 0. They are numbers
    instead of a tensor because a copy to the device synchronises and cannot be captured.
    """
    if images.dtype != torch.uint8:
        return (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    shifts = (-m / s for m, s in zip(mean, std, strict=True))
    return (*(1 / (255 * s) for s in std), *shifts)


@torch.library.custom_op("adavipro::adaptive_prompt", mutates_args=())
def adaptive_prompt(
    images: Tensor, template: Tensor, kernel: Tensor, bias: Tensor, noise: Tensor | None, *,
    mode: str, edge: str, replicate: bool, tau: float, seed: int, offset: int,
    mean: list[float], std: list[float], dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Add the prompt to a batch in one kernel; `functional.adaptive_prompt` is its specification.

    Args:
        images: (B, 3, S, S), uint8 pixels or normalised fp32, fp16 or bf16; get no gradient.
        template: (3, S, S) fp32, P.
        kernel: (3, R + 2, R + 2) fp32, K of the collapsed generator.
        bias: () fp32, b of the collapsed generator.
        noise: (B, G, G) fp32 logistic noise; None draws it in the kernel.
        mode: soft, hard or argmax.
        edge: laplacian or laplacian-magnitude.
        replicate: edge padding is replicate, not zero.
        tau: temperature, > 0.
        seed: 64-bit key of the noise.
        offset: position in the noise stream of the batch's first number.
        mean: of each channel, for uint8 pixels.
        std: of each channel, for uint8 pixels.
        dtype: of the prompted images.

    Returns:
        Prompted images (B, 3, S, S) in `dtype`, Δ (B, G, G) fp32 and mask (B, G, G) fp32. Each
        image is read twice: once with a halo for the decision, and once, mostly from L2, to write
        the output.

    Raises:
        ValueError: shapes, mode or edge do not fit, or a tensor is not contiguous.
    """
    _check(images, template, kernel, mode, edge)
    constants = _constants(
        images, kernel,
        REPLICATE=replicate, MAGNITUDE=edge != "laplacian", MODE=mode, GIVEN=noise is not None,
    )  # fmt: skip
    batch, grid = images.shape[0], images.shape[-1] // (kernel.shape[-1] - 2)
    prompted = torch.empty_like(images, dtype=dtype)
    delta = torch.empty((batch, grid, grid), device=images.device)
    mask = torch.empty_like(delta)
    programs = (grid * grid, triton.cdiv(batch, constants["IMAGES"]))
    with torch.cuda.device_of(images):
        _forward[programs](
            images, template, kernel, bias, delta if noise is None else noise, prompted, delta,
            mask, batch, tau, seed, offset, *_affine(images, mean, std), **constants,
        )  # fmt: skip
    return prompted, delta, mask


@adaptive_prompt.register_fake
def _(images, template, kernel, bias, noise, **options):
    region = kernel.shape[-1] - 2
    grid = images.shape[-1] // region
    delta = images.new_empty((images.shape[0], grid, grid), dtype=torch.float32)
    return torch.empty_like(images, dtype=options["dtype"]), delta, torch.empty_like(delta)


@torch.library.custom_op("adavipro::adaptive_prompt_backward", mutates_args=())
def adaptive_prompt_backward(
    grad: Tensor, images: Tensor, template: Tensor, kernel: Tensor, delta: Tensor,
    noise: Tensor | None, *, mode: str, edge: str, replicate: bool, tau: float, seed: int,
    offset: int, mean: list[float], std: list[float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of `adaptive_prompt`, from its arguments, `grad` and `delta`.

    `grad` (B, 3, S, S) is g, the gradient of the prompted images; `delta` (B, G, G) is Δ of the
    forward pass. Returns the gradients of template (3, S, S), K (3, R + 2, R + 2) and b (), fp32.
    """
    constants = _constants(
        images, kernel,
        REPLICATE=replicate, MAGNITUDE=edge != "laplacian", MODE=mode, GIVEN=noise is not None,
    )  # fmt: skip
    batch, side, grid = images.shape[0], images.shape[-1], delta.shape[-1]
    blocks = triton.cdiv(batch, constants["IMAGES"])
    fresh: dict[str, Any] = {"device": images.device, "dtype": torch.float32}
    template_grad = torch.empty((blocks, 3, side, side), **fresh)
    # argmax is not differentiable, so the gradients of K and b are 0.
    make = torch.zeros if mode == "argmax" else torch.empty
    kernel_grad = make((blocks * grid * grid, *kernel.shape), **fresh)
    bias_grad = make(blocks * grid * grid, **fresh)
    with torch.cuda.device_of(images):
        _backward[(grid * grid, blocks)](
            images, template, delta if noise is None else noise, delta, grad.contiguous(),
            template_grad, kernel_grad, bias_grad,
            batch, tau, seed, offset, *_affine(images, mean, std), **constants,
        )  # fmt: skip
    return template_grad.sum(0), kernel_grad.sum(0), bias_grad.sum()


@adaptive_prompt_backward.register_fake
def _(grad, images, template, kernel, delta, noise, **options):
    return torch.empty_like(template), torch.empty_like(kernel), delta.new_empty(())


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    images, template, kernel, _, noise = inputs
    _, delta, _ = output
    ctx.save_for_backward(images, template, kernel, delta, noise)
    ctx.options = {k: v for k, v in keyword_only_inputs.items() if k != "dtype"}
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _delta_grad, _mask_grad):
    if grad is None:
        return None, None, None, None, None
    images, template, kernel, delta, noise = ctx.saved_tensors
    grads = adaptive_prompt_backward(grad, images, template, kernel, delta, noise, **ctx.options)
    return None, *grads, None


adaptive_prompt.register_autograd(_differentiate, setup_context=_setup_context)
