"""Many tasks in one graph: each image is prompted and classified for the task that it names.

The encoder is shared; what a task adds are rows of constant tables, gathered by its number t:

    Δ       the product of each region's edges and K[t]
    tokens  E(x) + Σ_r m_r T[t, r]
    logits  scores of all tasks' classes, the columns of task t; of many tasks, the scores of the
            classes of task t alone; -1e30 beyond them

A prompt without a mask path is a mask of constant sign: open everywhere, or closed without a
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
from adavipro_fast.export.patches import foldable
from adavipro_fast.files.task import ABSENT
from adavipro_fast.method.model import AdaViPro

# Tables with an entry a task, but for the classes.
OF_TASKS = re.compile(
    r"decide\.(constant|heads\.\d+\.kernel)|prompt\.(rows\.\d+|templates)|head\.columns"
)
# Up to here, times the largest task's classes, scores of all classes cost less than gathering.
MOST_SCORES = 96


def difference(first: AdaViPro, other: AdaViPro) -> str:
    """Name the settings in which the images of two models are prepared differently."""
    before, after = asdict(first.preprocess), asdict(other.preprocess)
    changed = [f"{k} {before[k]} and {after[k]}" for k in before if before[k] != after[k]]
    older = "; decoding 2 comes from an older version: train that checkpoint again"
    return ", ".join(changed) + (older if before["decoding"] != after["decoding"] else "")


def tasks_obstacle(models: Sequence[AdaViPro]) -> str | None:
    """Say what keeps models from sharing one graph."""
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
            # The generator is in the stacked kernels.
            head.kernel, head.bias = nn.Parameter(kernel), nn.Parameter(torch.zeros(len(models)))
            head.constant = None
        self.register_buffer("constant", constant.flatten(1))

    def forward(self, images: Tensor, task: Tensor, _absent: Tensor) -> Tensor:
        """Decide."""
        delta = self.constant.index_select(0, task)
        for head in self.heads:
            assert isinstance(head, MaskHead)
            delta = delta + own_deltas(head.edge_map(images), head.kernel, task, self.grid)
        decided: Tensor = delta.unflatten(1, (self.grid, self.grid)) > 0
        return decided


def own_deltas(edges: Tensor, kernels: Tensor, task: Tensor, grid: int) -> Tensor:
    """Apply to each image the kernel of its own task: Δ (B, G²) without the constants.

    Not a convolution with a channel for each task: engines need to know how many there are, and
    its work grows with them.

    Args:
        edges: (B, 3, S, S).
        kernels: (T, 3, R + 2, R + 2).
        task: (B,).
        grid: G.
    """
    own = kernels.index_select(0, task).flatten(1)
    return torch.bmm(windows(edges, grid), own[..., None]).squeeze(2)


def windows(edges: Tensor, grid: int) -> Tensor:
    """Gather what each region's decision reads: (B, 3, S, S) to (B, G², 3 (R + 2)²)."""
    region = edges.shape[-1] // grid
    side, starts = region + 2, torch.arange(grid) * region
    rows = (starts[:, None] + torch.arange(side)).flatten()
    tall = F.pad(edges, (1, 1, 1, 1)).index_select(2, rows).unflatten(2, (grid, side))
    cut = [tall[..., start : start + side] for start in starts.tolist()]
    # (B, Gx, 3, Gy, R + 2, R + 2), rows of regions first.
    regions = torch.stack(cut, 1).permute(0, 3, 1, 2, 4, 5)
    # Of the batch's size without a node that computes shapes.
    return regions.reshape(-1, grid * grid, 3 * side * side)


class TaskTokens(nn.Module):
    """What each region's prompt adds to each patch token, for every task.

    Only tokens that some task's frame touches have rows.
    """

    index: Tensor
    place: Tensor

    def __init__(self, models: Sequence[AdaViPro], dtype: torch.dtype) -> None:
        super().__init__()
        convolution, grid = foldable(models[0].encoder.visual), models[0].prompt.grid
        for number, model in enumerate(models):
            table = TokenTable(convolution, template_of(model), grid, dtype)
            if number == 0:
                shape = len(table.rows), len(models), *table.rows[0].shape
                stacked = torch.empty(shape, dtype=dtype)  # (parts, T, N, W)
            for part, rows in enumerate(table.rows):
                stacked[part, number] = rows.detach()
        touched = stacked.ne(0).any(-1).any(0).any(0).nonzero()[:, 0]
        count = stacked.shape[2]
        self.rows = nn.ParameterList(list(stacked[:, :, touched]))
        self.register_buffer("index", table.index[:, touched])
        # Where each token finds its sum: its own place, or an empty one behind the others.
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
            whole: Tensor = tokens + total
            return whole
        placed: Tensor = F.pad(total, (0, 0, 0, 1)).index_select(1, self.place)
        return tokens + placed


class TaskPixels(nn.Module):
    """The prompts of every task on the pixels."""

    def __init__(self, models: Sequence[AdaViPro]) -> None:
        super().__init__()
        self.grid = models[0].prompt.grid
        self.templates = nn.Parameter(torch.stack([template_of(model) for model in models]))

    def forward(self, images: Tensor, mask: Tensor, task: Tensor, _absent: Tensor) -> Tensor:
        """Prompt normalised images (B, 3, S, S)."""
        region = (self.grid, images.shape[-1] // self.grid)
        split = self.templates.index_select(0, task).unflatten(3, region).unflatten(2, region)
        open_only = split * mask[:, None, :, None, :, None].to(images.dtype)
        prompted: Tensor = images + open_only.flatten(4, 5).flatten(2, 3)
        return prompted


class TaskScores(nn.Module):
    """From features (B, F) and tasks (B,) to logits (B, K of the largest task) and embedding.

    Classes of all tasks are scored, those of linear heads on features after the others.
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
        """Score each image's own classes."""
        embedding, features = self.project(features)
        scores = features @ self.of_features
        if self.of_embedding.shape[1]:
            scores = torch.cat([embedding @ self.of_embedding, scores], 1)
        logits = (scores + self.bias).gather(1, self.columns.index_select(0, task))
        return logits.masked_fill(absent[:, None], ABSENT), embedding


class GatheredScores(nn.Module):
    """The same of many tasks: an image's own classes are gathered, and they alone are scored."""

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
        # As wide as the widest.
        width = max(part.shape[1] for part in parts if len(part))
        padded = [F.pad(part, (0, width - part.shape[1])) for part in parts if len(part)]
        self.register_buffer("rows", torch.cat([*padded, torch.zeros(1, width)]))
        reads = torch.tensor([model.head.reads == "features" for model in models])
        self.register_buffer("reads_features", reads)

    def forward(self, features: Tensor, task: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
        """Score each image's own classes."""
        embedding, features = self.project(features)
        width, columns = self.rows.shape[1], self.columns.index_select(0, task)
        read = F.pad(embedding, (0, width - embedding.shape[1]))
        if width >= features.shape[1]:
            wide = F.pad(features, (0, width - features.shape[1]))
            read = torch.where(self.reads_features.index_select(0, task)[:, None], wide, read)
        places = columns.flatten()
        own = self.rows.index_select(0, places).unflatten(0, (-1, columns.shape[1]))
        bias = self.bias.index_select(0, places).unflatten(0, (-1, columns.shape[1]))
        logits = (own * read[:, None]).sum(2) + bias
        return logits.masked_fill(absent[:, None], ABSENT), embedding


def side_by_side(
    models: Sequence[AdaViPro], project: Projection
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Put the classes of all tasks side by side.

    Returns:
        The places of each task's classes (T, K of the largest); the biases of all, with that of no
        class behind them; the rows that read the embedding (.., E), then those of features (.., F).
    """
    heads = [model.head.folded for model in models]
    counts = [len(head.rows) for head in heads]
    ordered = sorted(range(len(heads)), key=lambda number: heads[number].reads == "features")
    # One more column behind all, which is no class.
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
    """Take the head that does less work."""
    counts = [len(model.head.rows) for model in models]
    many = sum(counts) > MOST_SCORES * max(counts)
    return GatheredScores(models) if many else TaskScores(models)


class Numbered(nn.Module):
    """Tasks whose tables are constants: each image names the number of its own.

    Args:
        count: of tasks.
    """

    inputs = ("task",)

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def example(self) -> tuple[Tensor, ...]:
        """Return the tasks of two images."""
        return (torch.zeros(2, dtype=torch.int64),)

    def dynamic(self, batch: Any) -> tuple[dict[int, Any], ...]:
        """Return which axes of the inputs vary."""
        return ({0: batch},)

    def forward(self, task: Tensor) -> tuple[Tensor, Tensor]:
        """Tell the tasks that exist from others, of which there must be no answer."""
        # A gather would count numbers below 0 from the end: the answer of another task. Above the
        # last one it is an error on a CPU.
        absent = (task < 0) | (task >= self.count)
        return torch.where(task < 0, self.count, task), absent


def bytes_of(graph: nn.Module, model: AdaViPro) -> int:
    """Return the bytes that a task's model adds to a file of several."""
    tables = graph.state_dict().items()
    own: int = sum(table[0].nbytes for name, table in tables if OF_TASKS.fullmatch(name))
    # Rows and biases.
    size: int = model.head.rows.nbytes + 4 * len(model.head.rows)
    return own + size
