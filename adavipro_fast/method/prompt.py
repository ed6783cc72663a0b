"""The prompt template and the mask generator, used in front of an encoder."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adavipro_fast.device import full_fp32
from adavipro_fast.method.config import PROMPTED, Kernel, PromptConfig
from adavipro_fast.method.functional import (
    Mode,
    apply_prompt,
    check_region,
    collapse,
    decide,
    edge_map,
    logistic_noise,
    normalise,
    region_logit,
    uncollapsed_logit,
)


def frame(image_size: int, prompt_size: int) -> Tensor:
    """Return a mask of the pixels that the prompt template covers: (S, S) bool."""
    if not 1 <= prompt_size <= image_size // 2:
        raise ValueError(
            f"prompt size {prompt_size} does not fit an image of side {image_size}; "
            f"use 1 to {image_size // 2}"
        )
    inside = torch.ones(image_size, image_size, dtype=torch.bool)
    inside[prompt_size : image_size - prompt_size, prompt_size : image_size - prompt_size] = False
    return inside


def frame_regions(image_size: int, config: PromptConfig) -> Tensor:
    """Return a mask of the regions that overlap the frame: (G, G) bool."""
    pixels = frame(image_size, config.prompt_size).float()
    return F.max_pool2d(pixels[None], config.region_size)[0] > 0


class PromptTemplate(nn.Module):
    """The learned prompt: 12·p·(S - p) values on a frame of width p, zero inside it."""

    index: Tensor

    def __init__(self, image_size: int, config: PromptConfig) -> None:
        super().__init__()
        inside = frame(image_size, config.prompt_size).expand(3, -1, -1)
        self.shape = inside.shape
        self.register_buffer("index", inside.flatten().nonzero()[:, 0], persistent=False)
        count = int(inside.sum())
        first = torch.zeros(count) if config.prompt_init == "zero" else torch.randn(count)
        self.values = nn.Parameter(first)

    def forward(self) -> Tensor:
        """Return the values as an image: (3, S, S), zero outside the frame."""
        flat = self.values.new_zeros(self.shape.numel())
        return flat.index_copy(0, self.index, self.values).view(self.shape)

    @torch.no_grad()
    def load(self, template: Tensor) -> None:
        """Copy in the values of a (3, S, S) template."""
        self.values.copy_(template.flatten()[self.index])


class MaskGenerator(nn.Module):
    """Decides where to add the prompt: modules F_c and F_p (paper section 3.3)."""

    def __init__(self, config: PromptConfig) -> None:
        super().__init__()
        self.activation = config.activation
        width, region = config.embed_dim, config.region_size
        self.convergence = nn.Conv2d(3, width, 3, padding=1)
        self.policy = nn.Conv2d(width, 2, region, stride=region)

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return W_c, b_c, W_p and b_p."""
        convergence, policy = self.convergence, self.policy
        assert convergence.bias is not None
        assert policy.bias is not None
        return convergence.weight, convergence.bias, policy.weight, policy.bias

    def collapsed(self) -> tuple[Tensor, Tensor]:
        """Return K (3, R + 2, R + 2) and b () of the linear generator."""
        return collapse(*self.weights())

    def forward(self, edges: Tensor) -> Tensor:
        """Compute Δ (B, G, G) of edge maps (B, 3, S, S) as in the paper, uncollapsed."""
        return uncollapsed_logit(edges, *self.weights(), self.activation)

    @torch.no_grad()
    def avoid_edges(self, energy: Tensor) -> None:
        """Initialise to Δ ∝ mean + 1.5 spread - energy: open except where edges are strongest.

        One convergence channel becomes the mean over its 27 inputs and makes the decision. The
        others keep their random weights, unused until the policy module gives them weight.

        Args:
            energy: (N,), mean edge value of each sampled region.
        """
        region = self.policy.kernel_size[0]
        assert self.convergence.bias is not None
        assert self.policy.bias is not None
        spread = energy.std().clamp_min(1e-6)
        threshold = energy.mean() + 1.5 * spread
        self.convergence.weight[0] = 1 / 27
        self.convergence.bias.zero_()
        self.policy.weight.zero_()
        # F_c averages three channels and F_p averages R² pixels. With a spread of 8, the masks
        # sampled in training (noise of spread 1.8) stay close to the argmax masks of inference.
        sign = torch.tensor([4.0, -4.0], device=energy.device)
        self.policy.weight[:, 0] = (sign / spread / region**2)[:, None, None]
        self.policy.bias.copy_(-sign * threshold / spread)


class Prompted(NamedTuple):
    """A prompted batch: images (B, 3, S, S), Δ (B, G, G) and mask (B, G, G)."""

    images: Tensor
    delta: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Sampling:
    """How the masks of a training batch are drawn; evaluation mode uses argmax masks."""

    tau: float = 1.0
    """temperature, > 0"""
    noise: Tensor | None = None
    """(B, G, G) logistic noise; None draws it from the seed"""
    seed: int = 0
    """64-bit key of the noise; use a different one for every step"""
    first: int = 0
    """index of the batch's first image within its step, if the step is split into parts"""


def fused_obstacle(config: PromptConfig) -> str | None:
    """Return why the fused kernel cannot run a configuration on any device; None if it can."""
    if config.method != "adavipro":
        return f"method {config.method} has no mask"
    if config.activation != "none":
        return f"it does not support activation {config.activation}"
    if config.edge not in ("laplacian", "laplacian-magnitude"):
        return f"it does not support edge {config.edge}"
    if config.region_size < 2:
        return "regions are smaller than 2 pixels"
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'adavipro_fast[triton]', Linux only)"
    return None


def triton_interprets() -> bool:
    """Report whether Triton's interpreter is on, which runs kernels slowly on a CPU for tests."""
    if find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


class AdaptivePrompt(nn.Module):
    """Adds the prompt to images: the template, where the mask generator applies it.

    Method adavipro decides per region, vp prompts all regions, and the other methods none.

    Args:
        image_size: S, a multiple of the region size.
        config: settings of the prompt.
        mean: per channel, to normalise uint8 images.
        std: per channel, to normalise uint8 images.
        kernel: fused is the Triton kernel, plain is PyTorch; auto uses the fused kernel on CUDA
            devices if it can run.

    Raises:
        ValueError: region or prompt size does not fit the image.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        image_size: int,
        config: PromptConfig,
        *,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        check_region(image_size, config.region_size)
        self.config, self.kernel = config, kernel
        self.grid = image_size // config.region_size
        prompted = config.method in PROMPTED
        self.template = PromptTemplate(image_size, config) if prompted else None
        self.generator = MaskGenerator(config) if config.method == "adavipro" else None
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        self.mean_std = (list(mean), list(std))
        self.obstacle, self.interpreted = fused_obstacle(config), triton_interprets()

    def normalised(self, images: Tensor) -> Tensor:
        """Normalise uint8 pixels (B, 3, S, S); return float images unchanged."""
        if images.dtype != torch.uint8:
            return images
        return normalise(images, self.mean, self.std)

    def edges(self, images: Tensor) -> Tensor:
        """Detect the edges of normalised images (B, 3, S, S)."""
        return edge_map(images.detach(), self.config.edge, self.config.edge_padding)

    def delta(self, images: Tensor) -> Tensor:
        """Compute Δ (B, G, G) of normalised images (B, 3, S, S), collapsed if that is exact."""
        assert self.generator is not None
        edges = self.edges(images)
        if self.config.activation != "none":
            uncollapsed: Tensor = self.generator(edges)
            return uncollapsed
        return region_logit(edges, *self.generator.collapsed())

    @torch.no_grad()
    def initialise(self, images: Tensor) -> None:
        """Initialise the generator from data if `generator_init` needs it.

        Args:
            images: (N, 3, S, S) sample of the training images, uint8 or normalised.
        """
        if self.generator is None or self.config.generator_init == "random":
            return
        edges = self.edges(self.normalised(images))
        energy = F.avg_pool2d(edges.mean(1), self.config.region_size)
        inside = frame_regions(images.shape[-1], self.config).to(energy.device)
        self.generator.avoid_edges(energy[:, inside].flatten())

    def forward(
        self, images: Tensor, *, dtype: torch.dtype = torch.float32, **sampling: Any
    ) -> Prompted:
        """Add the prompt: with sampled masks in training mode, argmax masks in evaluation mode.

        Args:
            images: (B, 3, S, S), uint8 RGB or normalised float.
            dtype: dtype of the fused kernel's output images.
            sampling: fields of `Sampling`.
        """
        drawn = Sampling(**sampling)
        # The mask is computed in fp32 in any precision, since rounding would flip near-ties.
        with torch.autocast(images.device.type, enabled=False), full_fp32():
            if self.path(images.device) == "fused":
                return self._fused(images, drawn, dtype)
            return self._plain(self.normalised(images).float(), drawn)

    def path(self, device: torch.device) -> Literal["fused", "plain"]:
        """Return which implementation runs on a device.

        Raises:
            ValueError: the fused kernel was requested and cannot run.
        """
        obstacle = self.obstacle
        if obstacle is None and device.type != "cuda" and not self.interpreted:
            obstacle = f"it needs a CUDA device, not {device}"
        if self.kernel == "fused" and obstacle:
            raise ValueError(f"the fused kernel cannot run: {obstacle}; use --kernel auto or plain")
        fused = self.kernel == "fused" or (self.kernel == "auto" and device.type == "cuda")
        return "fused" if fused and obstacle is None else "plain"

    @property
    def mode(self) -> Mode:
        """How regions are decided in the current mode."""
        return self.config.gumbel if self.training else "argmax"

    def _fused(self, images: Tensor, drawn: Sampling, dtype: torch.dtype) -> Prompted:
        from adavipro_fast.kernels.adaptive_prompt import adaptive_prompt as fused

        if images.requires_grad:
            raise ValueError("the fused kernel computes no gradient for images; use kernel='plain'")
        assert self.generator is not None
        assert self.template is not None
        kernel, bias = self.generator.collapsed()
        return Prompted(
            *fused(
                images.contiguous(),
                self.template(),
                kernel,
                bias,
                drawn.noise,
                mode=self.mode,
                edge=self.config.edge,
                replicate=self.config.edge_padding == "replicate",
                tau=drawn.tau,
                seed=drawn.seed,
                offset=drawn.first * self.grid**2,
                mean=self.mean_std[0],
                std=self.mean_std[1],
                dtype=dtype,
            )
        )

    def _plain(self, images: Tensor, drawn: Sampling) -> Prompted:
        shape = (images.shape[0], self.grid, self.grid)
        if self.template is None:
            never = images.new_zeros(shape)
            return Prompted(images, never, never)
        template = self.template()
        if self.generator is None:
            always = images.new_ones(shape)
            return Prompted(images + template, always, always)
        delta = self.delta(images)
        noise = self._noise(drawn, delta) if self.training else None
        mask = decide(delta, self.mode, tau=drawn.tau, noise=noise)
        return Prompted(apply_prompt(images, template, mask), delta, mask)

    def _noise(self, drawn: Sampling, delta: Tensor) -> Tensor:
        if drawn.noise is not None:
            return drawn.noise
        first = drawn.first * self.grid**2
        return logistic_noise(drawn.seed, first, tuple(delta.shape), delta.device)
