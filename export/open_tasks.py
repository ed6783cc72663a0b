"""Tasks as inputs: one graph for any number of prompts, and a prompt folded into tables for it."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adavipro_fast.export.encoder import Head
from adavipro_fast.export.fold import MaskHead, Plain, TokenTable, constant_delta, template_of
from adavipro_fast.export.patches import foldable, folding_obstacle
from adavipro_fast.files.checkpoint import Checkpoint
from adavipro_fast.files.task import TABLES, TaskFile
from adavipro_fast.method.model import AdaViPro


def folded_task(name: str, checkpoint: Checkpoint, model: AdaViPro) -> TaskFile:
    """Fold a checkpoint's prompt and head into tables.

    Raises:
        ValueError: its generator does not collapse, or its tower is its own.
    """
    prompt, config = model.prompt, model.config
    if config.activation != "none":
        raise ValueError(f"activation {config.activation} does not collapse; it is no table")
    visual = model.encoder.visual
    if obstacle := folding_obstacle(visual):
        raise ValueError(f"this encoder's prompts are no tables: {obstacle}")
    if config.method == "full_finetune":
        raise ValueError("a fine-tuned tower is no table; export it alone")
    kernel = torch.zeros(3, config.region_size + 2, config.region_size + 2)
    constant = torch.tensor(constant_delta(model))
    if prompt.generator is not None:
        kernel, constant = (part.detach() for part in prompt.generator.collapsed())
    table = TokenTable(foldable(visual), template_of(model), prompt.grid, torch.float32)
    head = Head(model)
    own, count = head.classes.t(), len(model.class_embeddings)
    widths = head.widths
    zeros = [torch.zeros(count, width) for width in widths]
    zeros[int(head.on_features)] = own
    return TaskFile(
        name,
        {
            "kernels": kernel.clone(),
            "constants": constant.expand(prompt.grid**2).clone(),
            "rows": torch.stack([rows.detach() for rows in table.rows]),
            "classes": torch.cat(zeros, 1),
            "biases": torch.zeros(count) if head.bias is None else head.bias.clone(),
        },
        checkpoint.class_names,
        config,
        checkpoint.encoder,
        checkpoint.preprocess,
        checkpoint.calibration,
    )


class OpenTasks(Plain):
    """Image (B, 3, S, S), task (B,), numbers (T,) and tables to logits, mask and embedding.

    Args:
        model: any of the tasks: its encoder, its edges.
        dtype: of the encoder's matrix products.
        uint8: images are RGB pixels 0-255; else normalised floats.
    """

    inputs = ("image", "task", "numbers", *TABLES)
    outputs = ("logits", "mask", "embedding")
    index: Tensor

    def __init__(self, model: AdaViPro, *, dtype: torch.dtype, uint8: bool) -> None:
        own = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        grid = model.prompt.grid
        blank = torch.zeros(3, model.preprocess.size, model.preprocess.size)
        table = TokenTable(foldable(model.encoder.visual), blank, grid, dtype)
        # Tables are of normalised images, whatever the input.
        super().__init__(own, folded=True, dtype=dtype, uint8=uint8, in_graph=True)
        self.grid, self.dtype = grid, dtype
        self.rows = (len(table.rows), *table.rows[0].shape)
        self.register_buffer("index", table.index)
        self.edge: nn.Module | None = None
        if model.prompt.generator is not None:
            self.edge = MaskHead(model.prompt, torch.ones(3), torch.zeros(3))
        self.kernel = model.config.region_size + 2

    def example(self, side: int) -> tuple[Tensor, ...]:
        """Return inputs of two images, three tasks and five classes."""
        kernel, widths = self.kernel, self.head.widths
        return (
            *super().example(side),
            torch.zeros(2, dtype=torch.int64),
            torch.arange(3),
            torch.zeros(3, 3, kernel, kernel),
            torch.zeros(3, self.grid**2),
            torch.zeros(3, *self.rows, dtype=self.dtype),
            torch.zeros(3, 5, sum(widths)),
            torch.zeros(3, 5),
        )

    def dynamic(self, batch: Any) -> dict[str, dict[int, Any]]:
        """Return which axes are open: images, tasks, and classes of the largest one."""
        tasks, classes = (torch.export.Dim(name, min=1, max=65536) for name in ("tasks", "classes"))
        axes: dict[str, dict[int, Any]] = {name: {0: tasks} for name in self.inputs}
        axes |= {"image": {0: batch}, "task": {0: batch}}
        return axes | {name: {0: tasks, 1: classes} for name in ("classes", "biases")}

    def forward(  # type: ignore[override]
        self,
        image: Tensor,
        task: Tensor,
        numbers: Tensor,
        kernels: Tensor,
        constants: Tensor,
        rows: Tensor,
        classes: Tensor,
        biases: Tensor,
    ) -> tuple[Tensor, ...]:
        """Classify."""
        pixels = self.normalise(image.float())
        chosen = (task[:, None] == numbers).float()
        delta = (chosen[..., None] * constants).sum(1)
        if self.edge is not None:
            assert isinstance(self.edge, MaskHead)
            region = kernels.shape[-1] - 2
            every = F.conv2d(self.edge.edges(pixels), kernels, stride=region, padding=1)
            delta = delta + (every.flatten(2) * chosen[..., None]).sum(1)
        mask = delta.unflatten(1, (self.grid, self.grid)) > 0
        tokens, flat = self.patches(pixels), mask.flatten(1).to(self.dtype)
        own = rows.index_select(0, task)
        for part in range(self.rows[0]):
            tokens = tokens + flat.index_select(1, self.index[part])[..., None] * own[:, part]
        embedding, features = self.head.embed(self.trunk(tokens))
        both = torch.cat([embedding, features], 1)
        # Not a product of matrices: those are the encoder's, in its precision.
        scores = (classes.index_select(0, task) * both[:, None]).sum(2)
        return scores + biases.index_select(0, task), mask.int(), embedding
