"""What is exported: a frozen encoder and its prompts as one module without a choice to make.

    image → resize → decide → normalise → patches + prompt → trunk → head → logits, mask, embedding

One task, several whose tables are constants, and several whose tables are inputs differ in the
parts that decide, prompt and score; everything else is the encoder.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adavipro_fast.export.encoder import Scores, Trunk, Whole, is_plain
from adavipro_fast.export.fold import (
    Affine,
    Always,
    MaskHead,
    PixelPrompt,
    TokenTable,
    template_of,
)
from adavipro_fast.export.open_tasks import (
    AsData,
    TableMasks,
    TableScores,
    TableTokens,
)
from adavipro_fast.export.patches import (
    PatchEmbedding,
    foldable,
    folding_obstacle,
    patch_convolution,
    take_tokens,
)
from adavipro_fast.export.resize import EXAMPLE, LARGEST_SIDE, Resize, any_size_obstacle
from adavipro_fast.export.tasks import (
    Numbered,
    TaskMasks,
    TaskPixels,
    TaskTokens,
    task_scores,
    tasks_obstacle,
)
from adavipro_fast.method.config import DTYPES, ExportPrecision, Input
from adavipro_fast.method.model import AdaViPro

GraphKind = Literal["folded", "pixel"]


@dataclass(frozen=True)
class Form:
    """Which of its forms a graph has."""

    graph: GraphKind = "folded"
    """prompt folded into the tokens, or on the pixels"""
    precision: ExportPrecision = "fp32"
    """of the encoder's matrix products"""
    input: Input = "float32"
    """normalised floats, RGB bytes 0-255, or bytes of any height and width"""
    baseline: bool = False
    """the encoder without a prompt"""
    tasks: Literal["alone", "baked", "open"] = "alone"
    """one without a name; several as constants; any number as inputs"""

    @property
    def folded(self) -> bool:
        """Whether the prompt is folded into the tokens."""
        return self.graph == "folded"

    @property
    def dtype(self) -> torch.dtype:
        """Of the encoder's matrix products; int8 and fp8 are quantised later."""
        return DTYPES[self.precision]


def usual_form(model: AdaViPro) -> GraphKind:
    """Fold the prompt where the encoder allows it."""
    return "pixel" if folding_obstacle(model.encoder.visual) else "folded"


class OneTask(nn.Module):
    """The only task has no number and no tables among the inputs."""

    inputs: tuple[str, ...] = ()

    def example(self) -> tuple[Tensor, ...]:
        """Return no inputs."""
        return ()

    def dynamic(self, batch: Any) -> tuple[dict[int, Any], ...]:
        """Return no axes."""
        return ()

    def forward(self) -> tuple[Tensor, ...]:
        """Choose nothing."""
        return ()


Inputs = OneTask | Numbered | AsData


@dataclass(frozen=True)
class Parts:
    """What differs between one task, several as constants, and several as inputs."""

    tasks: Inputs
    """from the inputs behind the image to what the others are called with"""
    head: nn.Module
    decide: nn.Module | None = None
    """none without a prompt"""
    prompt: nn.Module | None = None


class Graph(nn.Module):
    """The encoder and its parts; `inputs` and `outputs` name what it takes and gives.

    Args:
        model: trained; its image tower is taken over.
        parts: of its tasks.
        form: folded or not, precision, input.
    """

    tasks: Inputs
    before: nn.Module
    normalise: nn.Module
    outputs: tuple[str, ...] = ("logits", "mask", "embedding")

    def __init__(self, model: AdaViPro, parts: Parts, form: Form) -> None:
        super().__init__()
        visual = model.encoder.visual
        self.folded, self.side = form.folded, model.preprocess.size
        self.uint8 = form.input != "float32"
        self.inputs = ("image", *parts.tasks.inputs)
        if parts.decide is None:
            self.outputs = ("logits", "embedding")
        # Tables that are inputs are of normalised images, whatever the graph takes.
        first = form.tasks == "open"
        in_graph = first or not form.folded
        scale, shift = affine_of(model, form)
        folded_in = (torch.ones(3), torch.zeros(3)) if in_graph else (scale, shift)
        self.resize: nn.Module | None = None
        if form.input == "any":
            margin = 0 if form.baseline else model.preprocess.margin
            self.resize = Resize(replace(model.preprocess, margin=margin))
        affine = Affine(scale, shift) if self.uint8 and in_graph else nn.Identity()
        self.before, self.normalise = (affine, nn.Identity()) if first else (nn.Identity(), affine)
        self.decide, self.prompt, self.head = parts.decide, parts.prompt, parts.head
        self.tasks = parts.tasks
        self.patches: nn.Module = nn.Identity()
        convolution = patch_convolution(visual)
        if convolution is not None and not folding_obstacle(visual):
            self.patches = PatchEmbedding(convolution, *folded_in, form.dtype)
            if not is_plain(visual):
                take_tokens(visual)
        kind = Trunk if is_plain(visual) else Whole
        self.trunk: nn.Module = kind(visual, form.dtype)

    def example(self) -> tuple[Tensor, ...]:
        """Return inputs of two images."""
        sides = EXAMPLE if self.resize is not None else (self.side, self.side)
        dtype = torch.uint8 if self.uint8 else torch.float32
        return (torch.zeros(2, 3, *sides, dtype=dtype), *self.tasks.example())

    def dynamic(self, batch: Any) -> tuple[Any, ...]:
        """Return which axes of the example vary."""
        image = {0: batch}
        if self.resize is not None:
            names = enumerate(("height", "width"), 2)
            image |= {at: torch.export.Dim(name, min=1, max=LARGEST_SIDE) for at, name in names}
        rest = self.tasks.dynamic(batch)
        return (image, rest) if rest else (image,)

    def forward(self, image: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Classify: image (B, 3, S, S) to logits (B, K), mask (B, G, G) and embedding (B, E)."""
        pixels = self.before(image.float() if self.resize is None else self.resize(image))
        chosen = self.tasks(*rest)
        if self.decide is None or self.prompt is None:
            return self.classify(self.patches(self.normalise(pixels)), chosen)
        mask = self.decide(pixels, *chosen)
        images = self.normalise(pixels)
        if self.folded:
            tokens = self.prompt(self.patches(images), mask, *chosen)
        else:
            tokens = self.patches(self.prompt(images, mask, *chosen))
        logits, embedding = self.classify(tokens, chosen)
        return logits, mask.int(), embedding

    def classify(self, tokens: Tensor, chosen: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Go on from patch tokens, or from pixels where the tower is taken whole."""
        logits, embedding = self.head(self.trunk(tokens), *chosen)
        return logits, embedding


def affine_of(model: AdaViPro, form: Form) -> tuple[Tensor, Tensor]:
    """Return a and c of x = a·u + c, from a graph's pixels u to normalised ones; (3,) each."""
    prompt = model.prompt
    if form.input == "float32":
        return torch.ones(3), torch.zeros(3)
    return 1 / (255 * prompt.std), -prompt.mean / prompt.std


def deployed(models: Sequence[AdaViPro], form: Form) -> Graph:
    """Build what is exported.

    Args:
        models: one a task, trained; they stay as they are.
        form: of the graph.

    Raises:
        ValueError: the encoder cannot be folded or does not take images of any size, or the models
            cannot share a graph.
    """
    first = models[0]
    if form.folded:
        foldable(first.encoder.visual)
    if form.tasks != "alone" and (obstacle := tasks_obstacle(models)):
        raise ValueError(f"the checkpoints cannot share one graph: {obstacle}; export each alone")
    if form.tasks == "open" and not form.folded:
        raise ValueError("--tasks open needs --graph folded")
    if form.input == "any" and (obstacle := any_size_obstacle(first.preprocess)):
        raise ValueError(f"--input any is not supported here: {obstacle}; use --input uint8")
    own = copy.deepcopy(first).cpu().eval().requires_grad_(False)
    # Tables are of the tower's own weights, before `Graph` casts them.
    parts = PARTS[form.tasks]([own, *models[1:]], form)
    return Graph(own, parts, form)


def _alone(models: Sequence[AdaViPro], form: Form) -> Parts:
    model = models[0]
    prompt, head = model.prompt, Scores(model)
    if form.baseline or prompt.template is None:
        return Parts(OneTask(), head)
    decide: nn.Module = Always(prompt.grid)
    if prompt.generator is not None:
        decide = MaskHead(prompt, *affine_of(model, form))
    place = TokenTable(model, form.dtype) if form.folded else PixelPrompt(template_of(model))
    return Parts(OneTask(), head, decide, place)


def _baked(models: Sequence[AdaViPro], form: Form) -> Parts:
    return Parts(
        Numbered(len(models)),
        task_scores(models),
        TaskMasks(models, *affine_of(models[0], form)),
        TaskTokens(models, form.dtype) if form.folded else TaskPixels(models),
    )


def _as_data(models: Sequence[AdaViPro], form: Form) -> Parts:
    # Its edges are the graph's, and its table has the shape of every task's.
    model = next((m for m in models if m.prompt.generator is not None), models[0])
    table = TokenTable(model, form.dtype)
    return Parts(AsData(model, table), TableScores(model), TableMasks(model), TableTokens(table))


PARTS = {"alone": _alone, "baked": _baked, "open": _as_data}
