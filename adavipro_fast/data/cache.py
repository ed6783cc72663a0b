"""The decoded-image cache: `python -m adavipro_fast.cache` lists it, `--clear` empties it.

Images are decoded and resized once, with the encoder's own preprocessing, into a memory-mapped
uint8 file. The file's name is a hash of the images' bytes and the preprocessing, so a changed
image or another encoder creates a new file, and moving the images does not. Processes share the
files; the least recently used are removed when the folder exceeds its limit.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.lib.format import open_memmap
from torch import Tensor
from tqdm.auto import tqdm

from adavipro_fast.cores import threads
from adavipro_fast.data.source import Source
from adavipro_fast.files.whole import write_whole
from adavipro_fast.method.preprocess import Preprocess

DEFAULT_DIR = Path.home() / ".cache" / "adavipro_fast"
# Reading waits for disks and networks, so it uses more threads than decoding.
READERS = 8
MOST_NAMED = 200
# The file beside a cache file: the settings' hash, then a row for each image.
ROWS = ".rows"
ROW = np.dtype([("sha256", "V32"), ("peak", "<u2")])
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Mapped = np.memmap[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Decoded:
    """The decoded images of a split."""

    images: Pixels
    """(N, 3, S, S), memory-mapped; only the files that could be read"""
    key: str
    """hash that names the cache file"""
    kept: tuple[int, ...]
    """their indices in the source"""
    unreadable: dict[int, str]
    """index and reason for each of the other images"""
    digests: tuple[bytes, ...]
    """sha256 of each kept file"""
    peaks: np.ndarray[Any, np.dtype[np.uint16]]
    """largest value of each kept image with 16-bit grey pixels, else 0"""


def decoded(
    source: Source, preprocess: Preprocess, folder: Path, *, label: str, limit: int
) -> Decoded:
    """Open a split's cache file, and create it first if it does not exist.

    Files that cannot be read are left out and reported. Images that are already in another cache
    file of the same preprocessing are copied instead of decoded.

    Args:
        source: the images.
        preprocess: the encoder's preprocessing.
        folder: the cache's folder.
        label: name of the split in the progress bar.
        limit: size limit of the folder in bytes; beyond it, other cache files are removed.

    Raises:
        OSError: the folder is not writable.
        ValueError: the cache file is damaged.
    """
    digests, unreadable = content_digests(source)
    kept = [i for i in range(len(source.labels)) if i not in unreadable]
    while True:
        if not kept:
            empty = np.zeros((0, 3, preprocess.size, preprocess.size), np.uint8)
            return Decoded(empty, "", (), unreadable, (), np.zeros(0, np.uint16))
        key = key_of([digests[i] for i in kept], preprocess)
        path = folder / f"{key}.npy"
        shape = (len(kept), 3, preprocess.size, preprocess.size)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                failed = {}
                if not path.exists():
                    chosen = _Chosen(source, kept, [digests[i] for i in kept])
                    failed = fill(path, chosen, preprocess, label)
                    shrink(folder, limit, keep=path)
                if not failed:
                    os.utime(path)
                    images = opened(path)
                    break
        except OSError as error:
            raise OSError(
                f"cannot write decoded images to {folder}: {error}; choose another --cache-dir"
            ) from error
        unreadable = dict(sorted((unreadable | failed).items()))
        kept = [i for i in kept if i not in failed]
    if images.shape != shape or images.dtype != np.uint8:
        raise ValueError(f"{path} is not a valid cache file; remove it")
    rows = read_rows(path, preprocess)
    peaks = np.zeros(len(kept), np.uint16) if rows is None else rows["peak"]
    return Decoded(images, key, tuple(kept), unreadable, tuple(digests[i] for i in kept), peaks)


def joined_reasons(reasons: Sequence[str]) -> str:
    """Join the reasons why files cannot be read, shortened to the first `MOST_NAMED`."""
    more = f"; and {len(reasons) - MOST_NAMED} more" if len(reasons) > MOST_NAMED else ""
    return "; ".join(reasons[:MOST_NAMED]) + more


@dataclass(frozen=True)
class _Chosen:
    """The images of a source that are decoded into one file."""

    source: Source
    indices: list[int]
    digests: list[bytes]


def opened(path: Path) -> Pixels:
    """Map a cache file into memory.

    Raises:
        ValueError: the file is damaged or incomplete.
    """
    try:
        # Copy-on-write: torch needs writable memory, and the file must not change.
        images: Pixels = np.load(path, mmap_mode="c")
    # NumPy parses the header with Python's parser, which can raise many exceptions.
    except Exception as error:
        raise ValueError(f"{path} is damaged: {error}; remove it") from error
    return images


def content_digests(source: Source) -> tuple[list[bytes], dict[int, str]]:
    """Hash each image file; return the hashes, and the reason for each unreadable file."""
    failed: dict[int, str] = {}

    def digest(index: int) -> bytes:
        try:
            return hashlib.sha256(source.read(index)).digest()
        except OSError as error:
            failed[index] = f"cannot read image {source.name(index)}: {error.strerror or error}"
            return b""

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(digest, range(len(source.labels)))), failed


def key_of(digests: Sequence[bytes], preprocess: Preprocess) -> str:
    """Hash the images' hashes and the preprocessing."""
    digest = hashlib.sha256(settings_of(preprocess))
    for content in digests:
        digest.update(content)
    return digest.hexdigest()[:32]


def settings_of(preprocess: Preprocess) -> bytes:
    """Serialise the settings that the decoded pixels depend on."""
    settings = preprocess.stored() | {"decoding": preprocess.decoding}
    return json.dumps(settings, sort_keys=True).encode()


def fill(path: Path, chosen: _Chosen, preprocess: Preprocess, label: str) -> dict[int, str]:
    """Decode images into a file, which is renamed to `path` once it is complete.

    If some images cannot be read, the others are saved under the name of that smaller set.

    Returns:
        Index and reason for each image of the source that cannot be read.
    """
    transform, count = preprocess.pixels(), len(chosen.indices)
    # The caller holds the lock, so partial files are leftovers of a killed process.
    for left in path.parent.glob(f"{path.stem}*.partial"):
        left.unlink(missing_ok=True)
    known = known_rows(path.parent, preprocess, chosen.digests)
    rows = np.zeros(count, ROW)
    rows["sha256"] = [np.void(digest) for digest in chosen.digests]
    failed: dict[int, str] = {}

    def decode(number: int) -> None:
        cached = known.get(chosen.digests[number])
        if cached is not None:
            pixels[number] = cached.images[cached.row]
            rows["peak"][number] = cached.peak
            return
        index = chosen.indices[number]
        try:
            image = chosen.source.open(index, preprocess)
            pixels[number] = transform(image)
            rows["peak"][number] = 0 if isinstance(image, Tensor) else image.info.get("peak", 0)
        except ValueError as error:
            failed[index] = str(error)

    shape = (count, 3, preprocess.size, preprocess.size)
    with partial_file(path, shape) as (partial, pixels):
        with ThreadPoolExecutor(threads()) as pool:
            done = pool.map(decode, range(count))
            for _ in tqdm(done, f"decode {label}", count, unit="image", leave=False, disable=None):
                pass
        pixels.flush()
        if not failed:
            _name(partial, path, rows, preprocess)
            return {}
        good = [n for n, index in enumerate(chosen.indices) if index not in failed]
        if good:
            key = key_of([chosen.digests[n] for n in good], preprocess)
            less = path.with_name(f"{key}.npy")
            with partial_file(less, (len(good), *shape[1:])) as (partial_less, fewer):
                for row, number in enumerate(good):
                    fewer[row] = pixels[number]
                fewer.flush()
                _name(partial_less, less, rows[good], preprocess)
    return failed


@contextlib.contextmanager
def partial_file(path: Path, shape: tuple[int, ...]) -> Iterator[tuple[Path, Mapped]]:
    """Create an array file beside `path` under a temporary name; remove it unless renamed.

    Raises:
        OSError: the disk is full.
    """
    partial = path.with_suffix(f".{secrets.token_hex(4)}.partial")
    try:
        # Mode x: never write to an existing file or link.
        partial.open("xb").close()
        pixels = open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        # Reserve the space now: writing to a memory map on a full disk kills the process.
        if hasattr(os, "posix_fallocate"):
            with partial.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        yield partial, pixels
    finally:
        partial.unlink(missing_ok=True)


def _name(partial: Path, path: Path, rows: np.ndarray[Any, Any], preprocess: Preprocess) -> None:
    settings = hashlib.sha256(settings_of(preprocess)).digest()
    write_whole(path.with_suffix(ROWS), settings + rows.tobytes())
    partial.replace(path)


@dataclass(frozen=True)
class Row:
    """The location of an image that is already decoded."""

    images: Pixels
    row: int
    peak: int


def known_rows(folder: Path, preprocess: Preprocess, digests: Sequence[bytes]) -> dict[bytes, Row]:
    """Look up the images that cache files of this preprocessing already contain."""
    wanted, found = set(digests), dict[bytes, Row]()
    for path in files(folder):
        rows = read_rows(path, preprocess)
        # Another process may remove the file at any time.
        with contextlib.suppress(OSError, ValueError):
            matches = [] if rows is None else [r["sha256"].tobytes() in wanted for r in rows]
            if rows is not None and any(matches):
                images = opened(path)
                if len(images) == len(rows):
                    for number in np.flatnonzero(matches).tolist():
                        digest = rows["sha256"][number].tobytes()
                        found[digest] = Row(images, number, int(rows["peak"][number]))
    return found


def read_rows(path: Path, preprocess: Preprocess) -> np.ndarray[Any, Any] | None:
    """Read the rows beside a cache file; None if they are missing or of other settings."""
    try:
        content = path.with_suffix(ROWS).read_bytes()
    except OSError:
        return None
    settings = hashlib.sha256(settings_of(preprocess)).digest()
    if content[:32] != settings or (len(content) - 32) % ROW.itemsize:
        return None
    return np.frombuffer(content, ROW, offset=32)


def files(folder: Path) -> list[Path]:
    """Return the cache's files, least recently used first."""
    found = []
    for path in folder.glob("*.npy"):
        # Another process may remove it at any time.
        with contextlib.suppress(FileNotFoundError):
            found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found)]


def size_of(path: Path) -> int:
    """Return a file's size in bytes, 0 if it no longer exists."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def shrink(folder: Path, limit: int, keep: Path | None = None) -> int:
    """Remove the least recently used files until the rest fits; return the bytes removed.

    A process that has already opened a removed file can still read it.
    """
    found = files(folder)
    held = sum(map(size_of, found))
    before = held
    for path in found:
        if held <= limit:
            break
        # Timeout: another process is filling or opening it.
        with contextlib.suppress(Timeout):
            if path != keep:
                with FileLock(path.with_suffix(".lock"), timeout=0):
                    held -= size_of(path)
                    path.unlink(missing_ok=True)
                    path.with_suffix(ROWS).unlink(missing_ok=True)
    return before - held


def remove_locks(folder: Path) -> None:
    """Remove the cache's lock files that no process holds; whoever waits creates it anew."""
    for path in folder.glob("*.lock"):
        if re.fullmatch("[0-9a-f]{32}", path.stem):
            with contextlib.suppress(Timeout, OSError), FileLock(path, timeout=0):
                path.unlink()
