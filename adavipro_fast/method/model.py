"""A frozen encoder with an adaptive prompt in front and a head behind it."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from adavipro_fast.method.config import DTYPES, Kernel, PromptConfig
from adavipro_fast.method.head import Head
from adavipro_fast.method.preprocess import Preprocess
from adavipro_fast.method.prompt import AdaptivePrompt, Prompted

if TYPE_CHECKING:
    # open_clip takes seconds to import, and exported files do without it.
    from adavipro_fast.method.encoder import FrozenEncoder


class Prediction(NamedTuple):
    """logits (B, K), mask (B, G, G) and unit embedding (B, E), all fp32."""

    logits: Tensor
    mask: Tensor
    embedding: Tensor


class AdaViPro(nn.Module):
    """A frozen encoder with an adaptive prompt in front and a head behind it.

    Only the prompt and a linear head are trainable; the encoder stays frozen and in evaluation
    mode.

    Args:
        encoder: frozen CLIP image tower, from `load_encoder`.
        class_embeddings: (K, E), unit rows; (K, F) if the head's input is the features.
        config: settings of prompt and head.
        class_bias: (K,), for a linear head; a text head uses the encoder's bias, if it has one.
        logit_scale: factor of the cosine (default: the encoder's).
        kernel: see `AdaptivePrompt`.
    """

    def __init__(
        self,
        encoder: "FrozenEncoder",
        class_embeddings: Tensor,
        config: PromptConfig | None = None,
        *,
        class_bias: Tensor | None = None,
        logit_scale: float | None = None,
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.prompt = AdaptivePrompt(
            encoder.preprocess.size,
            config or PromptConfig(),
            mean=encoder.preprocess.mean,
            std=encoder.preprocess.std,
            kernel=kernel,
        )
        self.head = Head.of(
            self.config,
            class_embeddings,
            class_bias,
            scale=encoder.logit_scale if logit_scale is None else logit_scale,
            sigmoid_bias=encoder.logit_bias,
        )

    @property
    def config(self) -> PromptConfig:
        """Settings of prompt and head."""
        return self.prompt.config

    @property
    def preprocess(self) -> Preprocess:
        """The model's preprocessing: the encoder's, with the prompt's margin."""
        return replace(self.encoder.preprocess, margin=self.config.margin)

    @property
    def trainable_params(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def forward(self, images: Tensor, **sampling: Any) -> Prediction:
        """Classify a batch (paper eq. 2).

        Args:
            images: (B, 3, S, S), uint8 RGB or normalised float.
            sampling: how training masks are drawn; fields of `prompt.Sampling`: tau, noise, seed,
                first.
        """
        prompted = self.prompted(images, **sampling)
        return self.classify(prompted.images, prompted.mask)

    def prompted(self, images: Tensor, **sampling: Any) -> Prompted:
        """Add the prompt to a batch, in the encoder's precision; arguments as for `forward`."""
        prompted: Prompted = self.prompt(images, dtype=DTYPES[self.encoder.precision], **sampling)
        return prompted

    def classify(self, images: Tensor, mask: Tensor) -> Prediction:
        """Classify normalised images (B, 3, S, S) without adding the prompt.

        Raises:
            ValueError: the head's rows and its input differ in width.
        """
        embedding, features = self.encoder.embed(images)
        return Prediction(self.head(embedding, features), mask, embedding)
