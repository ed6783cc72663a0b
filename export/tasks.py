"""Several tasks in one graph: each image is prompted and classified for its own task.

The tasks share the encoder. Each task has rows in constant tables, selected by its number t:

    Δ       the product of each region's edges and K[t]
    tokens  E(x) + Σ_r m_r T[t, r]
    logits  scores of all tasks' classes, of which task t's columns are selected; with many tasks,
            only the classes of task t are scored; -1e30 for missing classes

A prompt without a generator has a constant Δ: open everywhere, or closed everywhere without a
prompt.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adavipro_fast.export.encoder import Projection
from adavipro_fast.export.fold import MaskHead, TokenTable, constant_delta, template_of
from adavipro_fast.files.task import ABSENT
from adavipro_fast.method.model import AdaViPro

# Tables with one entry per task, except those of the classes.
OF_TASKS = re.compile(
    r"decide\.(constant|heads\.\d+\.kernel)|prompt\.(rows\.\d+|templates)|head\.columns"
)
# Scoring all classes is cheaper than gathering up to this multiple of the largest task's classes.
MOST_SCORES = 96


def difference(first: AdaViPro, other: AdaViPro) -> str:
    """List the differences between the preprocessing of two models."""
    before, after = asdict(first.preprocess), asdict(other.preprocess)
    changed = [f"{k} {before[k]} and {after[k]}" for k in before if before[k] != after[k]]
    older = "; decoding 2 comes from an older version: train that checkpoint again"
    return ", ".join(changed) + (older if before["decoding"] != after["decoding"] else "")


def tasks_obstacle(models: Sequence[AdaViPro]) -> str | None:
    """Return why models cannot share one graph; None if they can."""
    first = models[0]
    for model in models:
        if model.encoder.sha256 != first.encoder.sha256:
            return "they have different encoders"
        if model.preprocess != first.preprocess:
            return f"their preprocessing differs: {difference(first, model)}"
        if model.config.region_size != first.config.region_size:
            return "their region sizes differ"
        if model.config.method == "full_finetune":
            return "a fine-tuned encoder cannot be shared"
        if model.config.activation != "none":
            return f"activation {model.config.activation} is not supported"
    return None


class TaskMasks(nn.Module):
    """Images (B, 3, S, S) and tasks (B,) to masks (B, G, G) bool."""

    constant: Tensor

    def __init__(self, models: Sequence[AdaViPro], scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.grid = models[0].prompt.grid
        constant = torch.zeros(len(models), self.grid, self.grid)
        heads: dict[tuple[str, str], MaskHead] = {}
        kernels: dict[tuple[str, str], Tensor] = {}
        for number, model in enumerate(models):
            config = model.config
            if model.prompt.generator is None:
                constant[number] = constant_delta(model)
                continue
            head = MaskHead(model.prompt, scale, shift)
            kind = (config.edge, config.edge_padding)
            heads.setdefault(kind, head)
            blank = head.kernel.detach().new_zeros(len(models), *head.kernel.shape[1:])
            kernels.setdefault(kind, blank)[number] = head.kernel.detach()[0]
            constant[number] += head.bias.detach()
            if head.constant is not None:
                constant[number] += head.constant.detach()[0]
        self.heads = nn.ModuleList(heads.values())
        for head, kernel in zip(heads.values(), kernels.values(), strict=True):
            # Replace the first task's kernel by those of all tasks; biases are in `constant`.
            head.kernel, head.bias = nn.Parameter(kernel), nn.Parameter(torch.zeros(len(models)))
            head.constant = None
        self.register_buffer("constant", constant.flatten(1))

    def forward(self, images: Tensor, task: Tensor, _absent: Tensor) -> Tensor:
        """Compute the masks."""
        delta = self.constant.index_select(0, task)
        for head in self.heads:
            assert isinstance(head, MaskHead)
            delta = delta + own_deltas(head.edge_map(images), head.kernel, task, self.grid)
        decided: Tensor = delta.unflatten(1, (self.grid, self.grid)) > 0
        return decided


def own_deltas(edges: Tensor, kernels: Tensor, task: Tensor, grid: int) -> Tensor:
    """Apply the kernel of each image's task: Δ (B, G²) without the constants.

    This is not a convolution with a channel per task, because engines would have to know the number
    of tasks, and the work would grow with it.

    Args:
        edges: (B, 3, S, S).
        kernels: (T, 3, R + 2, R + 2).
        task: (B,).
        grid: G.
    """
    own = kernels.index_select(0, task).flatten(1)
    return torch.bmm(windows(edges, grid), own[..., None]).squeeze(2)


def windows(edges: Tensor, grid: int) -> Tensor:
    """Gather the edges that each region's decision needs: (B, 3, S, S) to (B, G², 3 (R + 2)²)."""
    region = edges.shape[-1] // grid
    side, starts = region + 2, torch.arange(grid) * region
    rows = (starts[:, None] + torch.arange(side)).flatten()
    tall = F.pad(edges, (1, 1, 1, 1)).index_select(2, rows).unflatten(2, (grid, side))
    cut = [tall[..., start : start + side] for start in starts.tolist()]
    # (B, Gx, 3, Gy, R + 2, R + 2), rows of regions first.
    regions = torch.stack(cut, 1).permute(0, 3, 1, 2, 4, 5)
    # -1, so that the batch size needs no Shape node.
    return regions.reshape(-1, grid * grid, 3 * side * side)


class TaskTokens(nn.Module):
    """Adds the prompts of open regions to the patch tokens, for every task.

    Only tokens that overlap some task's frame have rows.
    """

    index: Tensor
    place: Tensor

    def __init__(self, models: Sequence[AdaViPro], dtype: torch.dtype) -> None:
        super().__init__()
        for number, model in enumerate(models):
            table = TokenTable(model, dtype)
            if number == 0:
                shape = len(table.rows), len(models), *table.rows[0].shape
                stacked = torch.empty(shape, dtype=dtype)  # (parts, T, N, W)
            for part, rows in enumerate(table.rows):
                stacked[part, number] = rows.detach()
        touched = stacked.ne(0).any(-1).any(0).any(0).nonzero()[:, 0]
        count = stacked.shape[2]
        self.rows = nn.ParameterList(list(stacked[:, :, touched]))
        self.register_buffer("index", table.index[:, touched])
        # Index of each token's sum; tokens without rows use the row of zeros after the last sum.
        place = torch.full((count,), len(touched))
        place[touched] = torch.arange(len(touched))
        self.register_buffer("place", place)
        self.all = len(touched) == count

    def forward(self, tokens: Tensor, mask: Tensor, task: Tensor, _absent: Tensor) -> Tensor:
        """Add the open regions' rows of each image's task to tokens (B, N, W)."""
        flat, total = mask.flatten(1).to(tokens.dtype), None
        for number, rows in enumerate(self.rows):
            chosen = flat.index_select(1, self.index[number])
            added = chosen[..., None] * rows.index_select(0, task)
            total = added if total is None else total + added
        assert total is not None
        if self.all:
            prompted: Tensor = tokens + total
            return prompted
        placed: Tensor = F.pad(total, (0, 0, 0, 1)).index_select(1, self.place)
        return tokens + placed


class TaskPixels(nn.Module):
    """Adds the prompts to the pixels, for every task."""

    def __init__(self, models: Sequence[AdaViPro]) -> None:
        super().__init__()
        self.grid = models[0].prompt.grid
        self.templates = nn.Parameter(torch.stack([template_of(model) for model in models]))

    def forward(self, images: Tensor, mask: Tensor, task: Tensor, _absent: Tensor) -> Tensor:
        """Add each image's prompt to normalised images (B, 3, S, S)."""
        region = (self.grid, images.shape[-1] // self.grid)
        split = self.templates.index_select(0, task).unflatten(3, region).unflatten(2, region)
        open_only = split * mask[:, None, :, None, :, None].to(images.dtype)
        prompted: Tensor = images + open_only.flatten(4, 5).flatten(2, 3)
        return prompted


class TaskScores(nn.Module):
    """Features (B, F) and tasks (B,) to logits (B, K of the largest task) and embedding.

    The classes of all tasks are scored; heads on features come after heads on embeddings.
    """

    columns: Tensor
    bias: Tensor
    of_embedding: Tensor
    of_features: Tensor

    def __init__(self, models: Sequence[AdaViPro]) -> None:
        super().__init__()
        self.project = Projection(models[0].encoder)
        columns, bias, parts = side_by_side(models, self.project)
        self.register_buffer("columns", columns)
        self.register_buffer("bias", bias)
        absent = torch.zeros(parts[1].shape[1], 1)
        self.register_buffer("of_embedding", parts[0].t().contiguous())
        self.register_buffer("of_features", torch.cat([parts[1].t(), absent], 1).contiguous())

    def forward(self, features: Tensor, task: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
        """Score all classes, and select those of each image's task."""
        embedding, features = self.project(features)
        scores = features @ self.of_features
        if self.of_embedding.shape[1]:
            scores = torch.cat([embedding @ self.of_embedding, scores], 1)
        logits = (scores + self.bias).gather(1, self.columns.index_select(0, task))
        return logits.masked_fill(absent[:, None], ABSENT), embedding


class GatheredScores(nn.Module):
    """Like `TaskScores`, but only the classes of each image's task are gathered and scored."""

    columns: Tensor
    bias: Tensor
    rows: Tensor
    reads_features: Tensor

    def __init__(self, models: Sequence[AdaViPro]) -> None:
        super().__init__()
        self.project = Projection(models[0].encoder)
        columns, bias, parts = side_by_side(models, self.project)
        self.register_buffer("columns", columns)
        self.register_buffer("bias", bias)
        # Pad rows to the same width.
        width = max(part.shape[1] for part in parts if len(part))
        padded = [F.pad(part, (0, width - part.shape[1])) for part in parts if len(part)]
        self.register_buffer("rows", torch.cat([*padded, torch.zeros(1, width)]))
        reads = torch.tensor([model.head.reads == "features" for model in models])
        self.register_buffer("reads_features", reads)

    def forward(self, features: Tensor, task: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
        """Gather and score the classes of each image's task."""
        embedding, features = self.project(features)
        width, columns = self.rows.shape[1], self.columns.index_select(0, task)
        read = F.pad(embedding, (0, width - embedding.shape[1]))
        if width >= features.shape[1]:
            padded = F.pad(features, (0, width - features.shape[1]))
            read = torch.where(self.reads_features.index_select(0, task)[:, None], padded, read)
        indices = columns.flatten()
        own = self.rows.index_select(0, indices).unflatten(0, (-1, columns.shape[1]))
        bias = self.bias.index_select(0, indices).unflatten(0, (-1, columns.shape[1]))
        logits = (own * read[:, None]).sum(2) + bias
        return logits.masked_fill(absent[:, None], ABSENT), embedding


def side_by_side(
    models: Sequence[AdaViPro], project: Projection
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Concatenate the classes of all tasks.

    Returns:
        The indices of each task's classes (T, K of the largest task); the biases of all classes,
        and of a missing class at the end; the rows of heads on embeddings (.., E) and of heads on
        features (.., F).
    """
    heads = [model.head.folded for model in models]
    counts = [len(head.rows) for head in heads]
    ordered = sorted(range(len(heads)), key=lambda number: heads[number].reads == "features")
    # The index after the last class stands for a missing class.
    columns = torch.full((len(heads), max(counts)), sum(counts))
    biases, begin = [], 0
    for number in ordered:
        bias, count = heads[number].bias, counts[number]
        columns[number, :count] = torch.arange(begin, begin + count)
        biases.append(torch.zeros(count) if bias is None else bias)
        begin += count
    widths = project.widths(heads[0])
    embedded, on_features = (
        torch.cat([torch.zeros(0, width), *(head.rows for head in heads if head.reads == reads)])
        for reads, width in zip(("embedding", "features"), widths, strict=True)
    )
    return columns, torch.cat([*biases, torch.tensor([ABSENT])]), (embedded, on_features)


def task_scores(models: Sequence[AdaViPro]) -> TaskScores | GatheredScores:
    """Choose the cheaper of the two heads."""
    counts = [len(model.head.rows) for model in models]
    many = sum(counts) > MOST_SCORES * max(counts)
    return GatheredScores(models) if many else TaskScores(models)


class Numbered(nn.Module):
    """Tasks whose tables are constants: the input is each image's task number.

    Args:
        count: number of tasks.
    """

    inputs = ("task",)

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def example(self) -> tuple[Tensor, ...]:
        """Return example task numbers of two images."""
        return (torch.zeros(2, dtype=torch.int64),)

    def dynamic(self, batch: Any) -> tuple[dict[int, Any], ...]:
        """Return the inputs' dynamic axes."""
        return ({0: batch},)

    def forward(self, task: Tensor) -> tuple[Tensor, Tensor]:
        """Return task numbers that can be gathered, and which of them are invalid."""
        # Gather counts negative numbers from the end, which would select another task. Numbers
        # after the last task are an error on a CPU.
        absent = (task < 0) | (task >= self.count)
        return torch.where(task < 0, self.count, task), absent


def bytes_of(graph: nn.Module, model: AdaViPro) -> int:
    """Return the bytes that a task adds to a file of several tasks."""
    tables = graph.state_dict().items()
    own: int = sum(table[0].nbytes for name, table in tables if OF_TASKS.fullmatch(name))
    # The head's rows and biases.
    size: int = model.head.rows.nbytes + 4 * len(model.head.rows)
    return own + size
