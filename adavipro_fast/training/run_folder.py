"""The folder of a run: named, and held so that no two runs write there at once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

RUNS = Path("runs")
LOCK = ".lock"
# What a run writes, and may leave half written when it is killed.
WRITTEN = (
    *("checkpoint.safetensors", "last.safetensors", "metrics.jsonl", "masks.png", "curves.png"),
    *("head.safetensors", "encoder.safetensors", "start.safetensors"),
)


def absent(folder: Path) -> list[Path]:
    """Return the folder and those around it that are not there, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def make_folder(name: str) -> tuple[Path, list[Path]]:
    """Make the first of runs/NAME-1, runs/NAME-2, ... that is not there; return all it made."""
    made = absent(RUNS)
    RUNS.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = RUNS / f"{name}-{number}"
        # Exclusive: of two processes that come here together one goes on to the next number.
        with suppress(FileExistsError):
            folder.mkdir()
            return folder, [folder, *made]
    raise AssertionError


@contextmanager
def held(folder: Path, made: Sequence[Path] = ()) -> Iterator[None]:
    """Hold a run's folder until the run ends, however it ends.

    Args:
        folder: made where it is not there.
        made: folders that go again if they are empty in the end, beside those made here.

    Raises:
        ValueError: another run holds it.
        OSError: it cannot be made.
    """
    made = [*made, *absent(folder)]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another run is using {folder}; wait for it, or choose another --output"
        ) from None
    try:
        for partial in (p for name in WRITTEN for p in folder.glob(f"{name}.????????.partial")):
            partial.unlink(missing_ok=True)
        yield
    finally:
        with suppress(OSError):
            if [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
            for path in made:
                path.rmdir()
        lock.release()
