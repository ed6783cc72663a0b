"""Pictures: what the masks look like (paper Figure 4) and how a run went."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from adavipro_fast.files.whole import write_whole
from adavipro_fast.method.config import PromptConfig
from adavipro_fast.method.functional import dilate
from adavipro_fast.method.model import AdaViPro
from adavipro_fast.method.prompt import frame


def save(figure: Figure, path: Path) -> None:
    """Write a figure when it is complete."""
    content = BytesIO()
    figure.savefig(content, format=path.suffix[1:], bbox_inches="tight", dpi=100)
    write_whole(path, content.getvalue())


def _shown(images: Tensor) -> np.ndarray[Any, Any]:
    return images.permute(0, 2, 3, 1).clamp(0, 1).cpu().numpy()


@torch.no_grad()
def mask_grid(model: AdaViPro, images: Tensor, titles: Sequence[str]) -> Figure:
    """Draw four rows: image, edge map, mask, prompted image.

    Args:
        model: trained model; its argmax masks are shown.
        images: (N, 3, S, S) uint8.
        titles: N, drawn as plain text.
    """
    prompt = model.prompt.eval()
    normalised = prompt.normalised(images)
    prompted = prompt(images)
    mean, std = prompt.mean.view(3, 1, 1), prompt.std.view(3, 1, 1)
    edges = prompt.edges(normalised).abs()
    edges = edges / edges.amax((1, 2, 3), keepdim=True).clamp_min(1e-6)
    mask = dilate(prompted.mask, prompt.config.region_size).cpu()
    applied = (mask.bool() & frame(mask.shape[-1], prompt.config.prompt_size)).float()
    rows = (
        _shown(images / 255),
        _shown(edges),
        _shown((0.4 * mask + 0.6 * applied)[:, None].expand(-1, 3, -1, -1)),
        _shown(prompted.images * std + mean),
    )
    names = ("image", "edge map", "mask", "prompted image")
    figure = Figure(figsize=(1.5 * len(images), 6.4))
    axes = figure.subplots(4, len(images), squeeze=False)
    for row, (name, pictures) in enumerate(zip(names, rows, strict=True)):
        for column, picture in enumerate(pictures):
            _show(axes[row, column], picture, titles[column] if row == 0 else "")
        axes[row, 0].set_ylabel(name, fontsize=7)
    return figure


def overlay(images: Tensor, masks: Tensor, titles: Sequence[str], config: PromptConfig) -> Figure:
    """Draw images with the region grid; where the prompt applies, they are tinted.

    Args:
        images: (N, 3, S, S) uint8.
        masks: (N, G, G) of 0 and 1.
        titles: N, drawn as plain text.
        config: the prompt's.
    """
    side = images.shape[-1]
    applied = dilate(masks.bool(), config.region_size) & frame(side, config.prompt_size)
    tint = torch.tensor([1.0, 0.2, 0.2]).view(3, 1, 1)
    shown = torch.where(applied[:, None], 0.55 * images / 255 + 0.45 * tint, images / 255)
    figure = Figure(figsize=(2.6 * len(images), 2.9))
    axes = figure.subplots(1, len(images), squeeze=False)[0]
    for axis, picture, title in zip(axes, _shown(shown), titles, strict=True):
        _show(axis, picture, title)
        axis.set_xticks(range(0, side, config.region_size), minor=True)
        axis.set_yticks(range(0, side, config.region_size), minor=True)
        axis.grid(which="minor", color="white", linewidth=0.3)
    return figure


def _show(axis: Axes, picture: np.ndarray[Any, Any], title: str) -> None:
    axis.imshow(picture)
    axis.set_xticks([])
    axis.set_yticks([])
    # Class names come from folders: no mathematics, no line breaks, no control characters.
    axis.set_title(ascii(title)[1:-1], fontsize=8, parse_math=False)


def curves(rows: Sequence[dict[str, float]], zero_shot_top1: float) -> Figure:
    """Draw loss, top-1 and mask figures over epochs from the rows of `metrics.jsonl`."""
    figure = Figure(figsize=(11, 3.2))
    loss, accuracy, masks = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in rows]
    loss.plot(epochs, [row["loss"] for row in rows], "o-", label="training loss")
    for name, label in (("train_top1", "training"), ("val_top1", "validation")):
        accuracy.plot(epochs, [row[name] for row in rows], "o-", label=label)
    accuracy.axhline(zero_shot_top1, color="grey", linestyle="--", label="zero-shot (test)")
    accuracy.set_ylabel("top-1, %")
    for name in ("density", "adaptivity", "placement"):
        masks.plot(epochs, [row[f"mask_{name}"] for row in rows], "o-", label=f"mask {name}")
    masks.set_ylim(-0.03, 1.03)
    for axis in (loss, accuracy, masks):
        axis.set_xlabel("epoch")
        axis.legend(fontsize=7)
    return figure


def comparison(rows: Sequence[dict[str, Any]], winner: str) -> Figure:
    """Draw the validation and test top-1 of candidates with their standard errors."""
    figure = Figure(figsize=(7, 0.8 + 0.35 * len(rows)))
    axis = figure.subplots()
    places = range(len(rows))
    for split, marker, colour in (("val", "o", "#0072B2"), ("test", "s", "#D55E00")):
        known = [(i, row) for i, row in enumerate(rows) if row[f"{split}_top1"] is not None]
        axis.errorbar(
            [row[f"{split}_top1"] for _, row in known],
            [i + (0.12 if split == "test" else -0.12) for i, _ in known],
            xerr=[row[f"{split}_se"] for _, row in known],
            fmt=marker,
            color=colour,
            label={"val": "validation", "test": "test"}[split],
        )
    names = [row["name"] + (" (winner)" if row["name"] == winner else "") for row in rows]
    axis.set_yticks(list(places), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("top-1, %, with its standard error")
    axis.grid(axis="x", linewidth=0.4)
    axis.legend(fontsize=7)
    return figure
