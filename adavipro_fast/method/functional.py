"""The method in plain PyTorch: the specification that the fast paths are tested against.

A prompt template P is added to an image x in the regions that a mask m selects:

    e  = edges(x)                               edge detector (paper eq. 3)
    Δ  = F_p(F_c(e))[apply] - F_p(F_c(e))[discard]   mask generator, one number per region
    m  = Δ > 0                                  inference (eq. 4); training adds noise (eq. 6, 7)
    x' = x + dilate(m) * P                      eq. 5

Without an activation between F_c and F_p the generator is linear, so `collapse` turns its two
convolutions into one kernel K and one bias b with Δ = conv2d(e, K, stride=R, padding=1) + b.

Axes: B batch, S image side, R region side, G = S / R regions per side, D generator width.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Edge = Literal["laplacian", "laplacian-magnitude", "sobel", "none"]
EdgePadding = Literal["zero", "replicate"]
Mode = Literal["soft", "hard", "argmax"]
Activation = Literal["none", "relu"]
LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))
SOBEL_X = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
# Uniform draws are kept this far from 0 and 1, which bounds the logistic noise to ±16.6.
UNIFORM_MARGIN = 2.0**-24


def check_region(image_size: int, region_size: int) -> None:
    """Raise ValueError unless regions of side `region_size` tile an image of side `image_size`."""
    if region_size < 1 or image_size % region_size:
        fitting = [r for r in (8, 14, 16, 28, 32, 56) if image_size % r == 0]
        fitting = fitting or [r for r in range(1, image_size + 1) if image_size % r == 0]
        raise ValueError(
            f"region size {region_size} does not divide image side {image_size}; "
            f"use one of {', '.join(map(str, fitting))}"
        )


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise pixels for the encoder: (images / 255 - mean) / std.

    Args:
        images: (B, 3, S, S), uint8 RGB in 0-255.
        mean: (3,), on the 0-1 scale.
        std: (3,), on the 0-1 scale.

    Returns:
        (B, 3, S, S) in the dtype of `mean`.
    """
    scaled = images.to(mean.dtype).div_(255)
    return scaled.sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))


def edge_map(images: Tensor, edge: Edge, padding: EdgePadding) -> Tensor:
    """Detect edges channel by channel (paper eq. 3 for `laplacian`).

    Args:
        images: (B, 3, S, S), normalised.
        edge: `laplacian` is signed and has 4 neighbours; `laplacian-magnitude` is its absolute
            value; `sobel` is the length of the gradient; `none` is the image itself.
        padding: values outside the image.

    Returns:
        (B, 3, S, S), in the dtype of `images`.
    """
    if edge not in get_args(Edge):
        raise ValueError(f"edge detector {edge!r} is unknown; use one of {get_args(Edge)}")
    if edge == "none":
        return images
    mode = "replicate" if padding == "replicate" else "constant"
    padded = F.pad(images, (1, 1, 1, 1), mode=mode)
    # Shifted views take half the time of a depthwise convolution on a CPU, and are never rounded
    # to TF32 on a GPU.
    if edge == "sobel":
        left, right = padded[..., :-2], padded[..., 2:]
        top, bottom = padded[..., :-2, :], padded[..., 2:, :]
        return torch.hypot(_smooth(right - left, -2), _smooth(bottom - top, -1))
    signed = padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1]
    signed += padded[..., 1:-1, :-2]
    signed += padded[..., 1:-1, 2:]
    signed.sub_(images, alpha=4)
    return signed.abs_() if edge == "laplacian-magnitude" else signed


def _smooth(differences: Tensor, axis: int) -> Tensor:
    """Sum three neighbours along an axis with weights 1, 2, 1."""
    count = differences.shape[axis] - 2
    first, middle, last = (differences.narrow(axis, start, count) for start in range(3))
    return first + 2 * middle + last


def uncollapsed_logit(
    edges: Tensor,
    convergence_weight: Tensor,
    convergence_bias: Tensor,
    policy_weight: Tensor,
    policy_bias: Tensor,
    activation: Activation = "none",
) -> Tensor:
    """Compute Δ as in the paper: F_p(F_c(e))[apply] - F_p(F_c(e))[discard].

    Args:
        edges: (B, 3, S, S).
        convergence_weight: (D, 3, 3, 3), W_c.
        convergence_bias: (D,), b_c.
        policy_weight: (2, D, R, R), W_p; index 0 discards, 1 applies.
        policy_bias: (2,), b_p.
        activation: between F_c and F_p.

    Returns:
        (B, G, G). Costs 27·D·S² + 2·D·S² multiply-adds per image and stores D maps of the image's
        size.
    """
    converged = F.conv2d(edges, convergence_weight, convergence_bias, padding=1)
    if activation == "relu":
        converged = F.relu(converged)
    logits = F.conv2d(converged, policy_weight, policy_bias, stride=policy_weight.shape[-1])
    return logits[:, 1] - logits[:, 0]


def collapse(
    convergence_weight: Tensor,
    convergence_bias: Tensor,
    policy_weight: Tensor,
    policy_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Collapse the linear mask generator F_p∘F_c into one convolution kernel.

    K = conv_transpose2d(w, W_c) and b = Σ_d (Σ w_d) b_c[d] + b_p[1] - b_p[0], where
    w = W_p[1] - W_p[0]. Exact, image borders included: F_c pads the edge map with zeros.

    Args:
        convergence_weight: (D, 3, 3, 3), W_c.
        convergence_bias: (D,), b_c.
        policy_weight: (2, D, R, R), W_p; index 0 discards, 1 applies.
        policy_bias: (2,), b_p.

    Returns:
        Kernel K (3, R + 2, R + 2) and bias b (). Costs about 54·D·R² multiply-adds.
    """
    difference = policy_weight[1] - policy_weight[0]  # (D, R, R)
    kernel = F.conv_transpose2d(difference[None], convergence_weight)[0]
    bias = difference.sum((1, 2)) @ convergence_bias + policy_bias[1] - policy_bias[0]
    return kernel, bias


def region_logit(edges: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """Compute Δ, each region's logit of applying the prompt, with the collapsed generator.

    Args:
        edges: (B, 3, S, S).
        kernel: (3, R + 2, R + 2), from `collapse`.
        bias: (), from `collapse`.

    Returns:
        (B, G, G).
    """
    region_size = kernel.shape[-1] - 2
    # The bias is added separately: Inductor on a CPU cannot reshape a computed scalar.
    return F.conv2d(edges, kernel[None], stride=region_size, padding=1)[:, 0] + bias


def philox_uniform(
    seed: int, offset: int, count: int, device: torch.device | None = None
) -> Tensor:
    """Draw uniform numbers from the Philox4x32-10 counter generator (Salmon et al., 2011).

    Number i depends only on `seed` and `offset + i`, so a batch may be split in any way.
    Equals Triton's `tl.rand(seed, offset + i)`.

    Returns:
        (count,) fp32 in [0, 1).
    """
    low32 = 0xFFFFFFFF
    counter = torch.arange(offset, offset + count, device=device)
    c0, c1 = counter & low32, (counter >> 32) & low32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & low32, (seed >> 32) & low32
    for _ in range(10):
        # int64 products wrap modulo 2^64, so all 64 bits of the unsigned product are right.
        product0, product2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = (product2 >> 32) & low32 ^ c1 ^ k0, (product0 >> 32) & low32 ^ c3 ^ k1
        c1, c3 = product2 & low32, product0 & low32
        k0, k1 = (k0 + 0x9E3779B9) & low32, (k1 + 0xBB67AE85) & low32
    folded = torch.where(c0 >= 1 << 31, low32 - c0, c0)
    return folded.to(torch.float32) * 4.6566127342e-10


def logistic_noise(
    seed: int, offset: int, shape: tuple[int, ...], device: torch.device | None = None
) -> Tensor:
    """Draw logistic noise, the difference of two Gumbel variables (paper eq. 6): logit(u).

    Args:
        seed: 64-bit key of the stream.
        offset: position of the first number in the stream.
        shape: shape of the result.
        device: where to draw; the numbers are the same on all devices.

    Returns:
        fp32 of shape `shape`, finite.
    """
    uniform = philox_uniform(seed, offset, math.prod(shape), device)
    uniform = uniform.clamp(UNIFORM_MARGIN, 1 - UNIFORM_MARGIN)
    return (uniform.log() - torch.log1p(-uniform)).view(shape)


def decide(delta: Tensor, mode: Mode, *, tau: float = 1.0, noise: Tensor | None = None) -> Tensor:
    """Decide per region whether the prompt applies (paper eq. 4, 6 and 7).

    soft: sigmoid((Δ + noise) / τ), equal to Gumbel-Softmax over (discard, apply).
    hard: straight-through, 0 or 1 forward and the gradient of soft backward.
    argmax: Δ > 0, for inference; no gradient. A tie discards, as argmax over (discard, apply) does.

    Args:
        delta: (B, G, G), fp32 or fp64.
        mode: see above.
        tau: temperature, > 0.
        noise: (B, G, G) logistic noise; None means 0.

    Returns:
        (B, G, G) in the dtype of `delta`.
    """
    if mode == "argmax":
        return (delta > 0).to(delta.dtype)
    noisy = delta if noise is None else delta + noise
    soft = torch.sigmoid(noisy / tau)
    if mode == "soft":
        return soft
    return (noisy > 0).to(delta.dtype) + (soft - soft.detach())


def dilate(mask: Tensor, region_size: int) -> Tensor:
    """Grow the mask from regions to pixels: (B, G, G) to (B, S, S), nearest neighbour."""
    return mask.repeat_interleave(region_size, 1).repeat_interleave(region_size, 2)


def apply_prompt(images: Tensor, template: Tensor, mask: Tensor) -> Tensor:
    """Add the prompt in the regions that the mask selects: x' = x + dilate(m) * P (paper eq. 5).

    The mask is broadcast over each region's pixels, so no dilated mask is stored.

    Args:
        images: (B, 3, S, S), normalised.
        template: (3, S, S).
        mask: (B, G, G).

    Returns:
        (B, 3, S, S).
    """
    batch, channels, side, _ = images.shape
    grid = mask.shape[-1]
    split = (channels, grid, side // grid, grid, side // grid)
    prompted = torch.addcmul(
        images.view(batch, *split), mask.view(batch, 1, grid, 1, grid, 1), template.view(split)
    )
    return prompted.view_as(images)


def adaptive_prompt(
    images: Tensor,
    template: Tensor,
    kernel: Tensor,
    bias: Tensor,
    *,
    mode: Mode,
    tau: float = 1.0,
    noise: Tensor | None = None,
    edge: Edge = "laplacian",
    edge_padding: EdgePadding = "zero",
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the prompt to a batch, with the collapsed generator.

    Args:
        images: (B, 3, S, S), normalised; no gradient flows through the edge map.
        template: (3, S, S), P.
        kernel: (3, R + 2, R + 2), K.
        bias: (), b.
        mode: see `decide`.
        tau: temperature, > 0.
        noise: (B, G, G) logistic noise for soft and hard.
        edge: edge detector.
        edge_padding: the edge detector's values outside the image.

    Returns:
        Prompted images (B, 3, S, S), Δ (B, G, G) and mask (B, G, G).
    """
    check_region(images.shape[-1], kernel.shape[-1] - 2)
    delta = region_logit(edge_map(images.detach(), edge, edge_padding), kernel, bias)
    mask = decide(delta, mode, tau=tau, noise=noise)
    return apply_prompt(images, template, mask), delta, mask
