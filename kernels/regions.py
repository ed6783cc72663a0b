"""The work of a thread of the fused kernel: offsets, edges, the decision, sums over threads.

A thread computes ROWS edges, one above the other, directly from the pixels around them. It loads
neighbouring pixels again, from L1, which is cheaper than exchanging them between threads.
"""

import triton
import triton.language as tl

# One edge needs 5 loads and two need 8; three would save little more.
ROWS = tl.constexpr(2)


@triton.constexpr_function
def edge_parts(R, BLOCK):
    """Return how many parts of BLOCK threads cover all edges of a region."""
    return triton.cdiv(3 * (R + 2) * triton.cdiv(R + 2, ROWS), BLOCK)


@triton.constexpr_function
def pixel_parts(R, BLOCK, PIXELS):
    """Return how many parts of BLOCK threads cover all pixels of a region."""
    return triton.cdiv(3 * R * R, BLOCK * PIXELS)


@triton.jit
def of_channel(channel, of_three):
    """Select the value of this thread's channel."""
    red, green, blue = of_three
    return tl.where(channel == 0, red, tl.where(channel == 1, green, blue))


@triton.jit
def scale_and_zero(channel, scales, shifts, UINT8: tl.constexpr):
    """Return the scale of this thread's pixels, and the pixel value that normalises to 0."""
    scale, zero = 1.0, 0.0
    if UINT8:
        scale = of_channel(channel, scales)
        zero = -of_channel(channel, shifts) / scale
    return scale, zero


@triton.jit
def edge_places(part, gy, gx, SIDE: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """Locate this thread's edges: (c, y, x) and (c, y + 1, x) in the (3, R + 2, R + 2) of K.

    Returns:
        The channel; the first edge's offset into K; which of the edges exist in K (the last threads
        have no edges); which are inside the image (others count 0); and the pixels around them:
        offsets of the rows y - 1 .. y + ROWS, clamped to the image; relative offsets of the columns
        to the left and right; and how many of each edge's neighbours are outside the image.
    """
    flat = part * BLOCK + tl.arange(0, BLOCK)
    runs: tl.constexpr = triton.cdiv(R + 2, ROWS)
    channel, row, col = flat // (runs * (R + 2)), flat // (R + 2) % runs * ROWS, flat % (R + 2)
    real = channel < 3
    channel = tl.minimum(channel, 2)
    y, x = gy * R + row - 1, gx * R + col - 1
    nearest = tl.minimum(tl.maximum(x, 0), SIDE - 1)
    left, right = tl.maximum(nearest - 1, 0) - nearest, tl.minimum(nearest + 1, SIDE - 1) - nearest
    pixels, exist, inside, borders = (), (), (), ()
    for step in tl.static_range(ROWS + 2):
        near_row = tl.minimum(tl.maximum(y + step - 1, 0), SIDE - 1)
        pixels += (channel * (SIDE * SIDE) + near_row * SIDE + nearest,)
    for step in tl.static_range(ROWS):
        real_row = real & (row + step < R + 2)
        exist += (real_row,)
        in_rows = (y + step >= 0) & (y + step < SIDE)
        inside += (real_row & in_rows & (x >= 0) & (x < SIDE),)
        at_side = (x == 0).to(tl.float32) + (x == SIDE - 1).to(tl.float32)
        at_end = (y + step == 0).to(tl.float32) + (y + step == SIDE - 1).to(tl.float32)
        borders += (at_side + at_end,)
    weight = (channel * (R + 2) + row) * (R + 2) + col
    return channel, weight, exist, inside, (pixels, left, right, borders)


@triton.jit
def form_edges(
    image_ptr, around, zero, UINT8: tl.constexpr, REPLICATE: tl.constexpr, MAGNITUDE: tl.constexpr
):
    """e = x[y-1] + x[y+1] + x[x-1] + x[x+1] - 4 x, or |e|, of this thread's edges in one image.

    uint8 pixels are not scaled here: the caller multiplies by their scale. Pixels outside the image
    are loaded as the nearest inside; zero padding replaces them with `zero`, the pixel value that
    normalises to 0.
    """
    pixels, left, right, borders = around
    dtype: tl.constexpr = tl.int32 if UINT8 else tl.float32
    above = tl.load(image_ptr + pixels[0]).to(dtype)
    here = tl.load(image_ptr + pixels[1]).to(dtype)
    edges = ()
    for step in tl.static_range(ROWS):
        below = tl.load(image_ptr + pixels[step + 2]).to(dtype)
        edge = above + below - 4 * here
        edge += tl.load(image_ptr + pixels[step + 1] + left).to(dtype)
        edge += tl.load(image_ptr + pixels[step + 1] + right).to(dtype)
        if UINT8:
            # The float 3 * 2**22 + e has e in its last bits, so an addition of integers replaces
            # a slow conversion.
            edge = (edge + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
        if not REPLICATE:
            edge += borders[step] * (zero - here.to(tl.float32))
        edges += (tl.abs(edge) if MAGNITUDE else edge,)
        above, here = here, below
    return edges


@triton.jit
def pixel_places(
    part, gy, gx, SIDE: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr
):
    """Locate this thread's PIXELS adjacent pixels: channel, offsets into an image, whether real."""
    flat = part * BLOCK + tl.arange(0, BLOCK)
    groups: tl.constexpr = R // PIXELS
    channel, row, group = flat // (R * groups), flat // groups % R, flat % groups
    real = channel < 3
    channel = tl.minimum(channel, 2)
    start = channel * (SIDE * SIDE) + (gy * R + row) * SIDE + gx * R + group * PIXELS
    pixels = tl.multiple_of(start, PIXELS)[:, None] + tl.arange(0, PIXELS)[None, :]
    return channel, pixels, real[:, None]


@triton.jit
def logistic(uniform):
    """ε = log(u / (1 - u)), finite."""
    margin: tl.constexpr = 2.0**-24
    uniform = tl.minimum(tl.maximum(uniform, margin), 1.0 - margin)
    return tl.log(uniform) - tl.log(1.0 - uniform)


@triton.jit
def decide(
    delta, noise_ptr, place, wanted, tau, seed, offset, MODE: tl.constexpr, GIVEN: tl.constexpr
):
    """Return m = (Δ + ε > 0) and σ((Δ + ε) / τ); with MODE soft, m is the latter.

    The noise ε is given or drawn from the stream at `offset + place`; it is 0 with MODE argmax.
    """
    if MODE != "argmax":
        if GIVEN:
            delta += tl.load(noise_ptr + place, mask=wanted, other=0.0)
        else:
            delta += logistic(tl.rand(seed, offset + place))
    soft = tl.sigmoid(delta / tau)
    return soft if MODE == "soft" else (delta > 0).to(tl.float32), soft


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Return COUNT zero-initialised sums per thread, one per image or row."""
    totals = ()
    for _ in tl.static_range(COUNT):
        totals += (tl.zeros((BLOCK,), tl.float32),)
    return totals


@triton.jit
def gathered(totals, IMAGES: tl.constexpr):
    """Sum each image's totals over threads: IMAGES tensors (BLOCK,) to one (IMAGES,)."""
    sums = tl.zeros((IMAGES,), tl.float32)
    for image in tl.static_range(IMAGES):
        sums += tl.where(tl.arange(0, IMAGES) == image, tl.sum(totals[image], 0), 0.0)
    return sums


@triton.jit
def scattered(lanes, IMAGES: tl.constexpr):
    """Split a tensor (IMAGES,) into IMAGES scalars, each available to all threads."""
    numbers = ()
    for image in tl.static_range(IMAGES):
        numbers += (tl.sum(tl.where(tl.arange(0, IMAGES) == image, lanes, 0.0), 0),)
    return numbers
