"""A classifier for engines that run many processes: Ray Data, Spark, Daft."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from adavipro_fast.artifact.artifact import Artifact
from adavipro_fast.artifact.open import open_artifact
from adavipro_fast.bulk.values import Decoded, decoded, values_of
from adavipro_fast.cores import threads, use_threads

Columns = dict[str, Any]


class Classifier:
    """Classifies columns of pictures; opened in each process at its first call.

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
        self._artifact: Artifact | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_artifact": None}

    @property
    def artifact(self) -> Artifact:
        """The opened file."""
        if self._artifact is None:
            use_threads(self.threads)
            self._artifact = open_artifact(self.path, device=self.device, task=self.task)
            self._artifact.about.check_one_task(Path(self.path))
        return self._artifact

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
        preprocess = self.artifact.about.preprocess

        def decode(row: Any) -> Decoded:
            return decoded(row if key == "path" or row is None else bytes(row), preprocess)

        with ThreadPoolExecutor(threads()) as pool:
            rows = values_of(self.artifact, list(pool.map(decode, columns[key])), self.reject)
        kept = {name: values for name, values in columns.items() if name != "image"}
        names = ["answer", "probability", "rejected", "error"]
        names += ["embedding"] if self.embeddings else []
        return kept | {name: [row.get(name) for row in rows] for name in names}
