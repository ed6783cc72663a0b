"""Compare prompts with a learned head to the linear probe that they start from.

    python bench/heads.py --data my_images --model local-dir:my_clip --pretrained "" --seeds 3 \
        --json cells.json

Every cell's row is saved as soon as it is finished; cells that already have a row are skipped.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from adavipro_fast import cli
from adavipro_fast.cores import use_threads
from adavipro_fast.data.metrics import Evaluation
from adavipro_fast.data.split import Split
from adavipro_fast.device import torch_device
from adavipro_fast.files.checkpoint import load_checkpoint
from adavipro_fast.training.assemble import START, Loaded, Run, build, load
from adavipro_fast.training.config import TrainConfig, recipe
from adavipro_fast.training.state import UNTRAINED
from lib.cells import Lines, shuffled_top1
from lib.points import over_probe
from lib.table import Json, Rows

LINES: Lines = [
    ("adavipro", {}),
    ("vp", {"method": "vp"}),
    ("head alone", {"lr-prompt": 0, "lr-generator": 0}),
    ("full_finetune", {"method": "full_finetune"}),
    ("size 8", {"prompt-size": 8}),
    ("size 15", {"prompt-size": 15}),
    ("size 60", {"prompt-size": 60}),
]


@dataclass(frozen=True)
class HeadsConfig:
    """Train prompts with learned heads beside the probe that they start from."""

    data: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """data-set name or folder with train/, val/ and test/; repeatable"""
    model: str
    """open_clip name or local-dir:PATH"""
    pretrained: str = ""
    """open_clip tag of the weights"""
    line: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """which runs, by their names in LINES; repeatable (default: all)"""
    seeds: int = 1
    """runs of each cell; a seed chooses the training images, their order and the noise"""
    epochs: int = 4
    """passes over the training images"""
    limit_train: int | None = None
    """training images of each cell (default: all)"""
    shuffle: bool = False
    """test adaptive prompts once more with masks of other images"""
    threads: cli.Threads = None
    json: Json = None


def command(config: HeadsConfig) -> dict[str, Any]:
    """Run the cells that have no row yet, and compare each line with the probe.

    Raises:
        ValueError: a line is unknown.
    """
    known = dict(LINES)
    unknown = [name for name in config.line if name not in known]
    if unknown:
        raise ValueError(f"no line {unknown[0]!r}; there are {', '.join(known)}")
    use_threads(config.threads)
    rows = Rows(torch_device("auto"), config.json, append=True)
    for data in config.data:
        for seed in range(config.seeds):
            run_seed(config, data, seed, rows)
    result = rows.published("learned heads", hidden=("machine",))
    return result | {"over_probe": over_probe(rows)}


def run_seed(config: HeadsConfig, data: str, seed: int, rows: Rows) -> None:
    """Run the lines of a data set and a seed; all start from the same probe."""
    cells = [
        {
            "name": f"{Path(data).name}/{line}/{seed}",
            "data": Path(data).name,
            "line": line,
            "seed": seed,
            "epochs": config.epochs,
            "limit_train": config.limit_train,
        }
        for line in config.line or dict(LINES)
    ]
    # A file may contain the same line with several limits and numbers of epochs.
    cells = [cell for cell in cells if not any(cell.items() <= row.items() for row in rows)]
    if not cells:
        return
    with tempfile.TemporaryDirectory() as folder:
        loaded, probe, start = None, None, Path(folder) / START
        for number, cell in enumerate(cells):
            settings = parsed(config, data, cell, Path(folder) / str(number))
            loaded = loaded or load(settings)
            if start.exists():
                settings = replace(settings, head_from=start)
            run = build(settings, loaded)
            if not start.exists():
                (Path(folder) / str(number) / START).rename(start)
            probe = probe or tested_probe(run, loaded)
            rows.append(cell | figures(run, probe, shuffle=config.shuffle))


def parsed(config: HeadsConfig, data: str, cell: dict[str, Any], output: Path) -> TrainConfig:
    """Return a cell's settings, as if from the flags of `train --head linear`."""
    flags = {
        "model": config.model,
        "data": data,
        "head": "linear",
        "epochs": config.epochs,
        "seed": cell["seed"],
        "output": output,
        **({} if config.limit_train is None else {"limit-train": config.limit_train}),
        **({"pretrained": config.pretrained} if config.pretrained else {}),
        **dict(LINES)[cell["line"]],
    }
    size = int(str(flags.get("prompt-size", TrainConfig().prompt.prompt_size)))
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return cli.parse(TrainConfig, recipe("best", size, "linear"), words)


@dataclass(frozen=True)
class Tested:
    """A model's predictions for both splits."""

    val: Evaluation
    test: Evaluation


def test_images(loaded: Loaded | Run) -> Split:
    """Return the test split.

    Raises:
        ValueError: there is no test split.
    """
    dataset = loaded.dataset if isinstance(loaded, Loaded) else loaded.trainer.dataset
    if dataset.test is None:
        raise ValueError("the data have no test split; add a folder test/")
    return dataset.test


def tested_probe(run: Run, loaded: Loaded) -> Tested:
    """Test the model before training, which is the probe since its template is 0."""
    trainer = run.trainer
    val, test = (trainer.evaluate(trainer.model, s) for s in (loaded.dataset.val, test_images(run)))
    return Tested(val, test)


def figures(run: Run, probe: Tested, *, shuffle: bool) -> dict[str, Any]:
    """Train; return the accuracy of the probe, the last epoch and the kept model."""
    trainer, optimiser = run.trainer, run.config.optimiser
    trainer.run()
    progress, test = trainer.progress, test_images(run)
    last = Tested(*(trainer.evaluate(trainer.model, s) for s in (trainer.dataset.val, test)))
    model, kept = trainer.model, last.test
    if progress.best_epoch == UNTRAINED:
        kept = probe.test
    elif not trainer.last_is_kept:
        model = load_checkpoint(trainer.kept_path).model(model.encoder, run.config.kernel)
        kept = trainer.evaluate(model, test)
    masked = run.config.prompt.method == "adavipro" and progress.best_epoch != UNTRAINED
    return {
        "batch_size": optimiser.batch_size,
        "lr_prompt": optimiser.lr_prompt,
        "prompt_size": run.config.prompt.prompt_size,
        "head_input": trainer.model.config.head_input,
        "images": trainer.dataset.counts,
        "probe_val": probe.val.top1,
        "probe_test": probe.test.top1,
        "last_val": last.val.top1,
        "last_test": last.test.top1,
        "val_top1": progress.best_val,
        "test_top1": kept.top1,
        "kept_epoch": progress.best_epoch + 1,
        "epoch_val": [row["val_top1"] for row in progress.rows],
        **changed("val", probe.val, last.val),
        **changed("test", probe.test, last.test),
        **({"shuffled_test": shuffled_top1(model, test, 0)} if shuffle and masked else {}),
        "seconds": sum(row["seconds"] for row in progress.rows),
    }


def changed(split: str, before: Evaluation, after: Evaluation) -> dict[str, int]:
    """Count images that only one of two models gets right."""
    gained, lost = after.right & ~before.right, before.right & ~after.right
    return {f"{split}_gained": int(gained.sum()), f"{split}_lost": int(lost.sum())}


def main() -> None:
    """Parse, run, print."""
    cli.main(HeadsConfig, command)


if __name__ == "__main__":
    main()
