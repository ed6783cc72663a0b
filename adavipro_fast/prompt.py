"""AdaViPro's modules: the prompt template, the mask generator, and the prompted frozen encoder."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adavipro_fast.clip import DTYPES, LARGEST_SIDE, FrozenEncoder
from adavipro_fast.device import full_fp32
from adavipro_fast.functional import (
    Edge,
    EdgePadding,
    Mode,
    adaptive_prompt,
    apply_prompt,
    check_region,
    collapse,
    decide,
    edge_map,
    logistic_noise,
    normalise,
)

Method = Literal["adavipro", "vp", "zero_shot", "linear_probe", "full_finetune"]
PROMPTED = ("adavipro", "vp")
Kernel = Literal["auto", "fused", "plain"]


@dataclass(frozen=True)
class PromptConfig:
    """What the prompt is made of; travels in the checkpoint."""

    method: Method = "adavipro"
    """adavipro decides per region where the prompt applies; vp applies it everywhere; the others
    have no prompt: zero_shot, linear_probe, full_finetune"""
    prompt_size: int = 30
    """width of each side of the frame, pixels"""
    region_size: int = 32
    """side of the square decision unit, pixels; divides the image side"""
    embed_dim: int = 64
    """channels between convergence and policy module"""
    edge: Edge = "laplacian"
    """edge detector in front of the mask generator"""
    edge_padding: EdgePadding = "zero"
    """what the edge detector sees outside the image"""
    activation: Literal["none", "relu"] = "none"
    """between convergence and policy module; relu gives up the collapsed fast path"""
    gumbel: Literal["hard", "soft"] = "hard"
    """training masks: hard is straight-through, soft is relaxed"""
    prompt_init: Literal["normal", "zero"] = "normal"
    """first values of the template: N(0, 1) or 0"""
    generator_init: Literal["random", "avoid-edges"] = "random"
    """first values of the mask generator: torch's default, or open where edges are weak"""

    def __post_init__(self) -> None:
        for name in ("prompt_size", "region_size", "embed_dim"):
            if not 1 <= getattr(self, name) <= LARGEST_SIDE:
                raise ValueError(f"{name} is {getattr(self, name)}; 1 to {LARGEST_SIDE} works")


def frame(image_size: int, prompt_size: int) -> Tensor:
    """Mark the pixels that the prompt template may change: (S, S) bool."""
    if not 1 <= prompt_size <= image_size // 2:
        raise ValueError(
            f"prompt size {prompt_size} does not fit an image of side {image_size}; "
            f"use 1 to {image_size // 2}"
        )
    inside = torch.ones(image_size, image_size, dtype=torch.bool)
    inside[prompt_size : image_size - prompt_size, prompt_size : image_size - prompt_size] = False
    return inside


def frame_regions(image_size: int, config: PromptConfig) -> Tensor:
    """Mark the regions that the frame touches: (G, G) bool."""
    pixels = frame(image_size, config.prompt_size).float()
    return F.max_pool2d(pixels[None], config.region_size)[0] > 0


class PromptTemplate(nn.Module):
    """What to add: 12·p·(S - p) values on a frame of width p, zero inside it."""

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
        """Lay the values out as an image: (3, S, S), zero outside the frame."""
        flat = self.values.new_zeros(self.shape.numel())
        return flat.index_copy(0, self.index, self.values).view(self.shape)

    @torch.no_grad()
    def load(self, template: Tensor) -> None:
        """Take the values of a (3, S, S) template."""
        self.values.copy_(template.flatten()[self.index])


class MaskGenerator(nn.Module):
    """Where to add: convergence module F_c and policy module F_p (paper section 3.3)."""

    def __init__(self, config: PromptConfig) -> None:
        super().__init__()
        self.activation = config.activation
        width, region = config.embed_dim, config.region_size
        self.convergence = nn.Conv2d(3, width, 3, padding=1)
        self.policy = nn.Conv2d(width, 2, region, stride=region)

    def collapsed(self) -> tuple[Tensor, Tensor]:
        """Return K (3, R + 2, R + 2) and b () of the linear generator."""
        convergence, policy = self.convergence, self.policy
        assert convergence.bias is not None
        assert policy.bias is not None
        return collapse(convergence.weight, convergence.bias, policy.weight, policy.bias)

    def forward(self, edges: Tensor) -> Tensor:
        """Compute Δ (B, G, G) of edge maps (B, 3, S, S) as the paper writes it, uncollapsed."""
        converged = self.convergence(edges)
        if self.activation == "relu":
            converged = F.relu(converged)
        logits = self.policy(converged)
        delta: Tensor = logits[:, 1] - logits[:, 0]
        return delta

    @torch.no_grad()
    def avoid_edges(self, energy: Tensor) -> None:
        """Start from Δ ∝ mean + 1.5 spread - energy: open but where edges are strongest.

        One convergence channel becomes the mean over the 27 inputs and carries the decision; the
        others keep their random weights, unused until the policy module learns to read them.

        Args:
            energy: (N,), mean edge value of sample regions.
        """
        region = self.policy.kernel_size[0]
        assert self.convergence.bias is not None
        assert self.policy.bias is not None
        spread = energy.std().clamp_min(1e-6)
        threshold = energy.mean() + 1.5 * spread
        self.convergence.weight[0] = 1 / 27
        self.convergence.bias.zero_()
        self.policy.weight.zero_()
        # F_c averages three channels, F_p averages R² pixels. A spread of 8 leaves the sampled
        # masks (noise of spread 1.8) near the argmax ones that the template must work with later.
        sign = torch.tensor([4.0, -4.0], device=energy.device)
        self.policy.weight[:, 0] = (sign / spread / region**2)[:, None, None]
        self.policy.bias.copy_(-sign * threshold / spread)


class Prompted(NamedTuple):
    """A prompted batch: images (B, 3, S, S), Δ (B, G, G) and mask (B, G, G)."""

    images: Tensor
    delta: Tensor
    mask: Tensor


def fused_obstacle(config: PromptConfig) -> str | None:
    """Say what keeps the fused kernel from running a configuration on any device."""
    if config.method != "adavipro":
        return f"method {config.method} has no mask to decide"
    if config.activation != "none":
        return f"activation {config.activation} does not collapse"
    if config.edge not in ("laplacian", "laplacian-magnitude"):
        return f"edge {config.edge} is not in it"
    if config.region_size < 2:
        return "regions are smaller than 2 pixels"
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'adavipro_fast[triton]', Linux only)"
    return None


def triton_interprets() -> bool:
    """Tell whether Triton's interpreter is on, which runs kernels on a CPU, slowly, for tests."""
    if find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


class AdaptivePrompt(nn.Module):
    """Template and mask generator together: images in, prompted images out.

    Args:
        image_size: S, a multiple of the region size.
        config: what the prompt is made of.
        mean: per channel, to normalise uint8 images.
        std: per channel, to normalise uint8 images.
        kernel: fused is the Triton kernel, plain is PyTorch; auto takes the fused one on CUDA
            devices wherever it can run.
        dtype: of the images that the fused kernel writes.

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
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if config.method not in PROMPTED:
            raise ValueError(f"method {config.method} has no prompt; use {' or '.join(PROMPTED)}")
        check_region(image_size, config.region_size)
        self.kernel, self.dtype = kernel, dtype
        self.config = config
        self.grid = image_size // config.region_size
        self.template = PromptTemplate(image_size, config)
        self.generator = MaskGenerator(config) if config.method == "adavipro" else None
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        self.mean_std = (list(mean), list(std))
        self.obstacle, self.interpreted = fused_obstacle(config), triton_interprets()

    def normalised(self, images: Tensor) -> Tensor:
        """Normalise uint8 pixels (B, 3, S, S); float images are taken as normalised."""
        if images.dtype != torch.uint8:
            return images
        return normalise(images, self.mean, self.std)

    def edges(self, images: Tensor) -> Tensor:
        """Detect the edges of normalised images (B, 3, S, S)."""
        return edge_map(images.detach(), self.config.edge, self.config.edge_padding)

    @torch.no_grad()
    def initialise(self, images: Tensor) -> None:
        """Set the generator's first values where they depend on data (`generator_init`).

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
        self,
        images: Tensor,
        *,
        tau: float = 1.0,
        noise: Tensor | None = None,
        seed: int = 0,
        first: int = 0,
    ) -> Prompted:
        """Prompt a batch: sampled masks in training mode, argmax masks in evaluation mode.

        Args:
            images: (B, 3, S, S), uint8 RGB or normalised float.
            tau: temperature of the sampled masks, > 0.
            noise: (B, G, G) logistic noise; none draws it from `seed`.
            seed: 64-bit key of the noise; give every step its own.
            first: number of the first image within its step, where a step has several parts.
        """
        # The mask path runs in fp32 whatever the encoder's precision: a near-tie flips a region.
        with torch.autocast(images.device.type, enabled=False), full_fp32():
            if self.path(images.device) == "fused":
                return self._fused(images, tau, noise, seed, first)
            return self._plain(self.normalised(images).float(), tau, noise, seed, first)

    def path(self, device: torch.device) -> Literal["fused", "plain"]:
        """Say which implementation runs on a device.

        Raises:
            ValueError: the fused kernel was asked for and cannot run.
        """
        obstacle = self.obstacle
        if obstacle is None and device.type != "cuda" and not self.interpreted:
            obstacle = f"it needs a CUDA device, not {device}"
        if self.kernel == "fused" and obstacle:
            raise ValueError(f"the fused kernel cannot run: {obstacle}; use --kernel auto or plain")
        wanted = self.kernel == "fused" or (self.kernel == "auto" and device.type == "cuda")
        return "fused" if wanted and obstacle is None else "plain"

    def _mode(self) -> Mode:
        return self.config.gumbel if self.training else "argmax"

    def _fused(
        self, images: Tensor, tau: float, noise: Tensor | None, seed: int, first: int
    ) -> Prompted:
        from adavipro_fast.kernels.adaptive_prompt import adaptive_prompt as fused

        if images.requires_grad:
            raise ValueError("the fused kernel gives images no gradient; use kernel='plain'")
        assert self.generator is not None
        kernel, bias = self.generator.collapsed()
        return Prompted(
            *fused(
                images.contiguous(),
                self.template(),
                kernel,
                bias,
                noise,
                mode=self._mode(),
                edge=self.config.edge,
                replicate=self.config.edge_padding == "replicate",
                tau=tau,
                seed=seed,
                offset=first * self.grid**2,
                mean=self.mean_std[0],
                std=self.mean_std[1],
                dtype=self.dtype,
            )
        )

    def _plain(
        self, images: Tensor, tau: float, noise: Tensor | None, seed: int, first: int
    ) -> Prompted:
        shape = (images.shape[0], self.grid, self.grid)
        template = self.template()
        if self.generator is None:
            always = images.new_ones(shape)
            return Prompted(images + template, always, always)
        if self.training and noise is None:
            noise = logistic_noise(seed, first * self.grid**2, shape, images.device)
        mode = self._mode()
        if self.config.activation != "none":
            delta = self.generator(self.edges(images))
            mask = decide(delta, mode, tau=tau, noise=noise)
            return Prompted(apply_prompt(images, template, mask), delta, mask)
        kernel, bias = self.generator.collapsed()
        return Prompted(
            *adaptive_prompt(
                images,
                template,
                kernel,
                bias,
                mode=mode,
                tau=tau,
                noise=noise,
                edge=self.config.edge,
                edge_padding=self.config.edge_padding,
            )
        )


class Prediction(NamedTuple):
    """logits (B, K), mask (B, G, G) and unit embedding (B, E), all fp32."""

    logits: Tensor
    mask: Tensor
    embedding: Tensor


class AdaViPro(nn.Module):
    """A frozen encoder with an adaptive prompt in front and class embeddings behind it.

    Only the prompt's parameters are trainable; the encoder stays frozen and in evaluation mode.

    Args:
        encoder: frozen CLIP image tower, from `load_encoder`.
        class_embeddings: (K, E), unit rows.
        config: what the prompt is made of.
        kernel: see `AdaptivePrompt`.
    """

    class_embeddings: Tensor

    def __init__(
        self,
        encoder: FrozenEncoder,
        class_embeddings: Tensor,
        config: PromptConfig | None = None,
        *,
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        preprocess = encoder.preprocess
        self.encoder = encoder
        self.prompt = AdaptivePrompt(
            preprocess.size,
            config or PromptConfig(),
            mean=preprocess.mean,
            std=preprocess.std,
            kernel=kernel,
            dtype=DTYPES[encoder.precision],
        )
        self.register_buffer("class_embeddings", class_embeddings.float(), persistent=False)

    def run_in(self, encoder: FrozenEncoder) -> None:
        """Take another copy of the encoder, such as one `in_precision`."""
        self.encoder = encoder
        self.prompt.dtype = DTYPES[encoder.precision]

    def forward(
        self,
        images: Tensor,
        *,
        tau: float = 1.0,
        noise: Tensor | None = None,
        seed: int = 0,
        first: int = 0,
    ) -> Prediction:
        """Classify a batch (paper eq. 2); the arguments are `AdaptivePrompt.forward`'s."""
        prompted = self.prompt(images, tau=tau, noise=noise, seed=seed, first=first)
        return self.classify(prompted.images, prompted.mask)

    def classify(self, images: Tensor, mask: Tensor) -> Prediction:
        """Classify normalised images (B, 3, S, S) as they are, prompted or not.

        Raises:
            ValueError: embeddings of images and classes differ in width.
        """
        embedding = self.encoder(images)
        if embedding.shape[1] != self.class_embeddings.shape[1]:
            raise ValueError(
                f"class embeddings have {self.class_embeddings.shape[1]} numbers each, the "
                f"encoder's have {embedding.shape[1]}"
            )
        logits = self.encoder.logit_scale * embedding @ self.class_embeddings.t()
        return Prediction(logits, mask, embedding)
