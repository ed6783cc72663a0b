"""A sweep's cells: each is a training run in its own folder, kept once finished."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any, Literal

import torch
import tyro

from adavipro_fast import AdaViPro
from adavipro_fast.artifact.torch import TorchArtifact
from adavipro_fast.data.metrics import evaluate
from adavipro_fast.data.sets import DataConfig, load_test
from adavipro_fast.data.split import Split
from adavipro_fast.files.whole import write_whole
from adavipro_fast.method.functional import apply_prompt
from adavipro_fast.training.config import recipe
from adavipro_fast.training.trainer import EVAL_BATCH
from lib.process import result_of

NINE = (
    *("cifar100", "cifar10", "flowers102", "food101", "eurosat", "sun397", "ucf101", "pets", "dtd"),
)
Flags = tuple[tuple[str, str], ...]
Lines = list[tuple[str, dict[str, object]]]

FROM_FLAGS = ("recipe", "batch_size", "prompt_size")

# Figures from the paper's text, percent; its tables are not available.
PUBLISHED = {
    ("cifar10", "adavipro"): 95.4,
    ("eurosat", "adavipro"): 96.8,
    ("dtd", "vp 112"): 38.4,
    ("ucf101", "vp 112"): 54.5,
    ("ucf101", "region 56"): 70.9,
}


@dataclass(frozen=True)
class Sweep:
    """Settings that all cells share."""

    model: str = "ViT-B-32-quickgelu"
    """open_clip name or local-dir:PATH"""
    pretrained: str = "openai"
    """open_clip tag of the weights; leave empty with local-dir"""
    data: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """data-set name or folder; repeatable (default: the paper's nine)"""
    data_root: Path = Path("data")
    """where named data sets lie"""
    epochs: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """passes over the training images, one for all or one a data set (default: 1000)"""
    batch_size: int | None = None
    """images per step (default: the recipe's)"""
    prompt_size: int = 30
    """of tables 1 and 3 to 7"""
    recipe: Literal["paper", "best"] = "paper"
    """defaults of training"""
    seeds: int = 1
    """runs of each cell"""
    limit_train: int | None = None
    """training images of each cell (default: all)"""
    jobs: int = 1
    """cells at once; with several GPUs each job takes its own"""
    cells: Path = Path("runs") / "paper"
    """folder of the cells"""


@dataclass(frozen=True)
class Cell:
    """One training run."""

    data: str
    line: str
    seed: int
    epochs: int
    flags: Flags = field(default=())

    @property
    def key(self) -> str:
        """Folder name, which depends only on the settings, so that tables share cells."""
        flags = dict(self.flags)
        defaults = recipe(flags["recipe"], int(flags["prompt-size"]))
        text = json.dumps([self.flags, asdict(defaults.prompt), asdict(defaults.optimiser)])
        return f"{Path(self.data).name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def cells_of(lines: Lines, sweep: Sweep) -> list[Cell]:
    """List the cells of a table with these lines."""
    data = sweep.data or NINE
    epochs = sweep.epochs or (1000,)
    if len(epochs) == 1:
        epochs *= len(data)
    if len(epochs) != len(data):
        raise ValueError(
            f"{len(epochs)} --epochs for {len(data)} --data; give one, or one for each"
        )
    return [
        Cell(name, line, seed, passes, flags_of(sweep, name, passes, seed, flags))
        for name, passes in zip(data, epochs, strict=True)
        for line, flags in lines
        for seed in range(sweep.seeds)
    ]


def flags_of(sweep: Sweep, data: str, epochs: int, seed: int, flags: dict[str, object]) -> Flags:
    """Return a cell's training flags, sorted; the flags of its line take precedence."""
    settings = recipe(str(flags.get("recipe", sweep.recipe)))
    values = {
        "model": sweep.model,
        "pretrained": sweep.pretrained,
        "data": data,
        "data-root": sweep.data_root,
        "recipe": sweep.recipe,
        "epochs": epochs,
        "batch-size": sweep.batch_size or settings.optimiser.batch_size,
        "prompt-size": sweep.prompt_size,
        "method": "adavipro",
        "seed": seed,
        "limit-train": "" if sweep.limit_train is None else sweep.limit_train,
    } | flags
    return tuple(sorted((k, str(v)) for k, v in values.items() if v != ""))


def run_cell(cell: Cell, sweep: Sweep, devices: "SimpleQueue[str]") -> dict[str, Any]:
    """Return a cell's figures; train if there are none yet.

    Raises:
        VerificationError: training failed.
    """
    folder = sweep.cells / cell.key
    kept = folder / "result.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    device = devices.get()
    try:
        flags = [part for name, value in cell.flags for part in (f"--{name}", value)]
        start: list[object] = [*flags, "--output", folder]
        if (folder / "last.safetensors").exists():
            start = ["--resume", folder, "--accept-change", "device"]
        else:
            # Files of a run that cannot be resumed.
            shutil.rmtree(folder, ignore_errors=True)
        result = result_of("-m", "adavipro_fast.train", *start, "--device", device)
    finally:
        devices.put(device)
    write_whole(kept, json.dumps(result, indent=1).encode())
    return result


def run_cells(cells: Sequence[Cell], sweep: Sweep) -> list[dict[str, Any]]:
    """Run cells in parallel; return one row per cell."""
    devices: SimpleQueue[str] = SimpleQueue()
    for job in range(sweep.jobs):
        gpus = torch.cuda.device_count()
        devices.put(f"cuda:{job % gpus}" if gpus else "cpu")
    with ThreadPoolExecutor(sweep.jobs) as pool:
        results = list(pool.map(lambda cell: run_cell(cell, sweep, devices), cells))
    figures = ("zero_shot_top1", "val_top1", "test_top1", "last_test_top1", "trainable_params")
    masks = ("mask_density", "mask_adaptivity", "mask_placement")
    return [
        {
            "data": Path(cell.data).name,
            "line": cell.line,
            "seed": cell.seed,
            "epochs": cell.epochs,
            **{n: dict(cell.flags)[n.replace("_", "-")] for n in FROM_FLAGS},
            "published": PUBLISHED.get((cell.data, cell.line), ""),
            **{name: result[name] for name in (*figures, *masks)},
        }
        for cell, result in zip(cells, results, strict=True)
    ]


def opened(cell: Cell, sweep: Sweep) -> tuple[AdaViPro, Split]:
    """Open a finished cell's best prompt and its test images."""
    checkpoint = sweep.cells / cell.key / "checkpoint.safetensors"
    artifact = TorchArtifact.open(
        checkpoint, model=sweep.model, pretrained=sweep.pretrained, device="cpu"
    )
    source = DataConfig(cell.data, sweep.data_root)
    return artifact.model, load_test(source, artifact.about.preprocess)[1]


def shuffle_masks(cell: Cell, sweep: Sweep) -> float:
    """Return a cell's test top-1, percent, with each image given the mask of another one."""
    return shuffled_top1(*opened(cell, sweep), cell.seed)


@torch.no_grad()
def shuffled_top1(model: AdaViPro, test: Split, seed: int) -> float:
    """Return a prompt's test top-1, percent, with each image given the mask of another one."""
    model.prompt.eval()
    device = model.prompt.mean.device
    masks = torch.cat([model.prompt(pixels).mask for pixels, _ in test.batches(EVAL_BATCH, device)])
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(masks), generator=generator).to(device)
    others = iter(masks[order].split(EVAL_BATCH))

    def predict(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask, images = next(others), model.prompt.normalised(pixels)
        assert model.prompt.template is not None
        return model.classify(apply_prompt(images, model.prompt.template(), mask), mask)[:2]

    return evaluate(predict, test.batches(EVAL_BATCH, device)).top1
