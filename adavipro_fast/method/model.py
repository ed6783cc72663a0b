"""A frozen encoder with an adaptive prompt in front and a head behind it."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adavipro_fast.method.config import DTYPES, Kernel, PromptConfig
from adavipro_fast.method.encoder import FrozenEncoder
from adavipro_fast.method.preprocess import Preprocess
from adavipro_fast.method.prompt import AdaptivePrompt


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
        class_embeddings: (K, E), unit rows; (K, F) where the head reads the features.
        config: what the prompt is made of.
        class_bias: (K,), of a linear head (default: the encoder's bias, or none).
        logit_scale: factor of the cosine (default: the encoder's).
        kernel: see `AdaptivePrompt`.
    """

    class_embeddings: Tensor
    class_bias: Tensor | None

    def __init__(
        self,
        encoder: FrozenEncoder,
        class_embeddings: Tensor,
        config: PromptConfig | None = None,
        *,
        class_bias: Tensor | None = None,
        logit_scale: float | None = None,
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.logit_scale = encoder.logit_scale if logit_scale is None else logit_scale
        self.prompt = AdaptivePrompt(
            encoder.preprocess.size,
            config or PromptConfig(),
            mean=encoder.preprocess.mean,
            std=encoder.preprocess.std,
            kernel=kernel,
        )
        # Copies: the caller's rows do not learn.
        rows = class_embeddings.detach().float().clone()
        bias = None if class_bias is None else class_bias.detach().float().clone()
        if self.config.head == "linear":
            self.class_embeddings = nn.Parameter(rows)
            self.class_bias = None if bias is None else nn.Parameter(bias)
        else:
            if self.config.head == "text":
                shared = encoder.logit_bias
                bias = None if shared is None else torch.full((len(rows),), shared)
            self.register_buffer("class_embeddings", rows, persistent=False)
            self.register_buffer("class_bias", bias, persistent=False)

    @property
    def config(self) -> PromptConfig:
        """What the prompt is made of."""
        return self.prompt.config

    @property
    def preprocess(self) -> Preprocess:
        """How images become the model's input: the encoder's way, and the prompt's margin."""
        return replace(self.encoder.preprocess, margin=self.config.margin)

    @property
    def trainable_params(self) -> int:
        """How many parameters learn."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def forward(self, images: Tensor, **sampling: Any) -> Prediction:
        """Classify a batch (paper eq. 2).

        Args:
            images: (B, 3, S, S), uint8 RGB or normalised float.
            sampling: of training masks, fields of `prompt.Sampling`: tau, noise, seed, first.
        """
        prompted = self.prompt(images, dtype=DTYPES[self.encoder.precision], **sampling)
        return self.classify(prompted.images, prompted.mask)

    def classify(self, images: Tensor, mask: Tensor) -> Prediction:
        """Classify normalised images (B, 3, S, S) as they are, prompted or not.

        Raises:
            ValueError: embeddings of images and classes differ in width.
        """
        embedding, features = self.encoder.embed(images)
        rows = features if self.config.head_input == "features" else embedding
        if rows.shape[1] != self.class_embeddings.shape[1]:
            raise ValueError(
                f"class embeddings have {self.class_embeddings.shape[1]} numbers each, the "
                f"encoder's have {rows.shape[1]}"
            )
        scale = 1.0 if self.config.head_input == "features" else self.logit_scale
        logits = scale * rows @ self.class_embeddings.t()
        if self.class_bias is not None:
            logits = logits + self.class_bias
        return Prediction(logits, mask, embedding)
