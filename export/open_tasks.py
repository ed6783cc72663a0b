"""Tasks as inputs: a graph for any number of prompts, and folding a prompt into its tables."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adavipro_fast.export.encoder import Projection
from adavipro_fast.export.fold import MaskHead, TokenTable, constant_delta
from adavipro_fast.export.patches import folding_obstacle
from adavipro_fast.export.tasks import own_deltas
from adavipro_fast.files.checkpoint import Checkpoint
from adavipro_fast.files.task import TABLES, TaskFile
from adavipro_fast.method.model import AdaViPro


def folded_task(name: str, checkpoint: Checkpoint, model: AdaViPro) -> TaskFile:
    """Fold a checkpoint's prompt and head into tables.

    Raises:
        ValueError: the generator has an activation, the tower cannot be folded or was fine-tuned.
    """
    prompt, config = model.prompt, model.config
    if config.activation != "none":
        raise ValueError(f"activation {config.activation} is not supported in a task file")
    visual = model.encoder.visual
    if obstacle := folding_obstacle(visual):
        raise ValueError(f"this encoder does not support task files: {obstacle}")
    if config.method == "full_finetune":
        raise ValueError("a fine-tuned encoder cannot be a task; export it alone")
    kernel = torch.zeros(3, config.region_size + 2, config.region_size + 2)
    constant = torch.tensor(constant_delta(model))
    if prompt.generator is not None:
        kernel, constant = (part.detach() for part in prompt.generator.collapsed())
    table = TokenTable(model, torch.float32)
    head = model.head.folded
    count, widths = len(head.rows), Projection(model.encoder).widths(head)
    classes = [torch.zeros(count, width) for width in widths]
    classes[int(head.reads == "features")] = head.rows
    return TaskFile(
        name,
        {
            "kernels": kernel.clone(),
            "constants": constant.expand(prompt.grid**2).clone(),
            "rows": torch.stack([rows.detach() for rows in table.rows]),
            "classes": torch.cat(classes, 1),
            "biases": torch.zeros(count) if head.bias is None else head.bias.clone(),
        },
        checkpoint.class_names,
        config,
        checkpoint.encoder,
        checkpoint.preprocess,
        checkpoint.calibration,
    )


class Tables(NamedTuple):
    """Inputs of a call other than images: the task of each image, and the tables of all tasks."""

    task: Tensor
    """(B,) int64, 0 to T - 1"""
    kernels: Tensor
    constants: Tensor
    rows: Tensor
    classes: Tensor
    biases: Tensor


class AsData(nn.Module):
    """Tasks whose tables are inputs.

    Args:
        model: any of the tasks; its encoder and region size are used.
        table: of any of the tasks, for its shape.
    """

    inputs = ("task", *TABLES)

    def __init__(self, model: AdaViPro, table: TokenTable) -> None:
        super().__init__()
        grid, kernel = model.prompt.grid, model.config.region_size + 2
        widths = Projection(model.encoder).widths(model.head.folded)
        rows = table.rows
        self.shapes = [(3, kernel, kernel), (grid**2,), (len(rows), *rows[0].shape)]
        self.shapes += [(5, sum(widths)), (5,)]
        self.dtypes = [torch.float32, torch.float32, rows[0].dtype, torch.float32, torch.float32]

    def example(self) -> tuple[Tensor, ...]:
        """Return example inputs of two images, three tasks and five classes."""
        pairs = zip(self.shapes, self.dtypes, strict=True)
        tables = (torch.zeros(3, *shape, dtype=dtype) for shape, dtype in pairs)
        return (torch.zeros(2, dtype=torch.int64), *tables)

    def dynamic(self, batch: Any) -> tuple[dict[int, Any], ...]:
        """Return the dynamic axes: images, tasks, and the largest task's classes."""
        tasks, classes = (torch.export.Dim(name, min=1, max=65536) for name in ("tasks", "classes"))
        return ({0: batch}, *[{0: tasks}] * 3, *[{0: tasks, 1: classes}] * 2)

    def forward(self, *inputs: Tensor) -> tuple[Tables]:
        """Return the inputs as `Tables`."""
        return (Tables(*inputs),)


class TableMasks(nn.Module):
    """Normalised images (B, 3, S, S) to masks (B, G, G) bool, with the tables' kernels.

    Args:
        model: any of the tasks; its edge detector is used.
    """

    def __init__(self, model: AdaViPro) -> None:
        super().__init__()
        self.grid = model.prompt.grid
        self.edge: nn.Module | None = None
        if model.prompt.generator is not None:
            self.edge = MaskHead(model.prompt, torch.ones(3), torch.zeros(3))

    def forward(self, images: Tensor, tables: Tables) -> Tensor:
        """Compute the masks."""
        delta = tables.constants.index_select(0, tables.task)
        if self.edge is not None:
            assert isinstance(self.edge, MaskHead)
            edges = self.edge.edges(images)
            delta = delta + own_deltas(edges, tables.kernels, tables.task, self.grid)
        decided: Tensor = delta.unflatten(1, (self.grid, self.grid)) > 0
        return decided


class TableTokens(nn.Module):
    """Adds the tables' rows of open regions to patch tokens.

    Args:
        table: of any of the tasks, for the regions of each token.
    """

    index: Tensor

    def __init__(self, table: TokenTable) -> None:
        super().__init__()
        self.register_buffer("index", table.index)

    def forward(self, tokens: Tensor, mask: Tensor, tables: Tables) -> Tensor:
        """Add the prompt to tokens (B, N, W), given the mask (B, G, G)."""
        flat, own = mask.flatten(1).to(tokens.dtype), tables.rows.index_select(0, tables.task)
        for part, regions in enumerate(self.index):
            tokens = tokens + flat.index_select(1, regions)[..., None] * own[:, part]
        return tokens


class TableScores(nn.Module):
    """Features (B, F) to logits (B, K of the largest task) and embedding, with the tables."""

    def __init__(self, model: AdaViPro) -> None:
        super().__init__()
        self.project = Projection(model.encoder)

    def forward(self, features: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        """Score the classes of each image's task."""
        embedding, features = self.project(features)
        both = torch.cat([embedding, features], 1)
        # Not a MatMul node: those must be in the encoder's precision, and scores in fp32.
        scores = (tables.classes.index_select(0, tables.task) * both[:, None]).sum(2)
        return scores + tables.biases.index_select(0, tables.task), embedding
