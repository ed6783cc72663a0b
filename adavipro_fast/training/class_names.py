"""Class embeddings of a text head: from the class names, or from a file."""

import torch
from torch import Tensor

from adavipro_fast.data.folder import listed
from adavipro_fast.files.whole import read_safetensors
from adavipro_fast.method.clip import DEFAULT_TEMPLATE, NoText, TextTower, alike, readable
from adavipro_fast.training.config import TrainConfig
from adavipro_fast.training.log import say


def needs_text(config: TrainConfig) -> bool:
    """Report whether the model to train needs class embeddings."""
    named = config.prompt.head == "text" and config.prompt.method != "linear_probe"
    return named or config.class_embeddings is not None


def templates_of(config: TrainConfig) -> tuple[str, ...]:
    """Return the text templates for class names; empty if embeddings are given or not needed."""
    if config.class_embeddings is not None or not needs_text(config):
        return ()
    return config.template or (DEFAULT_TEMPLATE,)


def check_embeddings(
    config: TrainConfig, text: TextTower | NoText, names: tuple[str, ...], rows: Tensor
) -> None:
    """Check that class embeddings differ, and warn about truncated and numeric names.

    Raises:
        ValueError: two classes have the same embedding, and the model needs the embeddings.
    """
    scored, given = needs_text(config), config.class_embeddings is not None
    cut: list[str] = []
    if isinstance(text, TextTower) and not given:
        cut = text.cut(names, config.template or (DEFAULT_TEMPLATE,))
    if cut and scored:
        say(f"warning: the text encoder truncates {listed(cut)}")
    pair = alike(names, rows)
    if pair is not None:
        cause = f"their embeddings in {config.class_embeddings} are equal"
        if not given:
            read = (
                "truncated by the text encoder"
                if pair[0] in cut
                else f"read as {readable(pair[0])!r}"
            )
            cause = f"both are {read}"
        line = f"classes {pair[0]!r} and {pair[1]!r} have the same embedding: {cause}"
        if scored:
            raise ValueError(f"{line}; rename one, or use --head linear")
        say(f"warning: {line}; zero-shot cannot tell them apart")
    if scored and not given and all(name.strip().isdigit() for name in names):
        say(
            f"warning: the classes are called {listed(names)}; numbers mean little to a text "
            "encoder: rename the folders, or use --head linear"
        )


def class_embeddings(
    config: TrainConfig, text: TextTower | NoText, class_names: tuple[str, ...]
) -> Tensor:
    """Embed the class names, or read their embeddings from a file: (K, E) fp32 unit rows.

    Raises:
        ValueError: the file does not have one row per class.
    """
    if config.class_embeddings is None:
        return text.class_embeddings(class_names, config.template or (DEFAULT_TEMPLATE,))
    tensors, _ = read_safetensors(config.class_embeddings)
    rows = tensors.get("class_embeddings")
    if rows is None or rows.ndim != 2 or len(rows) != len(class_names):
        raise ValueError(
            f"{config.class_embeddings} needs a tensor class_embeddings with {len(class_names)} "
            f"rows, in the order {', '.join(class_names[:3])} ..."
        )
    return torch.nn.functional.normalize(rows.float(), dim=-1)
