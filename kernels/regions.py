"""What one thread of the fused kernel does: places, edges, the decision, sums over threads.

A thread forms ROWS edges, one above the other, straight from the pixels around them: neighbours are
loaded again, by L1, which costs less than handing them from thread to thread.
"""

import triton
import triton.language as tl

# Two edges take 8 loads; one takes 5; with three there is little left to save.
ROWS = tl.constexpr(2)


@triton.constexpr_function
def edge_parts(R, BLOCK):
    """Count the parts of BLOCK threads that form all edges of a region."""
    return triton.cdiv(3 * (R + 2) * triton.cdiv(R + 2, ROWS), BLOCK)


@triton.constexpr_function
def pixel_parts(R, BLOCK, PIXELS):
    """Count the parts of BLOCK threads that write all pixels of a region."""
    return triton.cdiv(3 * R * R, BLOCK * PIXELS)


@triton.jit
def of_channel(channel, of_three):
    """Take the number of this thread's channel."""
    red, green, blue = of_three
    return tl.where(channel == 0, red, tl.where(channel == 1, green, blue))


@triton.jit
def scale_and_zero(channel, scales, shifts, UINT8: tl.constexpr):
    """Scale of this thread's pixels, and the pixel that is 0 once normalised."""
    scale, zero = 1.0, 0.0
    if UINT8:
        scale = of_channel(channel, scales)
        zero = -of_channel(channel, shifts) / scale
    return scale, zero


@triton.jit
def edge_places(part, gy, gx, SIDE: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """Place this thread's edges: at (c, y, x), (c, y + 1, x) of the (3, R + 2, R + 2) of K.

    Returns the channel, the first edge's offset into K, which of the edges exist in K (the last
    threads have none), which lie inside the image (others count 0), and where the pixels lie:
    offsets of the rows y - 1 .. y + ROWS, nearest where they are outside the image, of the columns
    beside, and how many of an edge's neighbours are outside.
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

    uint8 pixels are taken as they are: the caller multiplies by their scale. `zero` is the pixel
    that zero padding puts in the place of those outside, where the loaded ones are nearest ones.
    """
    pixels, left, right, borders = around
    wide: tl.constexpr = tl.int32 if UINT8 else tl.float32
    above = tl.load(image_ptr + pixels[0]).to(wide)
    here = tl.load(image_ptr + pixels[1]).to(wide)
    edges = ()
    for step in tl.static_range(ROWS):
        below = tl.load(image_ptr + pixels[step + 2]).to(wide)
        edge = above + below - 4 * here
        edge += tl.load(image_ptr + pixels[step + 1] + left).to(wide)
        edge += tl.load(image_ptr + pixels[step + 1] + right).to(wide)
        if UINT8:
            # 3 * 2**22 + e as a float holds e in its last bits: an addition, no slow conversion.
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
    """Place this thread's PIXELS adjacent pixels: channel, offsets into an image, whether real."""
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
    """m = (Δ + ε > 0), and σ((Δ + ε) / τ), which is m itself where MODE is soft.

    The noise ε is given, or the stream's at `offset + place`; 0 where MODE is argmax.
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
    """COUNT sums of 0 in each thread, one an image or row."""
    totals = ()
    for _ in tl.static_range(COUNT):
        totals += (tl.zeros((BLOCK,), tl.float32),)
    return totals


@triton.jit
def gathered(totals, IMAGES: tl.constexpr):
    """Σ over threads of each image's totals: IMAGES tensors (BLOCK,) to one (IMAGES,)."""
    sums = tl.zeros((IMAGES,), tl.float32)
    for image in tl.static_range(IMAGES):
        sums += tl.where(tl.arange(0, IMAGES) == image, tl.sum(totals[image], 0), 0.0)
    return sums


@triton.jit
def scattered(lanes, IMAGES: tl.constexpr):
    """One number an image: a tensor (IMAGES,) to IMAGES scalars, each known to all threads."""
    numbers = ()
    for image in tl.static_range(IMAGES):
        numbers += (tl.sum(tl.where(tl.arange(0, IMAGES) == image, lanes, 0.0), 0),)
    return numbers
