"""Plots of masks (paper Figure 4), training curves, confusion matrices and comparisons."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Patch
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from adavipro_fast.files.whole import write_whole
from adavipro_fast.method.config import PROMPTED, PromptConfig
from adavipro_fast.method.functional import dilate
from adavipro_fast.method.model import AdaViPro
from adavipro_fast.method.prompt import frame

# From the palette of Okabe and Ito, which colour-blind people can distinguish.
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
# Inches.
PANEL, GAP, APART, TITLE = 2.1, 0.06, 0.3, 0.3
GRID_PANEL = 1.5
PANELS_IN_ROW = 8
STRIPES = 28
FONT = FontProperties(size=8)
# With more classes the numbers would be too small.
MOST_NUMBERED = 40
# With more epochs the markers would hide the line.
MOST_MARKED = 20


def save(figure: Figure, path: Path) -> None:
    """Write a figure atomically."""
    write_whole(path, encoded(figure, path.suffix[1:]))


def encoded(figure: Figure, kind: str) -> bytes:
    """Return a figure as the bytes of a file, such as `png`."""
    content = BytesIO()
    figure.savefig(content, format=kind, bbox_inches="tight", dpi=100)
    return content.getvalue()


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
    names = ("image", "edge map", "mask (white: applied)", "prompted image")
    figure = Figure(figsize=(GRID_PANEL * len(images), GRID_PANEL * len(rows)))
    space = GAP / GRID_PANEL
    axes = figure.subplots(
        len(rows),
        len(images),
        squeeze=False,
        gridspec_kw={
            "left": 0,
            "right": 1,
            "bottom": 0,
            "top": 1,
            "wspace": space,
            "hspace": space,
        },
    )
    for row, (name, pictures) in enumerate(zip(names, rows, strict=True)):
        for axis, picture in zip(axes[row], pictures, strict=True):
            _show(axis, picture)
        axes[row, 0].set_ylabel(name, fontproperties=FONT)
    for axis, title in zip(axes[0], titles, strict=True):
        _entitle(axis, title, GRID_PANEL - 2 * GAP)
    return figure


def overlay(
    images: Tensor, masks: Tensor, titles: Sequence[str], config: PromptConfig | None
) -> Figure:
    """Draw each image, and beside it a copy that shows where the prompt is added.

    Within the prompt's frame, open parts are outlined, and closed parts are grey and hatched.
    Outside the frame the image is unchanged.

    Args:
        images: (N, 3, S, S) uint8.
        masks: (N, G, G) of 0 and 1.
        titles: N, drawn as plain text.
        config: the prompt's; without a prompt only the images are drawn.
    """
    prompted = config is not None and config.method in PROMPTED
    figure, places = _places(len(images), panels=2 if prompted else 1)
    for axes, picture, title in zip(places, _shown(images / 255), titles, strict=True):
        _show(axes[0], picture)
        _entitle(axes[0], title, len(axes) * PANEL - 2 * GAP, x=len(axes) / 2)
    if config is None or not prompted:
        return figure
    closed = _draw_masks([axes[1] for axes in places], images, masks, config)
    keys = [Patch(facecolor="none", edgecolor=BLUE, linewidth=2, label="open: prompt added")]
    if closed:
        label = "closed: prompt left out"
        keys.append(Patch(facecolor="0.7", edgecolor="0.2", hatch="////", label=label))
    figure.legend(
        handles=keys,
        loc="upper left",
        bbox_to_anchor=(0, 0),
        ncols=2,
        prop=FONT,
        frameon=False,
        borderaxespad=0.5,
    )
    return figure


def masked(image: Tensor, mask: Tensor, config: PromptConfig | None) -> Figure:
    """Draw one image (3, S, S) with its mask as in `overlay`, without any border.

    Args:
        image: uint8.
        mask: (G, G) of 0 and 1.
        config: the prompt's; without a prompt only the image is drawn.
    """
    figure = Figure(figsize=(PANEL, PANEL))
    axis = figure.add_axes((0, 0, 1, 1))
    if config is not None and config.method in PROMPTED:
        _draw_masks([axis], image[None], mask[None], config)
    else:
        _show(axis, _shown(image[None] / 255)[0])
    return figure


def _draw_masks(
    panels: Sequence[Axes], images: Tensor, masks: Tensor, config: PromptConfig
) -> bool:
    """Draw each image with its mask; return whether any part is closed."""
    inside = frame(images.shape[-1], config.prompt_size)
    opened = dilate(masks.bool(), config.region_size)
    closed = inside & ~opened
    hatched = _hatched(images / 255, closed)
    for axis, picture, applied in zip(panels, _shown(hatched), inside & opened, strict=True):
        _show(axis, picture)
        _outline(axis, applied, config)
    return bool(closed.any())


def _places(count: int, panels: int) -> tuple[Figure, list[list[Axes]]]:
    """Make a figure with `panels` axes side by side for each of `count` images, in rows."""
    in_row = min(count, PANELS_IN_ROW // panels)
    across, down = panels * (PANEL + GAP) + APART, PANEL + TITLE
    width, height = in_row * across, -(-count // in_row) * down
    figure = Figure(figsize=(width, height))
    places = []
    for number in range(count):
        row, column = divmod(number, in_row)
        corners = [
            (column * across + panel * (PANEL + GAP), height - (row + 1) * down)
            for panel in range(panels)
        ]
        places.append(
            [
                figure.add_axes((x / width, y / height, PANEL / width, PANEL / height))
                for x, y in corners
            ]
        )
    return figure, places


def _hatched(images: Tensor, marked: Tensor) -> Tensor:
    """Make marked pixels grey, with stripes visible on light, grey and dark images."""
    side = images.shape[-1]
    period = max(4, side // STRIPES)
    diagonal = (torch.arange(side)[:, None] + torch.arange(side)) % period
    stripes = torch.where(diagonal < period / 2, 0.15, 0.85)
    grey = (images.mean(1, keepdim=True) + stripes) / 2
    return torch.where(marked[:, None], grey, images)


def _outline(axis: Axes, applied: Tensor, config: PromptConfig) -> None:
    """Outline an area (S, S) that consists of parts of the frame's regions."""
    side, size = len(applied), config.prompt_size
    cuts = sorted({*range(0, side + 1, config.region_size), size, side - size})
    cells = applied[cuts[:-1]][:, cuts[:-1]]
    lines = [[(x, y) for y, x in ends] for ends in _borders(cells.T, cuts)]
    lines += _borders(cells, cuts)
    narrowest = 72 * PANEL * min(config.region_size, size) / side
    width = min(max(0.25 * narrowest, 0.6), 1.8)
    # Drawn above the axes' border, with white beneath so that it shows on an image of its colour.
    style: dict[str, Any] = {"capstyle": "projecting", "clip_on": False, "zorder": 3}
    for colour, points in (("white", 2.2 * width), (BLUE, width)):
        axis.add_collection(LineCollection(lines, colors=colour, linewidths=points, **style))


def _borders(cells: Tensor, cuts: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Return the horizontal lines, as two points (x, y), between cells that differ."""
    padded = F.pad(cells, (0, 0, 1, 1))
    differ = F.pad(padded[1:] != padded[:-1], (1, 1)).int()
    # Alternately the beginning and the end of a line.
    turns = differ.diff(dim=1).nonzero().tolist()
    return [
        [(cuts[x], cuts[y]), (cuts[end], cuts[y])]
        for (y, x), (_, end) in zip(turns[::2], turns[1::2], strict=True)
    ]


def _show(axis: Axes, picture: np.ndarray[Any, Any]) -> None:
    side = len(picture)
    axis.imshow(picture, extent=(0, side, side, 0))
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set(color="0.5", linewidth=0.5)


def _entitle(axis: Axes, title: str, width: float, x: float = 0.5) -> None:
    """Draw a title as plain text; shorten it in the middle to at most `width` inches.

    Class names come from folders, so mathematics, line breaks and control characters are escaped.
    """
    drawn = get_font(findfont(FONT)).get_charmap()
    text = "".join(c if c.isprintable() and ord(c) in drawn else ascii(c)[1:-1] for c in title)
    shown, kept = text, len(text)
    while _inches(shown) > width and kept > 1:
        kept -= 1
        shown = f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
    axis.set_title(shown, fontproperties=FONT, parse_math=False, x=x)


def _inches(text: str) -> float:
    points, _, _ = text_to_path.get_text_width_height_descent(text, FONT, ismath=False)
    return float(points) / 72


def curves(rows: Sequence[dict[str, float]], zero_shot_top1: float | None) -> Figure:
    """Draw loss, top-1 and mask figures over epochs from the rows of `metrics.jsonl`."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    loss, accuracy, masks = figure.subplots(1, 3)
    _plot(loss, rows, {"loss": "training"})
    loss.set_ylabel("loss")
    _plot(accuracy, rows, {"train_top1": "training", "val_top1": "validation"})
    if zero_shot_top1 is not None:
        accuracy.axhline(zero_shot_top1, color="0.4", linestyle=":", label="zero-shot (test)")
    accuracy.set_ylabel("top-1, %")
    _plot(masks, rows, {f"mask_{name}": name for name in ("density", "adaptivity", "placement")})
    masks.set_ylabel("mask")
    masks.set_ylim(-0.03, 1.03)
    for axis in (loss, accuracy, masks):
        axis.set_xlabel("epoch")
        axis.set_xlim(0.5, max(len(rows), 1) + 0.5)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(color="0.9")
        # Above the axes, where it hides no line.
        axis.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=3,
            prop=FONT,
            frameon=False,
            borderaxespad=0.1,
            columnspacing=1,
        )
    return figure


def confusion(counts: Tensor, class_names: Sequence[str]) -> Figure:
    """Draw a confusion matrix (K, K): classes are rows, answers columns, shares colours."""
    side = min(3 + 0.3 * len(counts), 30)
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    if len(counts) <= MOST_NUMBERED:
        for (down, across), count in np.ndenumerate(counts.numpy()):
            light = "white" if shares[down, across] > 0.5 else "black"
            if count:
                axis.text(across, down, count, color=light, ha="center", va="center", fontsize=7)
    places = range(len(counts))
    shown = [name if name.isprintable() else ascii(name)[1:-1] for name in class_names]
    options: dict[str, Any] = {"fontsize": 7, "parse_math": False}
    axis.set_xticks(places, shown, rotation=90, **options)
    axis.set_yticks(places, shown, **options)
    axis.set_xlabel("answer")
    axis.set_ylabel("class")
    return figure


def comparison(rows: Sequence[dict[str, Any]], winner: str) -> Figure:
    """Draw the validation and test top-1 of candidates with their standard errors."""
    figure = Figure(figsize=(7, 0.8 + 0.35 * len(rows)))
    axis = figure.subplots()
    places = range(len(rows))
    for split, marker, colour in (("val", "o", BLUE), ("test", "s", ORANGE)):
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


def _plot(axis: Axes, rows: Sequence[dict[str, float]], labels: dict[str, str]) -> None:
    """Plot each column over epochs in its own colour and dash pattern."""
    marker = "o" if len(rows) <= MOST_MARKED else ""
    epochs = [row["epoch"] for row in rows]
    styles = zip((BLUE, ORANGE, GREEN), ("-", "--", "-."), strict=True)
    for (name, label), (colour, dash) in zip(labels.items(), styles, strict=False):
        values = [row[name] for row in rows]
        axis.plot(epochs, values, dash, color=colour, marker=marker, markersize=4, label=label)
