"""The head: a linear map from the encoder's output to class logits, fixed or trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adavipro_fast.method.calibration import Link
from adavipro_fast.method.config import HeadInput, PromptConfig

# Names of a head's tensors in files.
ROWS, BIAS, SCALE = "class_embeddings", "class_bias", "logit_scale"


@dataclass(frozen=True)
class HeadRows:
    """A head's tensors: logits = x @ rowsᵀ + bias."""

    rows: Tensor
    """(K, E) for the embedding, or (K, F) for the features"""
    bias: Tensor | None
    """(K,)"""
    reads: HeadInput

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Rows and bias, with their names in files."""
        return {ROWS: self.rows} | ({} if self.bias is None else {BIAS: self.bias})


class Head(nn.Module):
    """logits = scale · x @ rowsᵀ + bias, where x is the unit embedding or the features.

    Args:
        kept: rows and bias; copied.
        scale: factor of the cosine; not applied to features.
        learns: rows and bias are parameters.
        link: turns logits into probabilities.
    """

    rows: Tensor
    bias: Tensor | None

    def __init__(
        self, kept: HeadRows, *, scale: float, learns: bool = False, link: Link = "softmax"
    ) -> None:
        super().__init__()
        self.reads, self.scale, self.learns, self.link = kept.reads, scale, learns, link
        for name, value in (("rows", kept.rows), ("bias", kept.bias)):
            own = None if value is None else value.detach().float().clone()
            if learns:
                self.register_parameter(name, None if own is None else nn.Parameter(own))
            else:
                self.register_buffer(name, own, persistent=False)

    @classmethod
    def of(
        cls,
        config: PromptConfig,
        rows: Tensor,
        bias: Tensor | None,
        *,
        scale: float,
        sigmoid_bias: float | None,
    ) -> "Head":
        """Build the head that a configuration describes.

        Args:
            config: defines the head's kind and input.
            rows: (K, E) or (K, F).
            bias: (K,), for a trained head.
            scale: factor of the cosine.
            sigmoid_bias: bias of all classes of a text head if the encoder was trained with a
                sigmoid.
        """
        named = config.head == "text"
        sigmoid = named and sigmoid_bias is not None
        if named:
            bias = torch.full((len(rows),), sigmoid_bias) if sigmoid_bias is not None else None
        return cls(
            HeadRows(rows, bias, config.head_input or "embedding"),
            scale=scale,
            learns=not named,
            link="sigmoid" if sigmoid else "softmax",
        )

    @staticmethod
    def shapes(config: PromptConfig, classes: int) -> dict[str, tuple[int | None, ...]]:
        """Return names and shapes of a head's tensors in a file; None means any size."""
        shapes: dict[str, tuple[int | None, ...]] = {ROWS: (classes, None)}
        if config.method != "linear_probe":
            shapes[SCALE] = ()
        return shapes if config.head == "text" else shapes | {BIAS: (classes,)}

    @property
    def folded(self) -> HeadRows:
        """Rows and bias with the scale folded in."""
        scaled = self.rows.detach() * (1.0 if self.reads == "features" else self.scale)
        bias = None if self.bias is None else self.bias.detach()
        return HeadRows(scaled, bias, self.reads)

    def forward(self, embedding: Tensor, features: Tensor) -> Tensor:
        """Score the classes.

        Args:
            embedding: (B, E), unit rows.
            features: (B, F), before the projection.

        Raises:
            ValueError: the rows and their input differ in width.
        """
        read = features if self.reads == "features" else embedding
        if read.shape[1] != self.rows.shape[1]:
            raise ValueError(
                f"class embeddings have {self.rows.shape[1]} elements, but the encoder's output "
                f"has {read.shape[1]}"
            )
        scale = 1.0 if self.reads == "features" else self.scale
        logits = scale * read @ self.rows.t()
        return logits if self.bias is None else logits + self.bias

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained tensors with their names in files; empty for a text head."""
        files = {"rows": ROWS, "bias": BIAS}
        return {files[name]: parameter for name, parameter in self.named_parameters()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in the tensors that `trained` returned."""
        for name, parameter in self.trained().items():
            parameter.data.copy_(tensors[name])

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors that files store."""
        kept: dict[str, Any] = {ROWS: self.rows, SCALE: torch.tensor(self.scale), **self.trained()}
        return {name: value.detach().cpu().clone() for name, value in kept.items()}
