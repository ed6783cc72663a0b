"""Many tasks in one graph: each image is prompted and classified for the task that it names.

The encoder is shared; what a task adds are rows of constant tables, gathered by its number t:

    Δ       the collapsed generators of all tasks are the channels of one convolution, channel t;
            of many tasks, the product of each region's pixels and K[t]
    tokens  E(x) + Σ_r m_r T[t, r]
    logits  scores of all tasks' classes, the columns of task t; of many tasks, the scores of the
            classes of task t alone; -1e30 beyond them

A prompt without a mask path is a mask of constant sign: open everywhere, or closed without a
prompt.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adavipro_fast.export.encoder import Head
from adavipro_fast.export.fold import MaskHead, Plain, TokenTable, constant_delta, template_of
from adavipro_fast.export.patches import foldable
from adavipro_fast.files.task import ABSENT
from adavipro_fast.method.model import AdaViPro

# Tables with an entry a task, but for the classes.
OF_TASKS = re.compile(
    r"decide\.(constant|heads\.\d+\.kernel)|prompts\.(rows\.\d+|templates)|head\.columns"
)
# Up to here a channel for each task costs less than the windows of each region's pixels.
MOST_CHANNELS = 96
# Up to here, times the largest task's classes, scores of all classes cost less than gathering.
MOST_SCORES = 96


def difference(first: AdaViPro, other: AdaViPro) -> str:
    """Name the settings in which the images of two models are prepared differently."""
    before, after = asdict(first.preprocess), asdict(other.preprocess)
    changed = [f"{k} {before[k]} and {after[k]}" for k in before if before[k] != after[k]]
    older = "; decoding 2 is of an older version: train that one again"
    return ", ".join(changed) + (older if before["decoding"] != after["decoding"] else "")


def tasks_obstacle(models: Sequence[AdaViPro]) -> str | None:
    """Say what keeps models from sharing one graph."""
    first = models[0]
    for model in models:
        if model.encoder.sha256 != first.encoder.sha256:
            return "they are of different encoders"
        if model.preprocess != first.preprocess:
            return f"their images are prepared differently: {difference(first, model)}"
        if model.config.region_size != first.config.region_size:
            return "their regions are of different sizes"
        if model.config.method == "full_finetune":
            return "a fine-tuned tower is not shared"
        if model.config.activation != "none":
            return f"activation {model.config.activation} does not collapse"
    return None


class TaskMasks(nn.Module):
    """Images (B, 3, S, S) and tasks (B,) to masks (B, G, G) bool."""

    constant: Tensor
    numbers: Tensor

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
        self.by_channels = len(models) <= MOST_CHANNELS
        self.register_buffer("constant", constant.flatten(1))
        self.register_buffer("numbers", torch.arange(len(models)))

    def forward(self, images: Tensor, task: Tensor) -> Tensor:
        """Decide."""
        delta = self.constant.index_select(0, task)
        for head in self.heads:
            assert isinstance(head, MaskHead)
            if self.by_channels:
                every = head.delta(images).flatten(2)  # (B, T, G²)
                chosen = (task[:, None] == self.numbers).float()
                # Not as a product of matrices: the one that is chosen stays what it is.
                delta = delta + (every * chosen[..., None]).sum(1)
            else:
                own = head.kernel.index_select(0, task).flatten(1)
                delta = delta + (windows(head.edge_map(images), self.grid) @ own[..., None])[..., 0]
        decided: Tensor = delta.unflatten(1, (self.grid, self.grid)) > 0
        return decided


def windows(edges: Tensor, grid: int) -> Tensor:
    """Gather what each region's decision reads: (B, 3, S, S) to (B, G², 3 (R + 2)²)."""
    region = edges.shape[-1] // grid
    side, starts = region + 2, torch.arange(grid) * region
    rows = (starts[:, None] + torch.arange(side)).flatten()
    tall = F.pad(edges, (1, 1, 1, 1)).index_select(2, rows).unflatten(2, (grid, side))
    cut = [tall[..., start : start + side] for start in starts.tolist()]
    # (B, Gx, 3, Gy, R + 2, R + 2), rows of regions first.
    return torch.stack(cut, 1).permute(0, 3, 1, 2, 4, 5).flatten(3).flatten(1, 2)


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

    def forward(self, tokens: Tensor, mask: Tensor, task: Tensor) -> Tensor:
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

    def forward(self, images: Tensor, mask: Tensor, task: Tensor) -> Tensor:
        """Prompt normalised images (B, 3, S, S)."""
        region = (self.grid, images.shape[-1] // self.grid)
        split = self.templates.index_select(0, task).unflatten(3, region).unflatten(2, region)
        open_only = split * mask[:, None, :, None, :, None].to(images.dtype)
        prompted: Tensor = images + open_only.flatten(4, 5).flatten(2, 3)
        return prompted


class TaskHead(Head):
    """From features (B, F) and tasks (B,) to logits (B, K of the largest task) and embedding.

    Classes of all tasks are scored, those of linear heads on features after the others.
    """

    columns: Tensor
    of_embedding: Tensor
    of_features: Tensor

    def __init__(self, models: Sequence[AdaViPro]) -> None:
        super().__init__(models[0])
        heads = [Head(model) for model in models]
        counts = [head.classes.shape[1] for head in heads]
        ordered = sorted(range(len(heads)), key=lambda number: heads[number].on_features)
        # One more column behind all, which is no class.
        columns = torch.full((len(heads), max(counts)), sum(counts))
        biases, begin = [], 0
        for number in ordered:
            head, count = heads[number], counts[number]
            columns[number, :count] = torch.arange(begin, begin + count)
            biases.append(torch.zeros(count) if head.bias is None else head.bias)
            begin += count
        self.register_buffer("bias", torch.cat([*biases, torch.tensor([ABSENT])]))
        self.register_buffer("columns", columns)
        rows = []
        for on_features, width in zip((False, True), self.widths, strict=True):
            own = [h.classes.t() for h in heads if h.on_features is on_features]
            rows.append(torch.cat([torch.zeros(0, width), *own]))
        self.keep(rows)

    def keep(self, rows: list[Tensor]) -> None:
        """Keep classes that are scored on the embedding (K, E), and on the features (K, F)."""
        absent = torch.zeros(self.widths[1], 1)
        self.register_buffer("of_embedding", rows[0].t().contiguous())
        self.register_buffer("of_features", torch.cat([rows[1].t(), absent], 1).contiguous())

    def forward(  # type: ignore[override]
        self, features: Tensor, task: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Score each image's own classes."""
        embedding, features = self.embed(features)
        scores = features @ self.of_features
        if self.of_embedding.shape[1]:
            scores = torch.cat([embedding @ self.of_embedding, scores], 1)
        assert self.bias is not None
        logits = (scores + self.bias).gather(1, self.columns.index_select(0, task))
        return logits, embedding


class GatheredHead(TaskHead):
    """The same of many tasks: an image's own classes are gathered, and they alone are scored."""

    rows: Tensor
    reads_features: Tensor

    def __init__(self, models: Sequence[AdaViPro]) -> None:
        super().__init__(models)
        reads = torch.tensor([model.config.head_input == "features" for model in models])
        self.register_buffer("reads_features", reads)

    def keep(self, rows: list[Tensor]) -> None:
        """Keep all classes side by side, as wide as the widest."""
        width = max(w for w, part in zip(self.widths, rows, strict=True) if len(part))
        padded = [F.pad(part, (0, width - part.shape[1])) for part in rows if len(part)]
        self.register_buffer("rows", torch.cat([*padded, torch.zeros(1, width)]))

    def forward(  # type: ignore[override]
        self, features: Tensor, task: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Score each image's own classes."""
        embedding, features = self.embed(features)
        width, columns = self.rows.shape[1], self.columns.index_select(0, task)
        read = F.pad(embedding, (0, width - embedding.shape[1]))
        if width >= features.shape[1]:
            wide = F.pad(features, (0, width - features.shape[1]))
            read = torch.where(self.reads_features.index_select(0, task)[:, None], wide, read)
        places = columns.flatten()
        own = self.rows.index_select(0, places).unflatten(0, (-1, columns.shape[1]))
        assert self.bias is not None
        bias = self.bias.index_select(0, places).unflatten(0, (-1, columns.shape[1]))
        return (own * read[:, None]).sum(2) + bias, embedding


def task_head(models: Sequence[AdaViPro]) -> TaskHead:
    """Take the head that does less work."""
    counts = [len(model.class_embeddings) for model in models]
    many = sum(counts) > MOST_SCORES * max(counts)
    return GatheredHead(models) if many else TaskHead(models)


class Tasks(Plain):
    """Image (B, 3, S, S) and task (B,) int64 to logits, mask and embedding.

    Args:
        models: one a task; what `tasks_obstacle` refuses must not be among them.
        folded: prompts as tables of token rows; else on the pixels.
        dtype: of the encoder's matrix products.
        uint8: images are RGB pixels 0-255; else normalised floats.
    """

    inputs = ("image", "task")
    outputs = ("logits", "mask", "embedding")

    def __init__(
        self, models: Sequence[AdaViPro], *, folded: bool, dtype: torch.dtype, uint8: bool
    ) -> None:
        tables = None
        if folded:
            # Of the tower's own weights, before they are cast.
            tables = TaskTokens(models, dtype)
        first = copy.deepcopy(models[0]).cpu().eval().requires_grad_(False)
        super().__init__(first, folded=folded, dtype=dtype, uint8=uint8)
        self.head = task_head(models)
        self.decide = TaskMasks(models, self.scale, self.shift)
        self.prompts: nn.Module = tables or TaskPixels(models)
        self.folded, self.count = folded, len(models)
        # Rows and biases.
        self.class_bytes = [
            model.class_embeddings.nbytes + 4 * len(model.class_embeddings) for model in models
        ]

    def example(self, side: int) -> tuple[Tensor, ...]:
        """Return inputs of two images."""
        return (*super().example(side), torch.zeros(2, dtype=torch.int64))

    def bytes_of(self, number: int) -> int:
        """Return the bytes that a task adds to the file."""
        tables = self.state_dict().items()
        own: list[int] = [t[0].nbytes for name, t in tables if OF_TASKS.fullmatch(name)]
        total: int = sum(own) + self.class_bytes[number]
        return total

    def forward(self, image: Tensor, task: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Classify."""
        pixels = image.float()
        # A gather would count numbers below 0 from the end: the answer of another task. Above the
        # last one it is an error on a CPU; elsewhere there must be no answer.
        absent = (task < 0) | (task >= self.count)
        task = torch.where(task < 0, self.count, task)
        mask = self.decide(pixels, task)
        normalised = self.normalise(pixels)
        if self.folded:
            tokens = self.prompts(self.patches(normalised), mask, task)
        else:
            tokens = self.patches(self.prompts(normalised, mask, task))
        logits, embedding = self.head(self.trunk(tokens), task)
        return logits.masked_fill(absent[:, None], ABSENT), mask.int(), embedding
