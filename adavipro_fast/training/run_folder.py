"""The folder of a run: created, and locked so that no two runs write to it at once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

RUNS = Path("runs")
LOCK = ".lock"
# Files that a run writes, whose partial versions may be left behind when it is killed.
WRITTEN = (
    *("checkpoint.safetensors", "last.safetensors", "metrics.jsonl", "masks.png", "curves.png"),
    *("head.safetensors", "encoder.safetensors", "start.safetensors"),
)


def absent(folder: Path) -> list[Path]:
    """Return those of a folder and its parents that do not exist, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def make_folder(name: str) -> tuple[Path, list[Path]]:
    """Create the first free one of runs/NAME-1, runs/NAME-2, ...; return it, and all created."""
    made = absent(RUNS)
    RUNS.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = RUNS / f"{name}-{number}"
        # mkdir is exclusive: if two processes try at once, one continues with the next number.
        with suppress(FileExistsError):
            folder.mkdir()
            return folder, [folder, *made]
    raise AssertionError


@contextmanager
def held(folder: Path, made: Sequence[Path] = ()) -> Iterator[None]:
    """Lock a run's folder until the run ends in any way.

    Args:
        folder: created if it does not exist.
        made: folders to remove at the end if they are empty, like those created here.

    Raises:
        ValueError: another run has locked it.
        OSError: the folder cannot be created.
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
