"""The training loop: best on validation kept, resumable at any step.

All randomness is a function of (seed, epoch, step), so the state that a resumed run needs is the
weights, the optimisers' tensors and a few counters.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from adavipro_fast.checkpoint import (
    checkpoint_of,
    load_prompt,
    prompt_tensors,
    read_safetensors,
    safetensors_bytes,
    write_whole,
)
from adavipro_fast.clip import Precision
from adavipro_fast.data import Dataset, Split
from adavipro_fast.device import full_fp32
from adavipro_fast.distributed import Group
from adavipro_fast.metrics import Evaluation, evaluate, mask_figures
from adavipro_fast.prompt import AdaViPro, frame_regions

# VP warms up for 1000 steps; shorter runs give it a tenth of their steps.
WARM_UP_STEPS, WARM_UP_SHARE = 1000, 0.1
MOMENTUM = 0.9
SAVE_EVERY_S = 300.0
EVAL_BATCH = 64
UNTRAINED = -1
# Of rates, temperatures and counts: more is a slip of the keyboard.
LARGEST = 1e9
# What torch's optimisers keep of a parameter; `step` is a number, the others are of its shape.
OPTIMISER_STATE: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.Adam: ("exp_avg", "exp_avg_sq", "step"),
}


@dataclass(frozen=True)
class OptimiserConfig:
    """How the prompt is optimised."""

    epochs: int = 50
    """passes over the training images"""
    batch_size: int = 64
    """images per step"""
    lr_prompt: float = 40.0
    """peak learning rate of the template"""
    lr_generator: float = 1.0
    """peak learning rate of the mask generator"""
    generator_optimiser: Literal["sgd", "adam"] = "sgd"
    """adam makes steps of one size whatever the scale of edges and template"""
    generator_start: float = 0.0
    """share of the steps for which the mask generator waits while the template learns"""
    lr_encoder: float = 1e-5
    """peak learning rate of full_finetune (AdamW)"""
    clip_prompt: float = 0.0
    """longest gradient of the template, as a Euclidean norm; 0 leaves gradients as they are"""
    tau: float = 5.0
    """first temperature of the mask sampling"""
    tau_decay: float = 0.98
    """factor on the temperature, per epoch"""
    tau_min: float = 0.5
    """floor of the temperature"""
    precision: Precision = "bf16"
    """of the encoder; prompt, masks and noise are fp32"""
    seed: int = 0
    """of everything random"""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "tau", "tau_decay", "tau_min"):
            if not 0 < getattr(self, name) < LARGEST:
                limits = f"a number above 0 is needed, below {LARGEST:g}"
                raise ValueError(f"{name} is {getattr(self, name)}; {limits}")
        for name in ("lr_prompt", "lr_generator", "lr_encoder", "clip_prompt"):
            if not 0 <= getattr(self, name) < LARGEST:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 to {LARGEST:g}")
        if self.tau_decay > 1:
            raise ValueError(f"tau_decay is {self.tau_decay}; use a number up to 1")
        if not 0 <= self.generator_start <= 1:
            raise ValueError(f"generator_start is {self.generator_start}; use 0 to 1")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}; use 0 to {2**31 - 1}")

    def temperature(self, epoch: int) -> float:
        """Return τ of an epoch, counted from 0: tau · tau_decay^epoch, at least tau_min."""
        return max(self.tau * self.tau_decay**epoch, self.tau_min)


def lr_factor(step: int, total: int) -> float:
    """Scale the learning rate: linear warm-up, then half a cosine down to 0."""
    warm_up = min(WARM_UP_STEPS, round(WARM_UP_SHARE * total))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


@dataclass
class Progress:
    """Where a run stands; all of it is saved in `last.safetensors`."""

    epoch: int = 0
    step: int = 0
    """steps done within the epoch"""
    loss_sum: float = 0.0
    correct: int = 0
    seconds: float = 0.0
    best_val: float = -1.0
    least_val: float = 0.0
    """what an epoch must exceed to take the untrained prompt's place"""
    best_epoch: int = UNTRAINED
    scaler: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """What `last.safetensors` says beside its tensors."""

    settings: dict[str, Any]
    identity: dict[str, str]
    progress: Progress


def read_state(path: Path) -> tuple[dict[str, Tensor], State]:
    """Read `last.safetensors`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a state of ours.
    """
    tensors, metadata = read_safetensors(path)
    try:
        progress = Progress(**metadata["progress"])
        for name, hint in get_type_hints(Progress).items():
            if not isinstance(getattr(progress, name), get_origin(hint) or hint):
                raise TypeError(f"{name} is {getattr(progress, name)!r}")
        return tensors, State(dict(metadata["settings"]), dict(metadata["identity"]), progress)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the state of a run: {error}; start anew") from error


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the last good state is on the disk."""


class Trainer:
    """Trains a prompt and keeps its state in a folder.

    Args:
        model: prompt in front of the encoder, on its device.
        dataset: decoded images.
        config: how to optimise.
        output: folder of checkpoint, state and metrics.
        settings: resolved configuration of the whole run, kept beside the state.
        identity: hashes of what the run depends on; `restore` refuses a state with others.
        group: the processes that train together.
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
        group: Group | None = None,
    ) -> None:
        self.model, self.dataset, self.config = model, dataset, config
        self.output, self.settings = output, settings
        self.identity, self.group = identity or {}, group or Group()
        self.device = next(model.prompt.parameters()).device
        self.steps = math.ceil(len(dataset.train) / config.batch_size)
        self.progress = Progress()
        self.template_optimiser = torch.optim.SGD(
            model.prompt.template.parameters(), lr=0.0, momentum=MOMENTUM
        )
        self.optimisers: list[torch.optim.Optimizer] = [self.template_optimiser]
        if model.prompt.generator is not None:
            parameters = model.prompt.generator.parameters()
            self.optimisers.append(
                torch.optim.Adam(parameters, lr=0.0)
                if config.generator_optimiser == "adam"
                else torch.optim.SGD(parameters, lr=0.0, momentum=MOMENTUM)
            )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        side = model.encoder.preprocess.size
        self.inside = frame_regions(side, model.prompt.config)
        # Not as an index on the device: that would wait for it, to know how many it marks.
        self.weights = (self.inside / self.inside.sum()).to(self.device)
        self.asked_to_stop = self.stopping = False

    def stop(self) -> None:
        """Ask the run, all its processes, to save and end after the step under way."""
        self.asked_to_stop = True

    def run(self) -> None:
        """Train to the last epoch.

        Raises:
            KeyboardInterrupt: `stop` was called; the step reached is saved.
            NonFiniteLossError: the last saved state is good, and nothing was saved since.
        """
        self.model.prompt.train()
        if self.progress.best_val < 0:
            self._keep_untrained()
            # From here on there is something to go on from.
            self.save()
        if not self.group.leads:
            self._epochs(None)
            return
        with SummaryWriter(str(self.output), purge_step=self.progress.epoch) as writer:
            self._epochs(writer)

    def _epochs(self, writer: SummaryWriter | None) -> None:
        # Backward passes too.
        with full_fp32():
            while self.progress.epoch < self.config.epochs:
                self._epoch(writer)

    def _epoch(self, writer: SummaryWriter | None) -> None:
        progress = self.progress
        tau = self.config.temperature(progress.epoch)
        bar = tqdm(
            self._batches(),
            f"epoch {progress.epoch + 1}/{self.config.epochs}",
            self.steps,
            initial=progress.step,
            unit="step",
            leave=False,
            disable=None if self.group.leads else True,
        )
        done, waited = 0, 0.0
        began = started = counted = time.perf_counter()
        for images, labels, count in bar:
            waited += time.perf_counter() - started
            loss, correct, density = self._step(images, labels, count, tau)
            done += count
            progress.loss_sum += loss * count
            progress.correct += correct
            progress.step += 1
            rate = done / (time.perf_counter() - began)
            top1 = 100 * correct / count
            bar.set_postfix_str(
                f"loss {loss:.3f} top-1 {top1:.1f} τ {tau:.2f} open {density:.2f} "
                f"{rate:.0f} images/s"
            )
            if self.stopping or time.perf_counter() - counted > SAVE_EVERY_S:
                counted = self._count_seconds(counted)
                self.save()
            if self.stopping:
                bar.close()
                raise KeyboardInterrupt(f"stopped; go on with --resume {self.output}")
            started = time.perf_counter()
        seconds = time.perf_counter() - began
        speed = {
            "seconds": seconds,
            "images_per_s": done / max(seconds, 1e-9),
            "data_wait_share": waited / max(seconds, 1e-9),
        }
        self._finish_epoch(writer, tau, speed, counted)

    def _count_seconds(self, since: float) -> float:
        """Add the time since then to the run's; return now."""
        now = time.perf_counter()
        self.progress.seconds += now - since
        return now

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield the epoch's batches from the current step on, gathered one step ahead.

        Images and labels are this process's share of the batch, the number is the whole batch's.
        """
        size, train = self.config.batch_size, self.dataset.train
        # Not torch's generator: it takes no more than 32 bits of a seed.
        generator = np.random.default_rng([self.config.seed, self.progress.epoch])
        order = torch.from_numpy(generator.permutation(len(train)))
        chunks = order.split(size)[self.progress.step :]
        if not chunks:
            return
        with ThreadPoolExecutor(1) as pool:

            def gather(chunk: Tensor) -> Future[tuple[Tensor, Tensor]]:
                return pool.submit(train.batch, chunk[self.group.share(len(chunk))], self.device)

            ahead = gather(chunks[0])
            for number, chunk in enumerate(chunks):
                images, labels = ahead.result()
                if number + 1 < len(chunks):
                    ahead = gather(chunks[number + 1])
                yield images, labels, len(chunk)

    def _step(
        self, images: Tensor, labels: Tensor, count: int, tau: float
    ) -> tuple[float, int, float]:
        step = self.progress.epoch * self.steps + self.progress.step
        self._set_rates(step)
        noise_key = self.config.seed << 32 | step
        self.model.prompt.zero_grad()
        figures = torch.zeros(4, device=self.device)
        figures[3] = self.asked_to_stop
        if len(labels):
            first = self.group.share(count).start
            prediction = self.model(images, tau=tau, seed=noise_key, first=first)
            loss = F.cross_entropy(prediction.logits, labels, reduction="sum") / count
            figures[0] = loss.detach()
            figures[1] = (prediction.logits.argmax(1) == labels).sum()
            figures[2] = (prediction.mask.detach() * self.weights).sum() / count
            self.scaler.scale(loss).backward()
        else:
            for parameter in self.model.prompt.parameters():
                parameter.grad = torch.zeros_like(parameter)
        # One message and one transfer, so that a GPU waits once.
        figures = self.group.sum_gradients(self.model.prompt.parameters(), figures)
        value, correct, density, stop = figures.tolist()
        self.stopping = stop > 0
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"the loss is {value} in epoch {self.progress.epoch + 1}, step "
                f"{self.progress.step + 1}; the last good state is in {self.output}; "
                f"try a lower --lr-prompt than {self.config.lr_prompt:g}"
            )
        if self.config.clip_prompt:
            self.scaler.unscale_(self.template_optimiser)
            clip_grad_norm_(self.model.prompt.template.parameters(), self.config.clip_prompt)
        for optimiser in self.optimisers:
            self.scaler.step(optimiser)
        self.scaler.update()
        return value, int(correct), density

    def _set_rates(self, step: int) -> None:
        total = self.config.epochs * self.steps
        waiting = step < self.config.generator_start * total
        peaks = (self.config.lr_prompt, 0.0 if waiting else self.config.lr_generator)
        for optimiser, peak in zip(self.optimisers, peaks, strict=False):
            optimiser.param_groups[0]["lr"] = peak * lr_factor(step, total)

    def _finish_epoch(
        self, writer: SummaryWriter | None, tau: float, speed: dict[str, float], counted: float
    ) -> None:
        progress, trained = self.progress, len(self.dataset.train)
        val = self.evaluate(self.dataset.val)
        figures = mask_figures(val.masks, self.inside)
        row = {
            "epoch": progress.epoch + 1,
            "loss": progress.loss_sum / trained,
            "train_top1": 100 * progress.correct / trained,
            "val_top1": val.top1,
            "tau": tau,
            "mask_density": figures.density,
            "mask_adaptivity": figures.adaptivity,
            "mask_placement": figures.placement,
            **speed,
        }
        progress.rows.append(row)
        if writer is not None:
            for name, value in row.items():
                writer.add_scalar(name, value, progress.epoch)
            lines = "".join(json.dumps(row) + "\n" for row in progress.rows)
            write_whole(self.output / "metrics.jsonl", lines.encode())
        # Among equals the later epoch has trained for longer.
        if val.top1 >= progress.best_val and val.top1 > progress.least_val:
            self._keep(val.top1, progress.epoch)
        progress.epoch, progress.step = progress.epoch + 1, 0
        progress.loss_sum, progress.correct = 0.0, 0
        self._count_seconds(counted)
        self.save()
        if writer is None:
            return
        left = progress.seconds / progress.epoch * (self.config.epochs - progress.epoch)
        print(
            f"epoch {progress.epoch}: loss {row['loss']:.3f}, val top-1 {val.top1:.1f} %, "
            f"open {figures.density:.2f}, adaptivity {figures.adaptivity:.2f}, "
            f"{speed['images_per_s']:.0f} images/s, {timedelta(seconds=round(left))} left",
            file=sys.stderr,
        )

    def _keep_untrained(self) -> None:
        """Take the untrained prompt as a candidate: one that starts from zero does no harm.

        A trained one takes its place only if it is better by a standard error of the validation
        accuracy, for less is luck (Breiman et al., 1984).
        """
        val = self.evaluate(self.dataset.val)
        share, count = val.top1 / 100, len(val.labels)
        self.progress.least_val = val.top1 + 100 * math.sqrt(share * (1 - share) / count)
        self._keep(val.top1, epoch=UNTRAINED)

    def _keep(self, val_top1: float, epoch: int) -> None:
        """Write the best prompt so far."""
        self.progress.best_val, self.progress.best_epoch = val_top1, epoch
        if not self.group.leads:
            return
        checkpoint = checkpoint_of(self.model, self.dataset.class_names)
        checkpoint.save(self.output / "checkpoint.safetensors")

    def evaluate(self, split: Split) -> Evaluation:
        """Evaluate the current prompt with argmax masks, in the training precision."""
        self.model.prompt.eval()
        try:
            return self.predict(lambda x: self.model(x)[:2], split)
        finally:
            self.model.prompt.train()

    def predict(
        self, predict: Callable[[Tensor], tuple[Tensor, Tensor]], split: Split
    ) -> Evaluation:
        """Run a classifier over a split, each process its share of the batches.

        The batches are those of a single process, so that the predictions are, too.
        """
        group, grid = self.group, len(self.inside)
        batches = split.batches(EVAL_BATCH, self.device, part=group.rank, of=group.size)
        mine = torch.arange(len(split)).split(EVAL_BATCH)[group.rank :: group.size]
        predicted = torch.zeros(len(split), dtype=torch.int64)
        masks = torch.zeros(len(split), grid, grid, dtype=torch.uint8)
        if mine:
            found = evaluate(predict, batches)
            predicted[torch.cat(mine)], masks[torch.cat(mine)] = found.predicted, found.masks
        # On the device, where the group's messages travel.
        predicted, masks = (group.sum(t.to(self.device)).cpu() for t in (predicted, masks))
        return Evaluation(predicted, split.labels[split.rows], masks)

    def save(self) -> None:
        """Write `last.safetensors`: all that `restore` needs."""
        if not self.group.leads:
            return
        tensors = prompt_tensors(self.model)
        for name, parameter, optimiser in self._optimised():
            kept = optimiser.state[parameter]
            tensors |= {f"{key}.{name}": value.cpu() for key, value in kept.items()}
        self.progress.scaler = self.scaler.state_dict()
        metadata = {
            "settings": self.settings,
            "identity": self.identity,
            "progress": asdict(self.progress),
        }
        write_whole(self.output / "last.safetensors", safetensors_bytes(tensors, metadata))

    def _optimised(self) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
        """Yield each parameter with its name and its optimiser."""
        for name, parameter in self.model.prompt.named_parameters():
            yield name, parameter, self.optimisers[name.startswith("generator.")]

    def restore(self, accepted: Sequence[str] = ()) -> None:
        """Take up the state of `last.safetensors`.

        Args:
            accepted: parts of the identity that may differ.

        Raises:
            ValueError: data or encoder are not those that the run began with.
        """
        path = self.output / "last.safetensors"
        tensors, state = read_state(path)
        for name, before in state.identity.items():
            now = self.identity.get(name, "unknown")
            if name not in accepted and now != before:
                raise ValueError(
                    f"{name} changed since the run began: {str(before)[:12]} then, {now[:12]} now; "
                    f"restore it, or accept the change with --accept-change {name}"
                )
        shapes = {name: t.shape for name, t in prompt_tensors(self.model).items()}
        for name, parameter, optimiser in self._optimised():
            keys = OPTIMISER_STATE[type(optimiser)]
            if any(f"{key}.{name}" in tensors for key in keys):
                for key in keys:
                    shapes[f"{key}.{name}"] = parameter.shape if key != "step" else torch.Size()
        for name, shape in shapes.items():
            value = tensors.get(name)
            if value is None or value.shape != shape or value.dtype != torch.float32:
                raise ValueError(f"{path} has no fp32 tensor {name!r} of shape {tuple(shape)}")
        load_prompt(self.model, tensors)
        for name, parameter, optimiser in self._optimised():
            for key in OPTIMISER_STATE[type(optimiser)]:
                if f"{key}.{name}" in shapes:
                    value = tensors[f"{key}.{name}"]
                    # Adam counts its steps on the CPU.
                    optimiser.state[parameter][key] = (
                        value if key == "step" else value.to(self.device)
                    )
        self.progress = state.progress
        self.progress.result = {}
        if self.progress.scaler:
            self.scaler.load_state_dict(self.progress.scaler)
