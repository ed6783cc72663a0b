"""Edge detector, mask decision, dilation and multiply-add in one pass over the image.

A program owns one region of a few images. It reads the region once with a halo of two pixels,
forms the Laplacian in registers, takes the dot product with the collapsed generator's kernel K,
adds noise, decides, adds the prompt template and writes the region. The backward pass reads image
and output gradient once, and leaves one partial sum of dP and dK per block of images, which are
then summed: no atomics, so gradients are deterministic.

Registers hold pieces of at most 32 x 32 pixels: a region of side R is PIECES x PIECES pieces of
side H. The edge values of a piece are formed in four tiles:

    core      H x H pixels    edges of rows and columns 1 .. H-2
    rows      8 x H pixels    edges of rows -1, 0, H-1, H, columns 1 .. H-2
    cols      H x 8 pixels    edges of columns -1, 0, H-1, H, rows 1 .. H-2
    corners   8 x 8 pixels    edges of the same rows and columns

The 8 of a tile are the two outermost rows or columns of the piece and the two beyond, at either
side; edges at -1 and H count where the region ends. Pixels that a tile shares with the one before
are handed over, so that (H + 4)² are loaded.

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
def _near(H: tl.constexpr):
    """Rows -2 .. 1 and H-2 .. H+1, and of which the edges count."""
    lane = tl.arange(0, 8)
    return tl.where(lane < 4, lane - 2, lane + H - 6), (lane % 4 == 1) | (lane % 4 == 2)


@triton.jit
def _positions(H: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr):
    """Rows and columns of a tile relative to its piece, and where its edges count."""
    row = tl.arange(0, LANES)
    row_counts = (row >= 1) & (row < H - 1)
    col, col_counts = row, row_counts
    if TILE == "rows" or TILE == "corners":
        row, row_counts = _near(H)
    if TILE == "cols" or TILE == "corners":
        col, col_counts = _near(H)
    return row[:, None], col[None, :], row_counts[:, None] & col_counts[None, :]


@triton.jit
def _load(
    channel_ptr, scale, shift, y, x, wanted,
    SIDE: tl.constexpr, UINT8: tl.constexpr, REPLICATE: tl.constexpr,
):  # fmt: skip
    """Load pixels of one channel, normalised, as fp32; outside the image 0 or the nearest pixel."""
    if REPLICATE:
        y = tl.minimum(tl.maximum(y, 0), SIDE - 1)
        x = tl.minimum(tl.maximum(x, 0), SIDE - 1)
    else:
        wanted = wanted & (y >= 0) & (y < SIDE) & (x >= 0) & (x < SIDE)
    pixels = tl.load(channel_ptr + y * SIDE + x, mask=wanted, other=0).to(tl.float32)
    return tl.where(wanted, pixels * scale + shift, 0.0) if UINT8 else pixels


@triton.jit
def _tiles(
    channel_ptr, scale, shift, top, left,
    SIDE: tl.constexpr, H: tl.constexpr, LANES: tl.constexpr,
    UINT8: tl.constexpr, REPLICATE: tl.constexpr,
):  # fmt: skip
    """Load a piece of one channel with its halo, each pixel once: core, rows, cols, corners."""
    row, col, _ = _positions(H, LANES, "core")
    near, _ = _near(H)
    down, across = near[:, None], near[None, :]
    within = (near >= 0) & (near < H)
    row_within, col_within = within[:, None], within[None, :]
    nearest = tl.minimum(tl.maximum(near, 0), H - 1)
    core = _load(
        channel_ptr, scale, shift, top + row, left + col, (row < H) & (col < H),
        SIDE, UINT8, REPLICATE,
    )  # fmt: skip
    rows = _load(
        channel_ptr, scale, shift, top + down, left + col, (col < H) & ~row_within,
        SIDE, UINT8, REPLICATE,
    )  # fmt: skip
    shared = tl.gather(core, tl.broadcast_to(nearest[:, None], (8, LANES)), 0)
    rows = tl.where(row_within, shared, rows)
    cols = _load(
        channel_ptr, scale, shift, top + row, left + across, (row < H) & ~col_within,
        SIDE, UINT8, REPLICATE,
    )  # fmt: skip
    shared = tl.gather(core, tl.broadcast_to(nearest[None, :], (LANES, 8)), 1)
    cols = tl.where(col_within, shared, cols)
    corners = _load(
        channel_ptr, scale, shift, top + down, left + across, ~row_within & ~col_within,
        SIDE, UINT8, REPLICATE,
    )  # fmt: skip
    shared = tl.gather(cols, tl.broadcast_to(nearest[:, None], (8, 8)), 0)
    corners = tl.where(row_within, shared, corners)
    shared = tl.gather(rows, tl.broadcast_to(nearest[None, :], (8, 8)), 1)
    return core, rows, cols, tl.where(col_within, shared, corners)


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
    gy, gx, py, px,
    SIDE: tl.constexpr, R: tl.constexpr, H: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Offsets into a channel of K and which lanes count: edges outside the image are 0."""
    row, col, counts = _positions(H, LANES, TILE)
    # Edges at an inner border belong to the piece that holds their pixel.
    counts = counts & ((row >= 0) | (py == 0)) & ((row < H) | (py == R // H - 1))
    counts = counts & ((col >= 0) | (px == 0)) & ((col < H) | (px == R // H - 1))
    row, col = py * H + row, px * H + col
    y, x = gy * R + row, gx * R + col
    inside = (y >= 0) & (y < SIDE) & (x >= 0) & (x < SIDE)
    return (row + 1) * (R + 2) + col + 1, counts & inside


@triton.jit
def _part(
    pixels, weight_ptr, gy, gx, py, px,
    SIDE: tl.constexpr, R: tl.constexpr, H: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """What the edges of a tile add to Δ."""
    at, used = _kernel_offsets(gy, gx, py, px, SIDE, R, H, LANES, TILE)
    weight = tl.load(weight_ptr + at, mask=used, other=0.0)
    return _total(_edges(pixels, MAGNITUDE) * weight)


@triton.jit
def _total(tile):
    return tl.sum(tl.sum(tile, 1), 0)


@triton.jit
def _logistic(uniform):
    margin: tl.constexpr = 2.0**-24
    uniform = tl.minimum(tl.maximum(uniform, margin), 1.0 - margin)
    return tl.log(uniform) - tl.log(1.0 - uniform)


@triton.jit
def _noisy(
    delta, noise_ptr, place, wanted, seed, offset, SAMPLED: tl.constexpr, GIVEN: tl.constexpr
):
    """Add logistic noise to Δ: given, or the stream's at `offset + place`."""
    if SAMPLED:
        if GIVEN:
            delta += tl.load(noise_ptr + place, mask=wanted, other=0.0)
        else:
            delta += _logistic(tl.rand(seed, offset + place))
    return delta


@triton.jit(do_not_specialize=["batch", "tau", "seed", "offset"])
def _forward(
    images_ptr, template_ptr, kernel_ptr, bias_ptr, affine_ptr, noise_ptr,
    prompted_ptr, delta_ptr, mask_ptr, batch, tau, seed, offset,
    SIDE: tl.constexpr, R: tl.constexpr, H: tl.constexpr, LANES: tl.constexpr,
    IMAGES: tl.constexpr, UINT8: tl.constexpr, REPLICATE: tl.constexpr, MAGNITUDE: tl.constexpr,
    MODE: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    region = tl.program_id(0)
    grid: tl.constexpr = SIDE // R
    plane: tl.constexpr = SIDE * SIDE
    weights: tl.constexpr = (R + 2) * (R + 2)
    pieces: tl.constexpr = R // H
    gy, gx = region // grid, region % grid
    bias = tl.load(bias_ptr)
    row, col, _ = _positions(H, LANES, "core")
    owned = (row < H) & (col < H)
    first = tl.program_id(1) * IMAGES
    for step in range(tl.minimum(IMAGES, batch - first)):
        image = (first + step).to(tl.int64)
        start = image * (3 * plane)
        delta = bias
        cores = ()
        for part in tl.static_range(3 * pieces * pieces):
            channel, py, px = part // (pieces * pieces), part // pieces % pieces, part % pieces
            scale, shift = tl.load(affine_ptr + channel), tl.load(affine_ptr + 3 + channel)
            core, rows, cols, corners = _tiles(
                images_ptr + start + channel * plane, scale, shift,
                gy * R + py * H, gx * R + px * H, SIDE, H, LANES, UINT8, REPLICATE,
            )  # fmt: skip
            cores += (core,)
            at = kernel_ptr + channel * weights
            delta += _part(core, at, gy, gx, py, px, SIDE, R, H, LANES, "core", MAGNITUDE)
            delta += _part(rows, at, gy, gx, py, px, SIDE, R, H, LANES, "rows", MAGNITUDE)
            delta += _part(cols, at, gy, gx, py, px, SIDE, R, H, LANES, "cols", MAGNITUDE)
            delta += _part(corners, at, gy, gx, py, px, SIDE, R, H, LANES, "corners", MAGNITUDE)
        place = image * (grid * grid) + region
        noisy = _noisy(delta, noise_ptr, place, True, seed, offset, MODE != "argmax", GIVEN)
        mask = (noisy > 0).to(tl.float32)
        if MODE == "soft":
            mask = tl.sigmoid(noisy / tau)
        tl.store(delta_ptr + place, delta)
        tl.store(mask_ptr + place, mask)
        for part in tl.static_range(3 * pieces * pieces):
            channel, py, px = part // (pieces * pieces), part // pieces % pieces, part % pieces
            pixel = (gy * R + py * H + row) * SIDE + gx * R + px * H + col
            at = channel * plane + pixel
            template = tl.load(template_ptr + at, mask=owned, other=0.0)
            tl.store(prompted_ptr + start + at, cores[part] + mask * template, mask=owned)


@triton.jit
def _pick(values, step, IMAGES: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, IMAGES) == step, values, 0.0), 0)


@triton.jit(do_not_specialize=["batch", "tau", "seed", "offset"])
def _backward(
    images_ptr, template_ptr, affine_ptr, noise_ptr, delta_ptr, grad_ptr,
    template_grad_ptr, kernel_grad_ptr, bias_grad_ptr, batch, tau, seed, offset,
    SIDE: tl.constexpr, R: tl.constexpr, H: tl.constexpr, LANES: tl.constexpr,
    IMAGES: tl.constexpr, UINT8: tl.constexpr, REPLICATE: tl.constexpr, MAGNITUDE: tl.constexpr,
    MODE: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    region, block = tl.program_id(0), tl.program_id(1)
    grid: tl.constexpr = SIDE // R
    plane: tl.constexpr = SIDE * SIDE
    weights: tl.constexpr = (R + 2) * (R + 2)
    pieces: tl.constexpr = R // H
    gy, gx = region // grid, region % grid
    row, col, _ = _positions(H, LANES, "core")
    owned = (row < H) & (col < H)
    first = block.to(tl.int64) * IMAGES
    count = tl.minimum(IMAGES, batch - first).to(tl.int32)
    # One lane an image, so that the sums of one channel at a time are all that is kept.
    lane = tl.arange(0, IMAGES)
    place = (first + lane) * (grid * grid) + region
    delta = tl.load(delta_ptr + place, mask=lane < count, other=0.0)
    noisy = _noisy(delta, noise_ptr, place, lane < count, seed, offset, MODE != "argmax", GIVEN)
    soft = tl.sigmoid(noisy / tau)
    mask = (noisy > 0).to(tl.float32)
    if MODE == "soft":
        mask = soft
    mask_grad = tl.zeros((IMAGES,), tl.float32)
    for part in range(3 * pieces * pieces):
        channel, py, px = part // (pieces * pieces), part // pieces % pieces, part % pieces
        pixel = (gy * R + py * H + row) * SIDE + gx * R + px * H + col
        at = channel * plane + pixel
        template = tl.load(template_ptr + at, mask=owned, other=0.0)
        template_grad = tl.zeros((LANES, LANES), tl.float32)
        for step in range(count):
            start = (first + step) * (3 * plane)
            grad = tl.load(grad_ptr + start + at, mask=owned, other=0.0).to(tl.float32)
            template_grad += _pick(mask, step, IMAGES) * grad
            mask_grad += tl.where(lane == step, _total(grad * template), 0.0)
        template_grad_at = template_grad_ptr + block.to(tl.int64) * (3 * plane) + at
        tl.store(template_grad_at, template_grad, mask=owned)
    delta_grad = mask_grad * soft * (1.0 - soft) / tau
    if MODE == "argmax":
        delta_grad = tl.zeros((IMAGES,), tl.float32)
    place = block.to(tl.int64) * (grid * grid) + region
    tl.store(bias_grad_ptr + place, tl.sum(delta_grad, 0))
    if MODE != "argmax":
        for part in range(3 * pieces * pieces):
            channel, py, px = part // (pieces * pieces), part // pieces % pieces, part % pieces
            scale, shift = tl.load(affine_ptr + channel), tl.load(affine_ptr + 3 + channel)
            core_grad = tl.zeros((LANES, LANES), tl.float32)
            rows_grad = tl.zeros((8, LANES), tl.float32)
            cols_grad = tl.zeros((LANES, 8), tl.float32)
            corners_grad = tl.zeros((8, 8), tl.float32)
            for step in range(count):
                start = (first + step) * (3 * plane) + channel * plane
                core, rows, cols, corners = _tiles(
                    images_ptr + start, scale, shift, gy * R + py * H, gx * R + px * H,
                    SIDE, H, LANES, UINT8, REPLICATE,
                )  # fmt: skip
                factor = _pick(delta_grad, step, IMAGES)
                core_grad += factor * _edges(core, MAGNITUDE)
                rows_grad += factor * _edges(rows, MAGNITUDE)
                cols_grad += factor * _edges(cols, MAGNITUDE)
                corners_grad += factor * _edges(corners, MAGNITUDE)
            part_ptr = kernel_grad_ptr + (place * 3 + channel) * weights
            # Edges outside the image are 0: their places of the partial sum stay 0.
            at, used = _kernel_offsets(gy, gx, py, px, SIDE, R, H, LANES, "core")
            tl.store(part_ptr + at, core_grad, mask=used)
            at, used = _kernel_offsets(gy, gx, py, px, SIDE, R, H, LANES, "rows")
            tl.store(part_ptr + at, rows_grad, mask=used)
            at, used = _kernel_offsets(gy, gx, py, px, SIDE, R, H, LANES, "cols")
            tl.store(part_ptr + at, cols_grad, mask=used)
            at, used = _kernel_offsets(gy, gx, py, px, SIDE, R, H, LANES, "corners")
            tl.store(part_ptr + at, corners_grad, mask=used)


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


def piece_size(region_size: int) -> int:
    """Return H, the side of the largest equal pieces of 2 to 32 pixels, or else the region's."""
    fitting = [h for h in range(2, 33) if region_size % h == 0]
    return max(fitting, default=region_size)


def launch_options(region_size: int, direction: str) -> dict[str, int]:
    """Choose images per program and warps; `bench/kernels.py --tune` measures the choices.

    More images share one read of K and P and one partial sum; fewer fill the device better.
    """
    # ptxas finds no spills with these, sm_80 to sm_120 (bench/results/kernels-aot.json). Forward,
    # 8 pixels a thread make a 16-byte store of bf16; more than one piece leaves no registers for
    # what a loop over images would keep.
    piece = piece_size(region_size)
    warps = 4 if piece > 16 else 2 if piece > 8 else 1
    if direction == "backward":
        return {"IMAGES": 16, "num_warps": 2 * warps}
    if piece < region_size:
        return {"IMAGES": 1, "num_warps": 2 * warps}
    return {"IMAGES": 8, "num_warps": warps}


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
    piece = piece_size(region)
    return {
        "SIDE": images.shape[-1],
        "R": region,
        "H": piece,
        "LANES": triton.next_power_of_2(piece),
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
        (R + 4)² / R² of the image up to R = 32, (H + 4)² / H² above, and writes it once.

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
