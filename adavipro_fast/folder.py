"""The folder of a run: named, and held so that no two runs write there at once."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

RUNS = Path("runs")
LOCK = ".lock"


def make_folder(name: str) -> Path:
    """Make the first of runs/NAME-1, runs/NAME-2, ... that is not there yet."""
    for number in count(1):
        folder = RUNS / f"{name}-{number}"
        # Exclusive: of two processes that come here together one goes on to the next number.
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError


def last_folder(name: str) -> Path | None:
    """Return the folder that `make_folder` made last, if any."""
    number = next(n for n in count(1) if not (RUNS / f"{name}-{n}").exists())
    return RUNS / f"{name}-{number - 1}" if number > 1 else None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run's folder until the run ends, however it ends; one that stays empty goes.

    Raises:
        ValueError: another run holds it.
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another run is writing {folder}; wait for it, or choose another --output"
        ) from None
    try:
        # What a killed run left half written.
        for partial in folder.glob("*.partial"):
            partial.unlink(missing_ok=True)
        yield
    finally:
        with suppress(OSError):
            if [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()
                folder.parent.rmdir()
        lock.release()
