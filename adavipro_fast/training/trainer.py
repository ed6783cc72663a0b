"""The training loop: best on validation kept, resumable at any step."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from adavipro_fast.data.metrics import Evaluation, balanced, evaluate, macro_of, mask_figures
from adavipro_fast.data.sets import Dataset
from adavipro_fast.data.split import Split
from adavipro_fast.device import full_fp32
from adavipro_fast.errors import NonFiniteLossError
from adavipro_fast.files.checkpoint import checkpoint_of, file_of
from adavipro_fast.method.config import PROMPTED
from adavipro_fast.method.model import AdaViPro
from adavipro_fast.method.prompt import frame_regions
from adavipro_fast.training import state
from adavipro_fast.training.batches import Batch, gathered, shuffled
from adavipro_fast.training.config import OptimiserConfig, lr_factor
from adavipro_fast.training.folds import FoldHeads
from adavipro_fast.training.group import Group
from adavipro_fast.training.judge import Judge
from adavipro_fast.training.log import Log, logged, say
from adavipro_fast.training.parts import parts_of
from adavipro_fast.training.probe import Features, prompted_features, refitted_head, unscaled
from adavipro_fast.training.state import UNTRAINED, Progress, State

SAVE_EVERY_S = 300.0
EVAL_BATCH = 64


class Trainer:
    """Trains what learns of a model and keeps its state in a folder.

    Args:
        model: prompt, encoder and head, on their device.
        dataset: decoded images.
        config: how to optimise.
        output: folder of checkpoint, state and metrics.
        settings: resolved configuration of the whole run, kept beside the state.
        identity: hashes of what the run depends on; `restore` refuses a state with others.
        templates: texts that the class names were embedded in, kept in the checkpoint.
        group: the processes that train together.
        folds: heads that the prompt learns from instead of the model's own.
    """

    def __init__(
        self,
        model: AdaViPro,
        dataset: Dataset,
        config: OptimiserConfig,
        *,
        output: Path,
        settings: dict[str, Any],
        identity: dict[str, str] | None = None,
        templates: tuple[str, ...] = (),
        group: Group | None = None,
        folds: FoldHeads | None = None,
    ) -> None:
        self.model, self.dataset, self.config, self.folds = model, dataset, config, folds
        self.output, self.settings, self.templates = output, settings, templates
        self.identity, self.group = identity or {}, group or Group()
        self.device = model.prompt.mean.device
        self.parts = parts_of(model, config, head_steps=folds is None)
        self.epochs = config.epochs if self.parts else 0
        self.steps = math.ceil(len(dataset.train) / config.batch_size)
        self.progress = Progress()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.inside = frame_regions(model.preprocess.size, model.config)
        # Not as an index on the device: that would wait for it, to know how many it marks.
        self.weights = (self.inside / self.inside.sum()).to(self.device)
        self.class_weights = None
        if config.balanced:
            labels = dataset.train.labels[dataset.train.rows]
            self.class_weights = balanced(labels, len(dataset.class_names)).to(self.device)
        judged, classes = dataset.val.labels[dataset.val.rows], len(dataset.class_names)
        self.judge = Judge(judged, classes, config.judge, model.head.link)
        self.refits = model.config.head == "linear" and model.config.method in PROMPTED
        """whether the head is fitted again after the last epoch, and only that model may be kept"""
        self._kept_features: tuple[tuple[int, int], Features] | None = None
        self.asked_to_stop = self.stopping = False
        self.deadline = math.inf
        """of `time.monotonic`; the run stops after the step that passes it"""

    def stop(self) -> None:
        """Ask the run, all its processes, to save and end after the step under way."""
        self.asked_to_stop = True

    def run(self, until: int | None = None) -> None:
        """Train to the last epoch.

        Args:
            until: end earlier, after this many epochs of the whole run's schedule.

        Raises:
            KeyboardInterrupt: `stop` was called or the deadline has passed; the step reached is
                saved.
            NonFiniteLossError: the last saved state is good, and nothing was saved since.
        """
        self.model.prompt.train()
        if self.progress.best_val < 0:
            began = time.perf_counter()
            self._keep_untrained()
            self._count_seconds(began)
            # From here on there is something to go on from.
            self.save()
        # Backward passes too.
        with (
            logged(self.output, self.epochs, self.progress, leads=self.group.leads) as log,
            full_fp32(),
        ):
            while self.progress.epoch < min(self.epochs, until or self.epochs):
                self._epoch(log)
        if self.refits and self.progress.epoch:
            self._refit()
            self.save()

    def _epoch(self, log: Log) -> None:
        progress, size = self.progress, self.config.batch_size
        tau = self.config.temperature(progress.epoch)
        train = self.dataset.train
        counted = time.perf_counter()
        if self.folds is not None and self.folds.due(progress.epoch, progress.step):
            self._fit_folds(self.folds)
            counted = self._count_seconds(counted)
        order = shuffled(len(train), seed=self.config.seed, epoch=progress.epoch)
        left = order[progress.step * size :]
        batches = gathered(train, left, size, device=self.device, group=self.group)
        done, waited = 0, 0.0
        began = started = time.perf_counter()
        with log.bar(progress, self.steps) as bar:
            for batch in batches:
                waited += time.perf_counter() - started
                loss, correct, density = self._step(batch, tau)
                done += batch.total
                progress.loss_sum += loss * batch.total
                progress.correct += correct
                progress.step += 1
                rate = done / (time.perf_counter() - began)
                bar.update()
                bar.set_postfix_str(
                    f"loss {loss:.3f} top-1 {100 * correct / batch.total:.1f} τ {tau:.2f} "
                    f"open {density:.2f} {rate:.0f} images/s"
                )
                if self.stopping or time.perf_counter() - counted > SAVE_EVERY_S:
                    counted = self._count_seconds(counted)
                    self.save()
                if self.stopping:
                    raise KeyboardInterrupt(f"stopped; continue with --resume {self.output}")
                started = time.perf_counter()
        seconds = max(time.perf_counter() - began, 1e-9)
        speed = {"seconds": seconds, "images_per_s": done / seconds}
        self._finish_epoch({"tau": tau}, speed | {"data_wait_share": waited / seconds})
        self._count_seconds(counted)
        log.epoch(progress)
        self.save()

    def _count_seconds(self, since: float) -> float:
        """Add the time since then to the run's; return now."""
        now = time.perf_counter()
        self.progress.seconds += now - since
        return now

    def _fit_folds(self, folds: FoldHeads) -> None:
        """Fit the fold heads to the features of the training images with the current prompt."""
        if self.group.leads:
            folds.fit(self._train_features())
        folds.share(self.group, self.model.head.rows.shape[1])
        self.model.head.load(unscaled(folds.mean, self.model.encoder).tensors)

    def _train_features(self) -> Features:
        """Return the features of the training images; with folds, keep them for the next fit."""
        if self.folds is None or not self.group.leads:
            return self._features(self.dataset.train)
        at = self.progress.epoch, self.progress.step
        if self._kept_features is None or self._kept_features[0] != at:
            self._kept_features = at, self._features(self.dataset.train)
        return self._kept_features[1]

    def _features(self, split: Split) -> Features:
        """Return the features of a split with the current prompt.

        Raises:
            NonFiniteLossError: some of them are infinite or NaN.
        """
        features = prompted_features(self.model, split, self.device)
        if not np.isfinite(features.features).all():
            raise self._diverged(f"the features are not finite in epoch {self.progress.epoch + 1}")
        return features

    def _diverged(self, reason: str) -> NonFiniteLossError:
        """Return the error that ends a diverged run."""
        return NonFiniteLossError(
            f"{reason}; the last good state is in {self.output}; use a lower {self.parts[0].flag} "
            f"than {self.parts[0].rate:g}"
        )

    def _step(self, batch: Batch, tau: float) -> tuple[float, int, float]:
        """Train on a batch; return its loss, how many were right, and the share of open regions."""
        images, labels, positions, count = batch
        step = self.progress.epoch * self.steps + self.progress.step
        self._set_rates(step)
        parameters = list(chain.from_iterable(part.parameters.values() for part in self.parts))
        for part in self.parts:
            part.optimiser.zero_grad()
        figures = torch.zeros(4, device=self.device)
        figures[3] = self.asked_to_stop or time.monotonic() > self.deadline
        if len(labels):
            first, noise_key = self.group.share(count).start, self.config.seed << 32 | step
            prompted = self.model.prompted(images, tau=tau, seed=noise_key, first=first)
            logits = self._logits(prompted.images, positions)
            losses = F.cross_entropy(logits, labels, weight=self.class_weights, reduction="sum")
            loss = losses / count
            figures[0] = loss.detach()
            figures[1] = (logits.argmax(1) == labels).sum()
            figures[2] = (prompted.mask.detach() * self.weights).sum() / count
            self.scaler.scale(loss).backward()
        else:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        # One message and one transfer, so that a GPU waits once.
        figures = self.group.sum_gradients(parameters, figures)
        value, correct, density, stop = figures.tolist()
        self.stopping = stop > 0
        if not math.isfinite(value):
            epoch, number = self.progress.epoch + 1, self.progress.step + 1
            raise self._diverged(f"the loss is {value} in epoch {epoch}, step {number}")
        for part in self.parts:
            if part.clip:
                self.scaler.unscale_(part.optimiser)
                clip_grad_norm_(part.parameters.values(), part.clip)
            self.scaler.step(part.optimiser)
        self.scaler.update()
        return value, int(correct), density

    def _logits(self, prompted: Tensor, positions: Tensor) -> Tensor:
        """Score prompted training images (B, 3, S, S) at their positions (B,) in the split."""
        embedding, features = self.model.encoder.embed(prompted)
        if self.folds is not None:
            return self.folds.logits(embedding, features, positions)
        logits: Tensor = self.model.head(embedding, features)
        return logits

    def _set_rates(self, step: int) -> None:
        total = self.epochs * self.steps
        for part in self.parts:
            rate = 0.0 if step < part.start * total else part.rate
            part.optimiser.param_groups[0]["lr"] = rate * lr_factor(step, total)

    def _finish_epoch(self, schedule: dict[str, float], speed: dict[str, float]) -> None:
        """Validate, keep the model where it is the best so far, and begin the next epoch."""
        progress, trained = self.progress, len(self.dataset.train)
        val = self.evaluate(self.model, self.dataset.val)
        figures = mask_figures(val.masks, self.inside)
        progress.rows.append(
            {
                "epoch": progress.epoch + 1,
                "loss": progress.loss_sum / trained,
                "train_top1": 100 * progress.correct / trained,
                "val_top1": val.top1,
                "val_macro": macro_of(val.per_class(self.dataset.class_names)),
                **schedule,
                "mask_density": figures.density,
                "mask_adaptivity": figures.adaptivity,
                "mask_placement": figures.placement,
                **speed,
            }
        )
        if not self.refits:
            self._consider(val, progress.epoch)
        progress.epoch, progress.step = progress.epoch + 1, 0
        progress.loss_sum, progress.correct = 0.0, 0

    def _consider(self, val: Evaluation, epoch: int) -> None:
        """Keep the model where it is the best so far; of equals, the one trained for longer."""
        better = self.judge.score(val) >= self.progress.score
        if better and self.judge.beats_untrained(val, self.progress):
            self._keep(val, epoch)

    def _refit(self) -> None:
        """Fit the head on prompted images, and take that model as a candidate.

        The trained head comes back afterwards: it is what further epochs train.
        """
        began = time.perf_counter()
        with self._refitted():
            val = self.evaluate(self.model, self.dataset.val)
            say(f"head fitted again, on prompted images: val top-1 {val.top1:.1f} %")
            self._consider(val, self.progress.epoch - 1)
        self._count_seconds(began)

    @contextmanager
    def _refitted(self) -> Iterator[None]:
        """Give the model a head fitted to the training images with the current prompt."""
        head = self.model.head
        trained = {name: tensor.detach().clone() for name, tensor in head.trained().items()}
        train, val = self._train_features(), self._features(self.dataset.val)
        fitted = refitted_head(train, val, self.model, balanced=self.config.balanced)
        head.load(fitted.tensors)
        yield
        head.load(trained)

    def _keep_untrained(self) -> None:
        """Take the untrained model as a candidate: a prompt that starts from zero does no harm.

        Fine-tuning is a baseline: its best epoch is kept in any case.
        """
        if self.model.config.method == "full_finetune":
            self.progress.best_val = self.progress.best_score = 0.0
            self.progress.least_val = -1.0
            return
        val = self.evaluate(self.model, self.dataset.val)
        self.progress.untrained_right = "".join("01"[right] for right in val.right.tolist())
        if self.refits:
            with self._refitted():
                untrained = self.evaluate(self.model, self.dataset.val)
            self.progress.untrained_loss = self.judge.losses(untrained).tolist()
        self._keep(val, epoch=UNTRAINED)

    def _keep(self, val: Evaluation, epoch: int) -> None:
        """Write the best model so far."""
        self.progress.best_val, self.progress.best_score = val.top1, self.judge.score(val)
        self.progress.best_epoch = epoch
        if self.group.leads:
            kept = checkpoint_of(self.model, self.dataset.class_names, self.templates)
            kept.save(self.kept_path)

    @property
    def kept_path(self) -> Path:
        """The file of the best model so far."""
        return self.output / file_of(self.model.config.method)

    @property
    def last_is_kept(self) -> bool:
        """Whether the best model is the one in training."""
        return not self.refits and self.progress.best_epoch >= self.progress.epoch - 1

    def evaluate(self, model: AdaViPro, split: Split) -> Evaluation:
        """Evaluate with argmax masks; each process runs its share of one process's batches."""
        training = model.prompt.training
        model.prompt.eval()
        try:
            return self._evaluate(lambda x: model(x)[:2], split)
        finally:
            model.prompt.train(training)

    def _evaluate(
        self, predict: Callable[[Tensor], tuple[Tensor, Tensor]], split: Split
    ) -> Evaluation:
        group, grid = self.group, len(self.inside)
        batches = split.batches(EVAL_BATCH, self.device, part=group.rank, of=group.size)
        mine = torch.arange(len(split)).split(EVAL_BATCH)[group.rank :: group.size]
        logits = torch.zeros(len(split), len(self.dataset.class_names))
        masks = torch.zeros(len(split), grid, grid, dtype=torch.uint8)
        if mine:
            share = evaluate(predict, batches)
            logits[torch.cat(mine)], masks[torch.cat(mine)] = share.logits, share.masks
        # On the device, where the group's messages travel.
        logits, masks = (group.sum(t.to(self.device)).cpu() for t in (logits, masks))
        return Evaluation(logits, split.labels[split.rows], masks)

    def save(self) -> None:
        """Write `last.safetensors`: all that `restore` needs."""
        if not self.group.leads:
            return
        self.progress.scaler = self.scaler.state_dict()
        now = State(self.settings, self.identity, self.progress)
        more = None if self.folds is None else self.folds.stored()
        state.write_state(self.output / "last.safetensors", now, self.model, self.parts, more)

    def restore(self, accepted: Sequence[str] = ()) -> None:
        """Take up the state of `last.safetensors`.

        Args:
            accepted: parts of the identity that may differ.

        Raises:
            ValueError: data or encoder are not those that the run began with.
        """
        path = self.output / "last.safetensors"
        tensors, before = state.read_state(path)
        state.check_identity(before.identity, self.identity, accepted)
        state.restore(path, tensors, self.model, self.parts)
        if self.folds is not None:
            self.folds.load(tensors, self.model.head.rows.shape[1])
        self.progress, self._kept_features = before.progress, None
        self.progress.result = {}
        if self.progress.scaler:
            self.scaler.load_state_dict(self.progress.scaler)
