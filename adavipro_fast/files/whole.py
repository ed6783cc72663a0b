"""Files that appear only when they are whole, and the two formats that we read."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor

# Begins the names of the folders that exports work in.
WORK = ".export-"
ABANDONED_S = 86400.0


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under its final name only when all of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, and never a file or link that is there already.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def named_when_whole(output: Path) -> Iterator[Path]:
    """Yield a temporary path; on success move it and its companions next to `output`.

    All are flushed to the disk before. What exports left behind that were killed is removed.
    """
    parent = output.parent
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{WORK}*"):
        _remove_abandoned(left)
    work = Path(tempfile.mkdtemp(dir=parent, prefix=WORK))
    # As long as the process lives, others leave the folder alone.
    with FileLock(work / "lock"):
        path = work / "files" / output.name
        try:
            path.parent.mkdir()
            yield path
            # The file that was asked for comes last.
            for file in sorted(path.parent.iterdir(), key=lambda file: file == path):
                flush(file)
                file.replace(parent / file.name)
            flush(parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _remove_abandoned(work: Path) -> None:
    """Remove a work folder whose process has ended."""
    with contextlib.suppress(Timeout, OSError):
        if not (work / "lock").exists():
            # Older versions made no lock; and another process may be just making its own.
            if time.time() - work.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(work, ignore_errors=True)
        else:
            with FileLock(work / "lock", timeout=0):
                shutil.rmtree(work, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    # Windows opens no folders.
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Serialise tensors and JSON metadata, the same bytes for the same content.

    safetensors itself writes metadata in a random order.
    """
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    content = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, texts)
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and JSON metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole safetensors file, metadata not JSON, or values not finite.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            metadata = {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
            # Copies: what is mapped would end the process when the file is written anew in place.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    # Not only SafetensorError: types that torch lacks, nesting without end, ...
    except Exception as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file of adavipro_fast: {error}; create "
            "it again"
        ) from error
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.float().isfinite().all()):
            raise ValueError(f"{path}: tensor {name!r} contains NaN or infinity; train it again")
    return tensors, metadata


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int | None, ...]]
) -> None:
    """Check that tensors are there, in fp32 and of their shapes, where None stands for any size.

    Raises:
        ValueError: one is not.
    """
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"tensor {name!r} is missing")
        got = tuple(tensors[name].shape)
        if len(got) != len(shape) or any(
            w not in (None, g) for w, g in zip(shape, got, strict=True)
        ):
            raise ValueError(f"tensor {name!r} has shape {got}; expected {shape}")
        if tensors[name].dtype != torch.float32:
            raise ValueError(f"tensor {name!r} is {tensors[name].dtype}; expected fp32")


def file_sha256(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
