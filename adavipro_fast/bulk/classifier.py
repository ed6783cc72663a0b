"""A classifier for engines that run many processes: Ray Data, Spark, Daft."""

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
    """Open a file once in a process, however often a classifier of it arrives there.

    Args:
        path: of the file.
        changed_ns: when it was last changed; a new file is opened anew.
        task: see `Classifier`.
        device: see `Classifier`.
    """
    artifact = open_artifact(path, device=device, task=task)
    artifact.about.check_one_task(Path(path))
    return artifact


def changed_ns(path: str) -> int:
    """Return when a file was last changed; 0 for one on the Hub."""
    file = Path(path)
    return file.stat().st_mtime_ns if file.exists() else 0


class Classifier:
    """Classifies columns of pictures; opened once in each process, at the first call.

    It is sent to other processes by its settings alone.

    Args:
        path: see `open_artifact`.
        task: one of a file that holds several.
        threads: of the process that it runs in (default: its cores).
        reject: share of known images that may be answered `unknown`.
        device: auto, cpu, cuda, ...
        embeddings: return the unit embeddings, too.
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
            columns: `image` (encoded bytes) or `path`, and any others.

        Returns:
            The columns without `image`, and answer, probability, rejected, error, and embedding
            where it is asked for. A picture that cannot be read has an error and no answer.

        Raises:
            KeyError: there is neither `image` nor `path`.
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
            # A batch of the engine's may be ten thousand pictures: their pixels would be large.
            for start in range(0, len(pictures), PIECE):
                some = list(pool.map(decode, pictures[start : start + PIECE]))
                rows += values_of(artifact, some, self.reject)
        kept = {name: values for name, values in columns.items() if name != "image"}
        names = ["answer", "probability", "rejected", "error"]
        names += ["embedding"] if self.embeddings else []
        return kept | {name: [row.get(name) for row in rows] for name in names}
