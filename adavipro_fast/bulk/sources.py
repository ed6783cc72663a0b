"""Iterate over the pictures of folders, lists, tar shards and Parquet files."""

import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from adavipro_fast.data.walk import SUFFIXES, kind_of, streamed

INSTALL = "Parquet needs pyarrow: pip install 'adavipro_fast[bulk]'"
# Common names for the column of encoded images, preferred over other binary columns.
COLUMNS = ("image", "img", "jpg", "jpeg", "png", "bytes", "content")
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Item:
    """A picture that is not yet read."""

    id: str
    """its path, `shard.tar/key`, or `file.parquet#row`"""
    read: Callable[[], bytes]


def items(sources: Sequence[Path]) -> Iterator[Item]:
    """Yield the pictures of all sources, in the same order at every call.

    Args:
        sources: images, folders, `-` for a list of paths on stdin, `.tar` shards (WebDataset), and
            `.parquet` files with a column of encoded images.

    Raises:
        FileNotFoundError: a source does not exist.
        ImportError: pyarrow is not installed.
        ValueError: a Parquet file has no column of images.
    """
    for source in sources:
        if str(source) != "-" and not source.exists():
            raise FileNotFoundError(f"no such image, folder or shard: {source}")
    for source in sources:
        if str(source) == "-":
            yield from (_file(Path(line)) for raw in sys.stdin if (line := raw.rstrip("\r\n")))
        elif source.is_dir():
            yield from (_file(path) for path in streamed(source) if _is_picture(path))
        elif source.suffix == ".parquet":
            yield from _parquet(source)
        elif source.suffix in (".tar", ".tgz") or source.name.endswith(".tar.gz"):
            yield from _tar(source)
        else:
            yield _file(source)


def _is_picture(path: Path) -> bool:
    return kind_of(path) in ("image", "damaged")


def _file(path: Path) -> Item:
    return Item(str(path), path.read_bytes)


def _known(content: bytes) -> bytes:
    return content


def _failed(reason: str) -> bytes:
    raise ValueError(reason)


def _tar(path: Path) -> Iterator[Item]:
    """Stream a shard's pictures; a picture's key is the member's name without its suffix."""
    try:
        with tarfile.open(path, "r|*") as shard:
            for member in shard:
                if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                    content = shard.extractfile(member)
                    assert content is not None
                    key = member.name[: -len(Path(member.name).suffix)]
                    yield Item(f"{path}/{key}", partial(_known, content.read()))
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = f"cannot read shard {path} to its end: {error}"
        yield Item(str(path), partial(_failed, reason))


def _parquet(path: Path) -> Iterator[Item]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{INSTALL} ({error})") from error
    file = pyarrow.parquet.ParquetFile(path)
    column, row = image_column(file.schema_arrow, path), 0
    for batch in file.iter_batches(ROWS_AT_ONCE, columns=[column]):
        for value in batch.column(0).to_pylist():
            content = value.get("bytes") if isinstance(value, dict) else value
            read = partial(_known, content) if content else partial(_failed, "the row is empty")
            yield Item(f"{path}#{row}", read)
            row += 1


def image_column(schema: Any, path: Path) -> str:
    """Return the column of encoded images: binary, or Hugging Face's struct with `bytes`.

    Raises:
        ValueError: there is no such column.
    """
    import pyarrow.types as types

    found = []
    for field in schema:
        kind = field.type
        if types.is_struct(kind):
            inner = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
            kind = inner.get("bytes", kind)
        if types.is_binary(kind) or types.is_large_binary(kind):
            found.append(field.name)
    if not found:
        raise ValueError(
            f"{path} has no column of encoded images; its columns are {', '.join(schema.names)}"
        )
    return str(min(found, key=lambda n: COLUMNS.index(n) if n in COLUMNS else len(COLUMNS)))
