"""Training output: a progress bar, a line and a metrics row per epoch, TensorBoard."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from adavipro_fast.errors import printable
from adavipro_fast.files.whole import write_whole
from adavipro_fast.training.group import leading
from adavipro_fast.training.state import Progress


def say(line: str) -> None:
    """Print a line on stderr, from the leading process."""
    if leading():
        print(printable(line), file=sys.stderr)


class Log:
    """The log of a run; only the leading process writes to it."""

    def __init__(self, output: Path, epochs: int, writer: SummaryWriter | None) -> None:
        self.output, self.epochs, self.writer = output, epochs, writer

    def bar(self, progress: Progress, steps: int) -> Any:
        """Return the progress bar of an epoch."""
        return tqdm(
            desc=f"epoch {progress.epoch + 1}/{self.epochs}",
            total=steps,
            initial=progress.step,
            unit="step",
            leave=False,
            disable=None if self.writer is not None else True,
        )

    def epoch(self, progress: Progress) -> None:
        """Log the epoch that has just finished."""
        if self.writer is None:
            return
        row = progress.rows[-1]
        for name, value in row.items():
            self.writer.add_scalar(name, value, progress.epoch - 1)
        lines = "".join(json.dumps(row) + "\n" for row in progress.rows)
        write_whole(self.output / "metrics.jsonl", lines.encode())
        left = progress.seconds / progress.epoch * (self.epochs - progress.epoch)
        say(
            f"epoch {progress.epoch}: loss {row['loss']:.3f}, val top-1 {row['val_top1']:.1f} %, "
            f"open {row['mask_density']:.2f}, adaptivity {row['mask_adaptivity']:.2f}, "
            f"{row['images_per_s']:.0f} images/s, {timedelta(seconds=round(left))} left"
        )


@contextmanager
def logged(output: Path, epochs: int, progress: Progress, *, leads: bool) -> Iterator[Log]:
    """Open the log of a run that continues at `progress`."""
    if not leads:
        yield Log(output, epochs, None)
        return
    with SummaryWriter(str(output), purge_step=progress.epoch) as writer:
        yield Log(output, epochs, writer)
