"""Write rows of answers as parts and join them at the end, so that a killed run can continue.

A record beside the output stores the run's options and the number of rows of each finished part.
Parts that are not in the record are written again.
"""

import csv
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adavipro_fast.bulk.sources import INSTALL
from adavipro_fast.files.whole import named_when_whole, write_whole

COLUMNS = ("id", "answer", "probability", "rejected", "error")
EMBEDDING = "embedding"
FORMATS = (".csv", ".jsonl", ".parquet")
Row = dict[str, Any]


@dataclass
class Record:
    """The progress of an output, saved beside it."""

    plan: dict[str, Any]
    """the artifact, the sources and the options that the rows depend on"""
    parts: list[int] = field(default_factory=list)
    """number of rows of each finished part"""
    last: str = ""
    """id of the last row"""
    errors: int = 0
    seconds: float = 0.0
    """total over all starts of the run"""
    done: bool = False

    @property
    def images(self) -> int:
        """Number of rows in finished parts."""
        return sum(self.parts)


class Output:
    """A file or folder of rows.

    Args:
        path: a name in .csv, .jsonl or .parquet, or else a folder of Parquet files.
        plan: the settings that the rows depend on.
        embeddings: whether rows have an embedding.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: the output already exists and was written with other settings.
    """

    def __init__(self, path: Path, plan: dict[str, Any], *, embeddings: bool) -> None:
        self.path, self.folder = path, path.suffix not in FORMATS
        if self.folder and path.suffix and not path.is_dir():
            raise ValueError(
                f"output {path} must end in {', '.join(FORMATS)}, or be a folder without an ending"
            )
        self.kind = ".parquet" if self.folder else path.suffix
        self.columns = (*COLUMNS, EMBEDDING) if embeddings else COLUMNS
        if self.kind == ".parquet":
            _pyarrow()
        self.parts = path if self.folder else path.with_name(path.name + ".parts")
        # Readers of Parquet folders ignore names that begin with _.
        self.record_path = (
            path / "_run.json" if self.folder else path.with_name(path.name + ".json")
        )
        self.record = self._begun(plan)

    def _begun(self, plan: dict[str, Any]) -> Record:
        if not self.record_path.exists():
            if self.path.exists() and (not self.folder or any(self.path.iterdir())):
                raise ValueError(f"{self.path} already exists; choose another --output")
            self.parts.mkdir(parents=True, exist_ok=True)
            write_whole(self.record_path, json.dumps(asdict(Record(plan))).encode())
        try:
            record = Record(**json.loads(self.record_path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{self.record_path} is damaged: {error}; remove the output"
            ) from error
        changed = [name for name in plan if record.plan.get(name) != plan[name]]
        if changed:
            raise ValueError(
                f"{self.path} was written with different {', '.join(changed)}; choose another "
                "--output"
            )
        return record

    def part(self, number: int) -> Path:
        """Return the path of a part's file."""
        return self.parts / f"part-{number:06d}{self.kind}"

    def add(self, rows: Sequence[Row], seconds: float) -> None:
        """Write a part, then add it to the record.

        Args:
            rows: the part's rows, in order.
            seconds: time that they took.
        """
        if rows:
            write_whole(self.part(len(self.record.parts)), self.encoded(rows))
            self.record.parts.append(len(rows))
            self.record.last = rows[-1]["id"]
            self.record.errors += sum(bool(row["error"]) for row in rows)
        self.record.seconds += seconds
        self._keep()

    def _keep(self) -> None:
        write_whole(self.record_path, json.dumps(asdict(self.record)).encode())

    def encoded(self, rows: Sequence[Row]) -> bytes:
        """Encode rows as a part."""
        if self.kind == ".jsonl":
            return "".join(json.dumps(row) + "\n" for row in rows).encode()
        if self.kind == ".csv":
            return self._csv([self._cells(row) for row in rows])
        pyarrow, parquet = _pyarrow()
        content = io.BytesIO()
        kinds = {"probability": pyarrow.float32(), "rejected": pyarrow.bool_()}
        kinds[EMBEDDING] = pyarrow.list_(pyarrow.float32())
        schema = pyarrow.schema([(n, kinds.get(n, pyarrow.string())) for n in self.columns])
        safe = [{k: _text(v) for k, v in row.items()} for row in rows]
        parquet.write_table(pyarrow.Table.from_pylist(safe, schema), content)
        return content.getvalue()

    def _cells(self, row: Row) -> list[Any]:
        values = [row[name] for name in self.columns]
        return [json.dumps(v) if isinstance(v, list) else v for v in values]

    def _csv(self, lines: Sequence[Sequence[Any]]) -> bytes:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(lines)
        # File names are not always valid UTF-8.
        return text.getvalue().encode(errors="backslashreplace")

    def finish(self) -> None:
        """Join the parts under the output's name, then remove the parts."""
        self.record.done = True
        self._keep()
        if self.folder:
            return
        if self.parts.exists():
            with named_when_whole(self.path) as path:
                self._join(path)
            # Rename the folder before deleting it: if deleting stops halfway, the next start must
            # not join the parts that are left.
            trash = self.parts.with_name(self.parts.name + ".old")
            shutil.rmtree(trash, ignore_errors=True)
            self.parts.replace(trash)
        shutil.rmtree(self.parts.with_name(self.parts.name + ".old"), ignore_errors=True)

    def _finished(self) -> Iterator[Path]:
        yield from (self.part(number) for number in range(len(self.record.parts)))

    def _join(self, path: Path) -> None:
        if self.kind == ".parquet":
            self._join_parquet(path)
            return
        with path.open("wb") as joined:
            if self.kind == ".csv":
                joined.write(self._csv([self.columns]))
            for part in self._finished():
                with part.open("rb") as file:
                    shutil.copyfileobj(file, joined)

    def _join_parquet(self, path: Path) -> None:
        pyarrow, parquet = _pyarrow()
        empty = parquet.read_schema(pyarrow.BufferReader(self.encoded([])))
        with parquet.ParquetWriter(path, empty) as writer:
            for part in self._finished():
                writer.write_table(parquet.read_table(part))


def _text(value: Any) -> Any:
    """Escape bytes of a name that are not UTF-8, which a table cannot hold."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{INSTALL} ({error})") from error
    return pyarrow, pyarrow.parquet
