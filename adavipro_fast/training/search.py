"""Choose a method for a data set: train candidates within a time budget, stop the worse early.

Successive halving (Jamieson and Talwalkar, 2016) on validation accuracy: all candidates train for
25 % of their epochs, the better half continues to 50 %, and the better half of those to the end.
Zero-shot and the linear probe need no training and are always included. The test split is read
once, at the end, and does not influence the choice.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from adavipro_fast.data.metrics import Evaluation, standard_error
from adavipro_fast.data.sets import Dataset
from adavipro_fast.data.split import Split
from adavipro_fast.files.checkpoint import file_of, load_checkpoint
from adavipro_fast.files.whole import write_whole
from adavipro_fast.method.config import PROMPTED
from adavipro_fast.method.model import AdaViPro
from adavipro_fast.training.assemble import Loaded, Run, build, load
from adavipro_fast.training.config import TrainConfig
from adavipro_fast.training.log import say
from adavipro_fast.training.parts import FITTED
from adavipro_fast.training.results import keep_calibration
from adavipro_fast.training.run import stop_on_signal
from adavipro_fast.training.state import Progress, read_state

# Shares of the epochs after which only the better half continues.
RUNGS = (0.25, 0.5, 1.0)
LEAST_EPOCHS, MOST_EPOCHS = 4, 48
TIMED, TIMED_IMAGES = 3, 32
OVERHEAD_S = 5.0


@dataclass(frozen=True)
class Candidate:
    """A named configuration."""

    name: str
    config: TrainConfig
    eligible: bool = True
    """whether it may win; otherwise it is included only for comparison"""

    @property
    def folder(self) -> Path:
        """The folder of its run."""
        assert self.config.output is not None
        return self.config.output


@dataclass(frozen=True)
class Finalist:
    """The winner, with its answers to the test images, or without these, the validation images."""

    data: str
    dataset: Dataset
    split: Split
    evaluation: Evaluation
    rows: list[dict[str, float]]
    """metrics of its epochs"""


@dataclass
class Clock:
    """The time spent on a search over all its starts."""

    seconds: float
    """the budget"""
    before: float = 0.0
    """spent in earlier starts"""
    began: float = 0.0

    @property
    def spent(self) -> float:
        """Seconds spent so far."""
        return self.before + time.monotonic() - self.began

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.seconds - self.spent

    def say(self, line: str) -> None:
        """Print a line with the time left."""
        say(f"[{max(self.left, 0) / 60:.1f} min left] {line}")


def schedule(count: int, epoch_s: float, seconds: float, epochs: int | None) -> tuple[int, int]:
    """Choose how many candidates train, and for how many epochs.

    Args:
        count: number of candidates.
        epoch_s: seconds per epoch.
        seconds: time budget.
        epochs: number of epochs, if given.

    Returns:
        (candidates, epochs): as many candidates as can train for `LEAST_EPOCHS`, then as many
        epochs as fit; (0, 0) if not even one epoch of one candidate fits.
    """
    for trained in range(count, 0, -1):
        alive, share, start = trained, 0.0, 0.0
        for end in RUNGS:
            share, start, alive = share + alive * (end - start), end, half(alive)
        fit = int(seconds / epoch_s / share)
        if epochs is not None and (fit >= epochs or trained == 1):
            return trained, epochs
        if epochs is None and (fit >= LEAST_EPOCHS or (trained == 1 and fit >= 1)):
            return trained, min(MOST_EPOCHS, fit)
    return 0, 0


def half(count: int) -> int:
    """Return how many of `count` candidates continue."""
    return max(1, -(-count // 2))


class Search:
    """A search in a folder; when started again, it continues where it stopped.

    Args:
        candidates: those that are fitted without training come first.
        seconds: the time budget.
        folder: parent folder of the runs and the plan.
        epochs: epochs of every run (default: as many as fit).
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        seconds: float,
        folder: Path,
        epochs: int | None = None,
    ) -> None:
        self.candidates, self.folder, self.given = candidates, folder, epochs
        self.judge = candidates[0].config.optimiser.judge
        self.plan_path = folder / "plan.json"
        self.plan: dict[str, Any] = {
            "candidates": None,
            "epochs": 0,
            "other_s": 0.0,
            "trainable": {},
            "failed": {},
        }
        if self.plan_path.exists():
            self.plan |= json.loads(self.plan_path.read_text())
        # Read only once, since a state contains all tensors of its run.
        self.progress = {c.name: begun for c in candidates if (begun := progress_of(c))}
        self.clock = Clock(seconds, self.trained_s() + self.plan["other_s"], time.monotonic())
        self.loaded: dict[int, Loaded] = {}
        self.finalist: Finalist | None = None
        """the winner, once the search has ended"""

    def run(self) -> dict[str, Any]:
        """Search, and return the result.

        Raises:
            KeyboardInterrupt: a signal stopped the search.
        """
        fitted = [c for c in self.candidates if c.config.prompt.method in FITTED]
        trained = [c for c in self.candidates if c not in fitted]
        for candidate in fitted:
            self.advance(candidate, 0, math.inf)
        speed = self.seconds_per_image(trained[0] if trained else fitted[0])
        reserve = self.reserve(speed[1])
        if self.plan["candidates"] is None:
            self.make_plan(trained, speed, reserve)
        alive = trained[: self.plan["candidates"]]
        if not alive:
            self.clock.say("there is no time to train a candidate; start again with more --minutes")
        for share in RUNGS:
            until = math.ceil(share * self.plan["epochs"])
            for candidate in alive:
                self.attempt(candidate, until, self.clock.left - reserve)
            alive = [c for c in alive if c.name not in self.plan["failed"]]
            ranked = sorted(alive, key=lambda c: self.best_within(c, until), reverse=True)
            alive = ranked[: half(len(ranked))]
        return self.conclude(fitted)

    def make_plan(
        self, trained: Sequence[Candidate], speed: tuple[float, float], reserve: float
    ) -> None:
        """Decide how many candidates train and for how many epochs, and save the plan."""
        dataset = self.load(self.candidates[0]).dataset
        # Linear heads are fitted to all training images again.
        passed = len(dataset.val) + len(dataset.train)
        epoch_s = speed[0] * len(dataset.train) + speed[1] * passed
        count, epochs = schedule(len(trained), epoch_s, self.clock.left - reserve, self.given)
        self.plan |= {"candidates": count, "epochs": epochs}
        self.keep_plan()
        self.clock.say(
            f"{count} of {len(trained)} candidates will be trained, the best for {epochs} epochs"
        )

    def trained_s(self) -> float:
        """Return the seconds of training of all runs."""
        return sum(progress.seconds for progress in self.progress.values())

    def keep_plan(self) -> None:
        """Save the plan, with the time spent on anything but training."""
        self.plan["other_s"] = max(0.0, self.clock.spent - self.trained_s())
        write_whole(self.plan_path, json.dumps(self.plan).encode())

    def load(self, candidate: Candidate) -> Loaded:
        """Load encoder and data, once per margin."""
        margin = candidate.config.prompt.margin
        if margin not in self.loaded:
            self.loaded[margin] = load(candidate.config)
        return self.loaded[margin]

    def build(self, candidate: Candidate) -> Run:
        """Build a candidate's run; linear heads start from the search's linear probe."""
        config, probe = candidate.config, self.folder / "linear_probe" / file_of("linear_probe")
        prompt = config.prompt
        linear = prompt.head == "linear" and not prompt.margin and prompt.method not in FITTED
        linear = linear and prompt.head_input in (None, "features")
        if linear and config.head_from is None and probe.exists():
            config = replace(config, head_from=probe)
        optimiser = replace(config.optimiser, epochs=self.plan["epochs"] or 1)
        return build(replace(config, optimiser=optimiser), self.load(candidate))

    def attempt(self, candidate: Candidate, until: int, seconds: float) -> None:
        """Train a candidate; if that fails, leave it out and record the reason."""
        if candidate.name in self.plan["failed"]:
            return
        try:
            self.advance(candidate, until, seconds)
        except (ArithmeticError, ValueError, RuntimeError, MemoryError) as error:
            self.plan["failed"][candidate.name] = str(error)
            self.keep_plan()
            self.clock.say(f"warning: {candidate.name} is skipped: {error}")

    def advance(self, candidate: Candidate, until: int, seconds: float) -> None:
        """Train a candidate up to an epoch or until the time is used up."""
        progress = self.progress.get(candidate.name)
        if seconds <= 0 or (progress is not None and progress.epoch >= until):
            return
        began = time.monotonic()
        run = self.build(candidate)
        self.plan["trainable"][candidate.name] = run.trainer.model.trainable_params
        self.keep_plan()
        if progress is not None:
            run.trainer.restore()
        self.progress[candidate.name] = run.trainer.progress
        run.trainer.deadline = time.monotonic() + seconds
        try:
            with stop_on_signal(run.trainer):
                run.trainer.run(until)
        except KeyboardInterrupt:
            if run.trainer.asked_to_stop:
                self.keep_plan()
                raise KeyboardInterrupt(f"stopped; continue with --resume {self.folder}") from None
        if not run.trainer.parts:
            run.trainer.progress.seconds = time.monotonic() - began
            run.trainer.save()
        self.keep_plan()
        top1 = run.trainer.progress.best_val
        self.clock.say(f"{candidate.name}: val top-1 {top1:.1f} % after {until} epochs")

    def seconds_per_image(self, candidate: Candidate) -> tuple[float, float]:
        """Measure a training step and a prediction, in seconds per image."""
        run = self.build(candidate)
        trainer, model = run.trainer, run.trainer.model
        dataset, device = trainer.dataset, trainer.device
        count = min(TIMED_IMAGES, len(dataset.train), len(dataset.val))
        images, labels = dataset.train.batch(torch.arange(count), device)

        def train() -> None:
            loss = torch.nn.functional.cross_entropy(model.train()(images).logits, labels)
            if loss.requires_grad:
                loss.backward()

        with torch.no_grad():
            predicting = measured(lambda: model.eval()(images), device)
        return measured(train, device) / count, predicting / count

    def reserve(self, image_s: float) -> float:
        """Estimate the seconds for testing the finalists."""
        dataset = self.load(self.candidates[0]).dataset
        return OVERHEAD_S + image_s * (4 * len(dataset.test or ()) + len(dataset.val))

    def best_within(self, candidate: Candidate, epochs: int) -> float:
        """Return a candidate's best validation score within its first epochs, percent."""
        progress, key = self.progress.get(candidate.name), f"val_{self.judge}"
        rows = [] if progress is None else progress.rows[:epochs]
        return max((row[key] for row in rows), default=0.0)

    def conclude(self, fitted: Sequence[Candidate]) -> dict[str, Any]:
        """Choose the winner by validation, test the finalists, and return the result."""
        images = len(self.load(self.candidates[0]).dataset.val)
        begun = self.progress.keys() - self.plan["failed"]
        # Fine-tuning that was stopped in its first epoch has no checkpoint.
        tried = [c for c in self.candidates if c.name in begun and path_of(c).exists()]
        rows = {
            c.name: row_of(c, self.progress[c.name], images, self.plan["trainable"][c.name])
            for c in tried
        }
        eligible = [c for c in tried if c.eligible] or tried
        best = max(eligible, key=lambda c: float(rows[c.name]["val_score"]))
        least = rows[best.name]["val_score"] - rows[best.name]["val_se"]
        near = [c for c in eligible if rows[c.name]["val_score"] >= least]
        # min() returns the first of equals, which is the more promising proposal.
        winner = min(near, key=lambda c: rows[c.name]["bytes"])
        trainer = self.build(fitted[0]).trainer
        for candidate in {c.name: c for c in (*fitted, best, winner)}.values():
            loaded = self.load(candidate)
            kept = load_checkpoint(path_of(candidate))
            model = kept.model(loaded.frozen, candidate.config.kernel).to(loaded.device)
            if candidate is winner:
                keep_calibration(trainer, model, loaded.dataset.val, path_of(candidate))
            row, test = rows[candidate.name], loaded.dataset.test
            row["inference_ratio"] = inference_ratio(model, loaded)
            split = loaded.dataset.val if test is None else test
            if test is not None or candidate is winner:
                evaluation = trainer.evaluate(model, split)
            if test is not None:
                top1 = evaluation.top1
                row |= {"test_top1": top1, "test_se": standard_error(top1, len(test))}
                self.clock.say(f"{candidate.name}: test top-1 {top1:.1f} %")
            if candidate is winner:
                rows_of_epochs = self.progress[candidate.name].rows
                data = candidate.config.data.data
                self.finalist = Finalist(data, loaded.dataset, split, evaluation, rows_of_epochs)
        return {
            "winner": winner.name,
            "rule": "the smallest file within one standard error of the best on validation"
            + (", by the mean of the classes" if self.judge == "macro" else ""),
            "checkpoint": str(path_of(winner)),
            "rows": list(rows.values()),
            "left_out": self.plan["failed"],
            "epochs": self.plan["epochs"],
            "minutes": self.clock.seconds / 60,
            "seconds": self.clock.spent,
        }


def progress_of(candidate: Candidate) -> Progress | None:
    """Return the progress of a candidate's run, if it has begun."""
    path = candidate.folder / "last.safetensors"
    return read_state(path)[1].progress if path.exists() else None


def path_of(candidate: Candidate) -> Path:
    """Return the path of a candidate's best checkpoint."""
    return candidate.folder / file_of(candidate.config.prompt.method)


def row_of(candidate: Candidate, progress: Progress, images: int, trainable: int) -> dict[str, Any]:
    """Return a candidate's row of results; `images` is the number of validation images."""
    prompt = candidate.config.prompt
    return {
        "name": candidate.name,
        "method": prompt.method,
        "head": "linear" if prompt.method == "linear_probe" else prompt.head,
        "prompt_size": prompt.prompt_size if prompt.method in PROMPTED else None,
        "margin": prompt.margin,
        "epochs": progress.epoch,
        "val_top1": progress.best_val,
        "val_score": progress.score,
        "val_se": standard_error(progress.score, images),
        "test_top1": None,
        "test_se": None,
        "trainable_params": trainable,
        "bytes": path_of(candidate).stat().st_size,
        "seconds": progress.seconds,
        "inference_ratio": None,
        "eligible": candidate.eligible,
    }


def measured(work: Any, device: torch.device) -> float:
    """Return the median seconds of a call, after one warm-up call."""
    times = []
    for _ in range(TIMED + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return median(times[1:])


@torch.no_grad()
def inference_ratio(model: AdaViPro, loaded: Loaded) -> float:
    """Return the time of a prediction relative to the encoder alone, in PyTorch, interleaved."""
    count = min(TIMED_IMAGES // 4, len(loaded.dataset.val))
    images, _ = loaded.dataset.val.batch(torch.arange(count), loaded.device)
    normalised, ratios = model.prompt.normalised(images), []
    for _ in range(TIMED):
        alone = measured(lambda: loaded.frozen(normalised), loaded.device)
        ratios.append(measured(lambda: model(images), loaded.device) / alone)
    return median(ratios)
