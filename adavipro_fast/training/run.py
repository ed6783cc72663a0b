"""Start or resume a run, and train it to the end."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from adavipro_fast.cores import use_threads
from adavipro_fast.errors import VerificationError
from adavipro_fast.files.checkpoint import FILES
from adavipro_fast.method.config import PROMPTED
from adavipro_fast.method.encoder import fingerprint
from adavipro_fast.training import group as distributed
from adavipro_fast.training.assemble import Run, build, load, with_precision
from adavipro_fast.training.config import TrainConfig, difference, read_stored
from adavipro_fast.training.log import say
from adavipro_fast.training.results import result_of, zero_shot_top1
from adavipro_fast.training.run_folder import held, make_folder
from adavipro_fast.training.state import read_state
from adavipro_fast.training.trainer import Trainer


def start_run(config: TrainConfig) -> dict[str, Any]:
    """Train from the beginning and return the result; after torchrun's restart, resume.

    Raises:
        ValueError: a setting is invalid, or the output folder already contains a run.
    """
    use_threads(config.threads)
    group, device = distributed.join(config.device)
    with ExitStack() as stack:
        folder = config.output or group.kept_folder()
        made: list[Path] = []
        if group.leads:
            if folder is None:
                name = f"{Path(config.data.data).name}-{config.prompt.method}"
                folder, made = make_folder(name)
                group.keep_folder(folder)
            stack.enter_context(held(folder, made))
        config = replace(config, output=Path(group.agreed(str(folder or ""), device)))
        return _begin(with_precision(config, group, device))


def _begin(config: TrainConfig) -> dict[str, Any]:
    """Train in a folder that this run has locked."""
    output, method = config.output, config.prompt.method
    assert output is not None
    state_path = output / "last.safetensors"
    if state_path.exists():
        before = read_stored(read_state(state_path)[1].settings, state_path)
        if distributed.restarts() and not difference(replace(before, output=output), config):
            return _go_on(config)
        raise ValueError(
            f"{output} already contains a run; continue it with --resume {output} or choose "
            "another --output"
        )
    if method not in PROMPTED:
        if distributed.launched():
            raise ValueError(f"{method} runs in one process; start it without torchrun")
        for name in FILES.values():
            if (output / name).exists():
                raise ValueError(f"{output} already contains {name}; choose another --output")
    return execute(build(config, load(config)))


def resume_run(
    folder: Path, ask: Callable[[TrainConfig], TrainConfig] = lambda before: before
) -> dict[str, Any]:
    """Resume an interrupted run; for a finished run, return its result again.

    Args:
        folder: the run's folder.
        ask: returns the requested configuration, given the run's; it must be equal except for
            accepted changes.

    Raises:
        ValueError: flags differ from the run's, or its state cannot be read.
        FileNotFoundError: the folder contains no run.
    """
    path = folder / "last.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} contains no last.safetensors; start a run with --output {folder}"
        )
    _, state = read_state(path)
    before = read_stored(state.settings, path)
    parsed = ask(before)
    accepted = parsed.accept_change
    use_threads(parsed.threads)
    # Results do not depend on the number of threads.
    before = replace(before, threads=parsed.threads)
    asked = replace(parsed, resume=None, output=before.output, accept_change=())
    changed = difference(before, asked)
    refused = {k: v for k, v in changed.items() if k not in {a.lstrip("-") for a in accepted}}
    if refused:
        raise ValueError(
            "--resume keeps the settings of the run, but these differ: "
            f"{', '.join(refused.values())}; to change one, add --accept-change "
            f"{next(iter(refused))}"
        )
    if state.progress.result and not changed and not accepted:
        return state.progress.result
    if "white_level" not in state.settings and "data" not in accepted:
        raise ValueError(
            f"{folder} was started by an older version, which decoded and split images "
            "differently; start again, or accept the difference with --accept-change data"
        )
    with held(folder) if distributed.leading() else nullcontext():
        return _go_on(replace(asked, output=folder), accepted)


def _go_on(config: TrainConfig, accepted: tuple[str, ...] = ()) -> dict[str, Any]:
    """Restore the state in the output folder and continue training."""
    run = build(config, load(config))
    run.trainer.restore(accepted)
    say(f"resuming {config.output} at epoch {run.trainer.progress.epoch + 1}")
    return execute(run)


def execute(run: Run) -> dict[str, Any]:
    """Train to the end and return the figures of the best and of the last model.

    Args:
        run: a new run, or a restored one.

    Raises:
        KeyboardInterrupt: a signal stopped the run; the state is saved.
        VerificationError: the frozen encoder changed.
    """
    trainer, frozen = run.trainer, run.frozen
    zero_shot = zero_shot_top1(trainer, frozen, run.embeddings, run.config)
    if zero_shot is not None:
        say(f"zero-shot top-1: {zero_shot:.1f} % (test)")
    began = time.perf_counter()
    with stop_on_signal(trainer):
        trainer.run()
    if not trainer.parts:
        trainer.progress.seconds = time.perf_counter() - began
    if fingerprint(frozen.visual) != frozen.sha256 or any(
        p.requires_grad for p in frozen.parameters()
    ):
        raise VerificationError("the frozen encoder changed during training")
    trainer.progress.result = result_of(trainer, frozen, zero_shot, run.config)
    trainer.save()
    trainer.group.wait()
    distributed.leave()
    return trainer.progress.result


@contextmanager
def stop_on_signal(trainer: Trainer) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the run after the current step."""
    stops = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(stop, lambda *_: trainer.stop()) for stop in stops]
    try:
        yield
    finally:
        for stop, handler in zip(stops, before, strict=True):
            signal.signal(stop, handler)
