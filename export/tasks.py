"""Many tasks in one graph: each image is prompted and classified for the task that it names.

The encoder is shared; what a task adds are rows of constant tables, gathered by its number t:

    Δ       the collapsed generators of all tasks are the channels of one convolution; channel t
    tokens  E(x) + Σ_r m_r T[t, r]
    logits  scores of all tasks' classes; the columns of task t, -1e30 beyond them

A prompt without a mask path is a mask of constant sign: open everywhere, or closed without a
prompt.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adavipro_fast.export.encoder import Head
from adavipro_fast.export.fold import MaskHead, Plain, TokenTable, constant_delta, template_of
from adavipro_fast.files.task import ABSENT
from adavipro_fast.method.model import AdaViPro


def tasks_obstacle(models: Sequence[AdaViPro]) -> str | None:
    """Say what keeps models from sharing one graph."""
    first = models[0]
    for model in models:
        if model.encoder.sha256 != first.encoder.sha256:
            return "they are of different encoders"
        if model.preprocess != first.preprocess:
            return "their images are prepared differently (size, mean, deviation or margin)"
        if model.config.region_size != first.config.region_size:
            return "their regions are of different sizes"
        if model.config.method == "full_finetune":
            return "a fine-tuned tower is not shared"
        if model.config.activation != "none":
            return f"activation {model.config.activation} does not collapse"
    return None


class TaskMasks(nn.Module):
    """Images (B, 3, S, S) and choices (B, T) of 0 and 1 to masks (B, G, G) bool."""

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

    def forward(self, images: Tensor, chosen: Tensor) -> Tensor:
        """Decide."""
        delta = chosen @ self.constant
        for head in self.heads:
            assert isinstance(head, MaskHead)
            every = head.delta(images).flatten(2)  # (B, T, G²)
            # Not as a product of matrices: the one that is chosen stays what it is.
            delta = delta + (every * chosen[..., None]).sum(1)
        decided: Tensor = delta.unflatten(1, (self.grid, self.grid)) > 0
        return decided


class TaskTokens(nn.Module):
    """What each region's prompt adds to each patch token, for every task.

    Only tokens that some task's frame touches have rows.
    """

    index: Tensor
    place: Tensor

    def __init__(self, models: Sequence[AdaViPro], dtype: torch.dtype) -> None:
        super().__init__()
        visual, grid = models[0].encoder.visual, models[0].prompt.grid
        tables = [TokenTable(visual, template_of(model), grid, dtype) for model in models]
        parts = range(len(tables[0].rows))
        stacked = torch.stack(
            [torch.stack([table.rows[part].detach() for table in tables]) for part in parts]
        )  # (parts, T, N, W)
        touched = stacked.ne(0).any(-1).any(0).any(0).nonzero()[:, 0]
        count = stacked.shape[2]
        self.rows = nn.ParameterList(list(stacked[:, :, touched]))
        self.register_buffer("index", tables[0].index[:, touched])
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
    """From features (B, F) and tasks (B,) to logits (B, K of the largest task) and embedding."""

    columns: Tensor
    of_embedding: Tensor
    of_features: Tensor

    def __init__(self, models: Sequence[AdaViPro]) -> None:
        super().__init__(models[0])
        heads = [Head(model) for model in models]
        most = max(head.classes.shape[1] for head in heads)
        ordered = sorted(range(len(heads)), key=lambda number: heads[number].on_features)
        columns = torch.zeros(len(heads), most, dtype=torch.int64)
        biases, begin = [], 0
        for number in ordered:
            head, count = heads[number], heads[number].classes.shape[1]
            columns[number, :count] = torch.arange(begin, begin + count)
            biases.append(torch.zeros(count) if head.bias is None else head.bias)
            begin += count
        for number, head in enumerate(heads):
            # One more column, which is no class.
            columns[number, head.classes.shape[1] :] = begin
        for name, on_features, size in (
            ("of_embedding", False, self.widths[0]),
            ("of_features", True, self.widths[1]),
        ):
            rows = [heads[n].classes for n in ordered if heads[n].on_features is on_features]
            if on_features:
                rows.append(torch.zeros(size, 1))
            self.register_buffer(name, torch.cat([torch.zeros(size, 0), *rows], 1).contiguous())
        self.register_buffer("bias", torch.cat([*biases, torch.tensor([ABSENT])]))
        self.register_buffer("columns", columns)

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
    numbers: Tensor

    def __init__(
        self, models: Sequence[AdaViPro], *, folded: bool, dtype: torch.dtype, uint8: bool
    ) -> None:
        tables = None
        if folded:
            # Of the tower's own weights, before they are cast.
            tables = TaskTokens(models, dtype)
        first = copy.deepcopy(models[0]).cpu().eval().requires_grad_(False)
        super().__init__(first, folded=folded, dtype=dtype, uint8=uint8)
        self.head = TaskHead(models)
        self.decide = TaskMasks(models, self.scale, self.shift)
        self.prompts: nn.Module = tables or TaskPixels(models)
        self.folded = folded
        self.register_buffer("numbers", torch.arange(len(models)))

    def example(self, side: int) -> tuple[Tensor, ...]:
        """Return inputs of two images."""
        return (*super().example(side), torch.zeros(2, dtype=torch.int64))

    def forward(self, image: Tensor, task: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Classify."""
        pixels = image.float()
        chosen = (task[:, None] == self.numbers).float()
        mask = self.decide(pixels, chosen)
        normalised = self.normalise(pixels)
        if self.folded:
            tokens = self.prompts(self.patches(normalised), mask, task)
        else:
            tokens = self.patches(self.prompts(normalised, mask, task))
        logits, embedding = self.head(self.trunk(tokens), task)
        return logits, mask.int(), embedding
