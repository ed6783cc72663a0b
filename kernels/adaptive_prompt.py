"""Edge detector, mask decision, dilation and multiply-add in one pass over the image.

A program owns one region of a few images. It reads the region once with a halo of two pixels,
forms the Laplacian in registers, takes the dot product with the collapsed generator's kernel K,
adds noise, decides, adds the prompt template and writes the region. The backward pass reads image
and output gradient once, and leaves one partial sum of dP and dK per block of images, which are
then summed: no atomics, so gradients are deterministic.

The (R + 2)² edge values of a region are formed in three tiles whose loads overlap little:

    core   R x R pixels         edges of rows and columns 1 .. R-2
    rows   8 x (R + 4) pixels   edges of rows -1, 0, R-1, R
    cols   R x 8 pixels         edges of columns -1, 0, R-1, R of the rows 1 .. R-2

Axes and words are `functional.py`'s.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MODES = ("soft", "hard", "argmax")
EDGES = ("laplacian", "laplacian-magnitude")


@triton.jit
def _positions(R: tl.constexpr, RP: tl.constexpr, WP: tl.constexpr, TILE: tl.constexpr):
    """Rows and columns of a tile relative to its region, and where its edges count."""
    if TILE == "core":
        row = tl.arange(0, RP)[:, None]
        col = tl.arange(0, RP)[None, :]
        counts = (row >= 1) & (row < R - 1) & (col >= 1) & (col < R - 1)
    elif TILE == "rows":
        near = tl.arange(0, 8)[:, None]
        row = tl.where(near < 4, near - 2, near + R - 6)
        col = tl.arange(0, WP)[None, :] - 2
        counts = ((near % 4 == 1) | (near % 4 == 2)) & (col >= -1) & (col <= R)
    else:
        row = tl.arange(0, WP)[:, None] - 2
        near = tl.arange(0, 8)[None, :]
        col = tl.where(near < 4, near - 2, near + R - 6)
        counts = ((near % 4 == 1) | (near % 4 == 2)) & (row >= 1) & (row < R - 1)
    return row, col, counts


@triton.jit
def _pixels(
    channel_ptr, scale, shift, gy, gx,
    SIDE: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, WP: tl.constexpr, TILE: tl.constexpr,
    UINT8: tl.constexpr, REPLICATE: tl.constexpr,
):  # fmt: skip
    """Load a tile of one channel, normalised, as fp32; outside the image 0 or the nearest pixel."""
    row, col, _ = _positions(R, RP, WP, TILE)
    y, x = gy * R + row, gx * R + col
    if TILE == "core":
        wanted = (row < R) & (col < R)
    else:
        wanted = (row < R + 2) & (col < R + 2)
        if TILE == "cols":
            wanted = wanted & (row >= 0) & (row < R)
        if REPLICATE:
            y = tl.minimum(tl.maximum(y, 0), SIDE - 1)
            x = tl.minimum(tl.maximum(x, 0), SIDE - 1)
        else:
            wanted = wanted & (y >= 0) & (y < SIDE) & (x >= 0) & (x < SIDE)
    pixels = tl.load(channel_ptr + y * SIDE + x, mask=wanted, other=0).to(tl.float32)
    return tl.where(wanted, pixels * scale + shift, 0.0) if UINT8 else pixels


@triton.jit
def _edges(pixels, MAGNITUDE: tl.constexpr):
    """Laplacian of a tile from its own lanes; the outermost lanes are not valid."""
    rows: tl.constexpr = pixels.shape[0]
    cols: tl.constexpr = pixels.shape[1]
    row = tl.broadcast_to(tl.arange(0, rows)[:, None], pixels.shape)
    col = tl.broadcast_to(tl.arange(0, cols)[None, :], pixels.shape)
    total = tl.gather(pixels, tl.maximum(row - 1, 0), 0)
    total += tl.gather(pixels, tl.minimum(row + 1, rows - 1), 0)
    total += tl.gather(pixels, tl.maximum(col - 1, 0), 1)
    total += tl.gather(pixels, tl.minimum(col + 1, cols - 1), 1)
    edges = total - 4.0 * pixels
    return tl.abs(edges) if MAGNITUDE else edges


@triton.jit
def _kernel_offsets(
    gy, gx,
    SIDE: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, WP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Offsets into a channel of K and which lanes count: edges outside the image are 0."""
    row, col, counts = _positions(R, RP, WP, TILE)
    y, x = gy * R + row, gx * R + col
    inside = (y >= 0) & (y < SIDE) & (x >= 0) & (x < SIDE)
    return (row + 1) * (R + 2) + col + 1, counts & inside


@triton.jit
def _tile_logit(
    channel_ptr, kernel_ptr, scale, shift, gy, gx,
    SIDE: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, WP: tl.constexpr, TILE: tl.constexpr,
    UINT8: tl.constexpr, REPLICATE: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """Load a tile of one channel; return its pixels and what its edges add to Δ."""
    pixels = _pixels(
        channel_ptr, scale, shift, gy, gx, SIDE, R, RP, WP, TILE, UINT8, REPLICATE
    )  # fmt: skip
    at, used = _kernel_offsets(gy, gx, SIDE, R, RP, WP, TILE)
    weight = tl.load(kernel_ptr + at, mask=used, other=0.0)
    return pixels, _total(_edges(pixels, MAGNITUDE) * weight)


@triton.jit
def _total(tile):
    return tl.sum(tl.sum(tile, 1), 0)


@triton.jit
def _logistic(uniform):
    margin: tl.constexpr = 2.0**-24
    uniform = tl.minimum(tl.maximum(uniform, margin), 1.0 - margin)
    return tl.log(uniform) - tl.log(1.0 - uniform)


@triton.jit
def _noisy(delta, noise_ptr, place, seed, offset, SAMPLED: tl.constexpr, GIVEN: tl.constexpr):
    """Add logistic noise to a region's Δ: given, or the stream's at `offset + place`."""
    if SAMPLED:
        if GIVEN:
            delta += tl.load(noise_ptr + place)
        else:
            delta += _logistic(tl.rand(seed, offset + place))
    return delta


@triton.jit(do_not_specialize=["batch", "tau", "seed", "offset"])
def _forward(
    images_ptr, template_ptr, kernel_ptr, bias_ptr, affine_ptr, noise_ptr,
    prompted_ptr, delta_ptr, mask_ptr, batch, tau, seed, offset,
    SIDE: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, WP: tl.constexpr,
    IMAGES: tl.constexpr, UINT8: tl.constexpr, REPLICATE: tl.constexpr, MAGNITUDE: tl.constexpr,
    MODE: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    region = tl.program_id(0)
    grid: tl.constexpr = SIDE // R
    plane: tl.constexpr = SIDE * SIDE
    weights: tl.constexpr = (R + 2) * (R + 2)
    gy, gx = region // grid, region % grid
    bias = tl.load(bias_ptr)
    row, col, _ = _positions(R, RP, WP, "core")
    pixel = (gy * R + row) * SIDE + gx * R + col
    owned = (row < R) & (col < R)
    first = tl.program_id(1) * IMAGES
    for step in range(tl.minimum(IMAGES, batch - first)):
        image = (first + step).to(tl.int64)
        start = image * (3 * plane)
        delta = bias
        core = ()
        for channel in tl.static_range(3):
            scale, shift = tl.load(affine_ptr + channel), tl.load(affine_ptr + 3 + channel)
            channel_ptr = images_ptr + start + channel * plane
            weight_ptr = kernel_ptr + channel * weights
            pixels, part = _tile_logit(
                channel_ptr, weight_ptr, scale, shift, gy, gx,
                SIDE, R, RP, WP, "core", UINT8, REPLICATE, MAGNITUDE,
            )  # fmt: skip
            core += (pixels,)
            delta += part
            delta += _tile_logit(
                channel_ptr, weight_ptr, scale, shift, gy, gx,
                SIDE, R, RP, WP, "rows", UINT8, REPLICATE, MAGNITUDE,
            )[1]  # fmt: skip
            delta += _tile_logit(
                channel_ptr, weight_ptr, scale, shift, gy, gx,
                SIDE, R, RP, WP, "cols", UINT8, REPLICATE, MAGNITUDE,
            )[1]  # fmt: skip
        place = image * (grid * grid) + region
        noisy = _noisy(delta, noise_ptr, place, seed, offset, MODE != "argmax", GIVEN)
        mask = (noisy > 0).to(tl.float32)
        if MODE == "soft":
            mask = tl.sigmoid(noisy / tau)
        tl.store(delta_ptr + place, delta)
        tl.store(mask_ptr + place, mask)
        for channel in tl.static_range(3):
            at = channel * plane + pixel
            template = tl.load(template_ptr + at, mask=owned, other=0.0)
            tl.store(prompted_ptr + start + at, core[channel] + mask * template, mask=owned)


@triton.jit(do_not_specialize=["batch", "tau", "seed", "offset"])
def _backward(
    images_ptr, template_ptr, affine_ptr, noise_ptr, delta_ptr, grad_ptr,
    template_grad_ptr, kernel_grad_ptr, bias_grad_ptr, batch, tau, seed, offset,
    SIDE: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, WP: tl.constexpr,
    IMAGES: tl.constexpr, UINT8: tl.constexpr, REPLICATE: tl.constexpr, MAGNITUDE: tl.constexpr,
    MODE: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    region, block = tl.program_id(0), tl.program_id(1)
    grid: tl.constexpr = SIDE // R
    plane: tl.constexpr = SIDE * SIDE
    weights: tl.constexpr = (R + 2) * (R + 2)
    gy, gx = region // grid, region % grid
    row, col, _ = _positions(R, RP, WP, "core")
    pixel = (gy * R + row) * SIDE + gx * R + col
    owned = (row < R) & (col < R)
    none = tl.zeros((RP, RP), tl.float32)
    template_grads = (none, none, none)
    core_grads = (none, none, none)
    none = tl.zeros((8, WP), tl.float32)
    rows_grads = (none, none, none)
    none = tl.zeros((WP, 8), tl.float32)
    cols_grads = (none, none, none)
    bias_grad = 0.0
    first = block * IMAGES
    for step in range(tl.minimum(IMAGES, batch - first)):
        image = (first + step).to(tl.int64)
        start = image * (3 * plane)
        place = image * (grid * grid) + region
        delta = tl.load(delta_ptr + place)
        noisy = _noisy(delta, noise_ptr, place, seed, offset, MODE != "argmax", GIVEN)
        soft = tl.sigmoid(noisy / tau)
        mask = (noisy > 0).to(tl.float32)
        if MODE == "soft":
            mask = soft
        mask_grad = 0.0
        sums = ()
        for channel in tl.static_range(3):
            at = channel * plane + pixel
            grad = tl.load(grad_ptr + start + at, mask=owned, other=0.0).to(tl.float32)
            sums += (template_grads[channel] + mask * grad,)
            template = tl.load(template_ptr + at, mask=owned, other=0.0)
            mask_grad += _total(grad * template)
        template_grads = sums
        if MODE != "argmax":
            delta_grad = mask_grad * soft * (1.0 - soft) / tau
            bias_grad += delta_grad
            core_sums, rows_sums, cols_sums = (), (), ()
            for channel in tl.static_range(3):
                scale, shift = tl.load(affine_ptr + channel), tl.load(affine_ptr + 3 + channel)
                channel_ptr = images_ptr + start + channel * plane
                pixels = _pixels(
                    channel_ptr, scale, shift, gy, gx, SIDE, R, RP, WP, "core", UINT8, REPLICATE
                )  # fmt: skip
                core_sums += (core_grads[channel] + delta_grad * _edges(pixels, MAGNITUDE),)
                pixels = _pixels(
                    channel_ptr, scale, shift, gy, gx, SIDE, R, RP, WP, "rows", UINT8, REPLICATE
                )  # fmt: skip
                rows_sums += (rows_grads[channel] + delta_grad * _edges(pixels, MAGNITUDE),)
                pixels = _pixels(
                    channel_ptr, scale, shift, gy, gx, SIDE, R, RP, WP, "cols", UINT8, REPLICATE
                )  # fmt: skip
                cols_sums += (cols_grads[channel] + delta_grad * _edges(pixels, MAGNITUDE),)
            core_grads, rows_grads, cols_grads = core_sums, rows_sums, cols_sums
    part = block.to(tl.int64) * (grid * grid) + region
    tl.store(bias_grad_ptr + part, bias_grad)
    template_ptr = template_grad_ptr + block.to(tl.int64) * (3 * plane) + pixel
    part_ptr = kernel_grad_ptr + part * (3 * weights)
    for channel in tl.static_range(3):
        tl.store(template_ptr + channel * plane, template_grads[channel], mask=owned)
        # Edges outside the image are 0: their places of the partial sum stay 0.
        at, used = _kernel_offsets(gy, gx, SIDE, R, RP, WP, "core")
        tl.store(part_ptr + channel * weights + at, core_grads[channel], mask=used)
        at, used = _kernel_offsets(gy, gx, SIDE, R, RP, WP, "rows")
        tl.store(part_ptr + channel * weights + at, rows_grads[channel], mask=used)
        at, used = _kernel_offsets(gy, gx, SIDE, R, RP, WP, "cols")
        tl.store(part_ptr + channel * weights + at, cols_grads[channel], mask=used)


@triton.jit(do_not_specialize=["count", "seed", "offset"])
def _logistic_noise(noise_ptr, count, seed, offset, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    noise = _logistic(tl.rand(seed, offset + place))
    tl.store(noise_ptr + place, noise, mask=place < count)


def logistic_noise(
    seed: int, offset: int, count: int, device: torch.device | None = None
) -> Tensor:
    """Draw the noise that the kernel draws: numbers `offset` to `offset + count` of the stream."""
    noise = torch.empty(count, device=device)
    _logistic_noise[(triton.cdiv(count, 1024),)](noise, count, seed, offset, BLOCK=1024)
    return noise


def launch_options(region_size: int, direction: str) -> dict[str, int]:
    """Choose images per program and warps; `bench/kernels.py --tune` measures the choices.

    More images share one read of K and P and one partial sum; fewer fill the device better.
    """
    # Forward, 8 pixels a thread and channel make a 16-byte store of bf16; the gradients' sums need
    # twice the threads (ptxas, sm_80 to sm_120: no spills but in the backward pass at R > 32).
    warps = 8 if region_size > 32 else 4 if region_size > 16 else 2 if region_size > 8 else 1
    if direction == "forward":
        return {"IMAGES": 8, "num_warps": warps}
    return {"IMAGES": 16, "num_warps": 2 * warps}


def _check(images: Tensor, template: Tensor, kernel: Tensor, mode: str, edge: str) -> None:
    """Raise ValueError where the fused kernel cannot do what is asked."""
    side, region = images.shape[-1], kernel.shape[-1] - 2
    if images.ndim != 4 or images.shape[1:] != (3, side, side):
        raise ValueError(f"images have shape {tuple(images.shape)}; (B, 3, S, S) is needed")
    if template.shape != (3, side, side) or kernel.shape != (3, region + 2, region + 2):
        raise ValueError(
            f"template {tuple(template.shape)} or kernel {tuple(kernel.shape)} does not fit images "
            f"of side {side}; (3, S, S) and (3, R + 2, R + 2) are needed"
        )
    if region < 2 or side % region:
        raise ValueError(f"region size {region} does not divide image side {side}, or is below 2")
    if mode not in MODES or edge not in EDGES:
        raise ValueError(f"mode {mode!r} or edge {edge!r} is unknown; use {MODES} and {EDGES}")
    if not (images.is_contiguous() and template.is_contiguous() and kernel.is_contiguous()):
        raise ValueError("images, template and kernel must be contiguous; call .contiguous() first")


def _constants(images: Tensor, kernel: Tensor, direction: str, **chosen: Any) -> dict[str, Any]:
    region = kernel.shape[-1] - 2
    return {
        "SIDE": images.shape[-1],
        "R": region,
        "RP": triton.next_power_of_2(region),
        "WP": triton.next_power_of_2(region + 4),
        "UINT8": images.dtype == torch.uint8,
        **chosen,
        **launch_options(region, direction),
    }


def _affine(mean: list[float], std: list[float], device: torch.device) -> Tensor:
    """Six numbers that normalise pixels 0-255: scale and shift of each channel."""
    scale = [1 / (255 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    return torch.tensor(scale + shift, device=device)


@torch.library.custom_op("adavipro::adaptive_prompt", mutates_args=())
def adaptive_prompt(
    images: Tensor,
    template: Tensor,
    kernel: Tensor,
    bias: Tensor,
    noise: Tensor | None,
    *,
    mode: str,
    edge: str,
    replicate: bool,
    tau: float,
    seed: int,
    offset: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt a batch in one pass; `functional.adaptive_prompt` says what it computes.

    Args:
        images: (B, 3, S, S), uint8 pixels or normalised fp32, fp16 or bf16; gets no gradient.
        template: (3, S, S) fp32, P.
        kernel: (3, R + 2, R + 2) fp32, K of the collapsed generator.
        bias: () fp32, b of the collapsed generator.
        noise: (B, G, G) fp32 logistic noise; none draws it in the kernel.
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
        Prompted images (B, 3, S, S) in `dtype`, Δ (B, G, G) fp32 and mask (B, G, G) fp32. Reads
        (R + 4)² / R² of the image (and as much again of the halo's inner side, from cache), writes
        it once.

    Raises:
        ValueError: shapes, mode or edge do not fit, or a tensor is not contiguous.
    """
    _check(images, template, kernel, mode, edge)
    constants = _constants(
        images, kernel, "forward",
        REPLICATE=replicate, MAGNITUDE=edge != "laplacian", MODE=mode, GIVEN=noise is not None,
    )  # fmt: skip
    batch, grid = images.shape[0], images.shape[-1] // (kernel.shape[-1] - 2)
    prompted = torch.empty_like(images, dtype=dtype)
    delta = torch.empty((batch, grid, grid), device=images.device)
    mask = torch.empty_like(delta)
    affine = _affine(mean, std, images.device)
    programs = (grid * grid, triton.cdiv(batch, constants["IMAGES"]))
    _forward[programs](
        images, template, kernel, bias, affine, delta if noise is None else noise,
        prompted, delta, mask, batch, tau, seed, offset, **constants,
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
    grad: Tensor,
    images: Tensor,
    template: Tensor,
    kernel: Tensor,
    delta: Tensor,
    noise: Tensor | None,
    *,
    mode: str,
    edge: str,
    replicate: bool,
    tau: float,
    seed: int,
    offset: int,
    mean: list[float],
    std: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `adaptive_prompt`: gradients of template, K and b, in one pass.

    dP = Σ m ⊙ g; dΔ = (Σ g ⊙ P) · s (1 - s) / τ with s the soft mask; dK = Σ dΔ · edges; db = Σ dΔ.

    Args:
        grad: (B, 3, S, S), g, gradient of the prompted images.
        images: as in the forward pass, like all that follows.
        template: (3, S, S).
        kernel: (3, R + 2, R + 2), for its shape.
        delta: (B, G, G), from the forward pass.
        noise: (B, G, G) or none.
        mode: see `adaptive_prompt`, also for the rest.
        edge: edge detector.
        replicate: edge padding.
        tau: temperature.
        seed: of the noise.
        offset: of the noise.
        mean: of each channel.
        std: of each channel.

    Returns:
        Gradients (3, S, S), (3, R + 2, R + 2) and (), fp32.
    """
    constants = _constants(
        images, kernel, "backward",
        REPLICATE=replicate, MAGNITUDE=edge != "laplacian", MODE=mode, GIVEN=noise is not None,
    )  # fmt: skip
    batch, side, grid = images.shape[0], images.shape[-1], delta.shape[-1]
    blocks = triton.cdiv(batch, constants["IMAGES"])
    fresh: dict[str, Any] = {"device": images.device, "dtype": torch.float32}
    template_grad = torch.empty((blocks, 3, side, side), **fresh)
    kernel_grad = torch.zeros((blocks * grid * grid, *kernel.shape), **fresh)
    bias_grad = torch.empty(blocks * grid * grid, **fresh)
    _backward[(grid * grid, blocks)](
        images, template, _affine(mean, std, images.device), delta if noise is None else noise,
        delta, grad.contiguous(), template_grad, kernel_grad, bias_grad,
        batch, tau, seed, offset, **constants,
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
