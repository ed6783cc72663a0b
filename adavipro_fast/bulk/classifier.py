"""A classifier for data engines with many processes: Ray Data, Spark, Daft."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from adavipro_fast.artifact.artifact import Artifact
from adavipro_fast.artifact.open import open_artifact
from adavipro_fast.bulk.values import Decoded, decoded, values_of
from adavipro_fast.cores import threads, use_threads

Columns = dict[str, Any]
PIECE = 256


@cache
def opened(path: str, changed_ns: int, task: str | None, device: str) -> Artifact:
    """Open a file once per process, however many copies of its classifier are unpickled there.

    Args:
        path: the file's path.
        changed_ns: when the file was last changed; a changed file is opened again.
        task: see `Classifier`.
        device: see `Classifier`.
    """
    artifact = open_artifact(path, device=device, task=task)
    artifact.about.check_one_task(Path(path))
    return artifact


def changed_ns(path: str) -> int:
    """Return a file's modification time in nanoseconds; 0 for a file on the Hub."""
    file = Path(path)
    return file.stat().st_mtime_ns if file.exists() else 0


class Classifier:
    """Classifies columns of pictures; the file is opened once per process, at the first call.

    Only its settings are pickled, so it is cheap to send to other processes.

    Args:
        path: see `open_artifact`.
        task: name of a task, for a file that holds several.
        threads: number of threads in each process (default: the process's cores).
        reject: share of known images that may be answered `unknown`.
        device: auto, cpu, cuda, ...
        embeddings: also return the unit-length embeddings.
    """

    def __init__(
        self,
        path: str | Path,
        task: str | None = None,
        *,
        threads: int | None = None,
        reject: float | None = None,
        device: str = "auto",
        embeddings: bool = False,
    ) -> None:
        self.path, self.task, self.threads = str(path), task, threads
        self.reject, self.device, self.embeddings = reject, device, embeddings

    @property
    def artifact(self) -> Artifact:
        """The opened file."""
        use_threads(self.threads)
        return opened(self.path, changed_ns(self.path), self.task, self.device)

    def __call__(self, columns: Mapping[str, Sequence[Any]]) -> Columns:
        """Classify a batch of rows.

        Args:
            columns: `image` (encoded bytes) or `path`, and any other columns.

        Returns:
            The columns without `image`, and answer, probability, rejected, error, and embedding
            if requested. A picture that cannot be read has an error and no answer.

        Raises:
            KeyError: the columns include neither `image` nor `path`.
        """
        key = next((name for name in ("image", "path") if name in columns), None)
        if key is None:
            raise KeyError(
                f"columns are {', '.join(columns)}; one must be `image` (encoded bytes) or `path`"
            )
        artifact = self.artifact
        preprocess = artifact.about.preprocess

        def decode(row: Any) -> Decoded:
            return decoded(row if key == "path" or row is None else bytes(row), preprocess)

        pictures: Sequence[Any] = columns[key]
        rows: list[Any] = []
        with ThreadPoolExecutor(threads()) as pool:
            # The engine's batches may have ten thousand pictures, whose pixels need much memory.
            for start in range(0, len(pictures), PIECE):
                batch = list(pool.map(decode, pictures[start : start + PIECE]))
                rows += values_of(artifact, batch, self.reject)
        kept = {name: values for name, values in columns.items() if name != "image"}
        names = ["answer", "probability", "rejected", "error"]
        names += ["embedding"] if self.embeddings else []
        return kept | {name: [row.get(name) for row in rows] for name in names}
