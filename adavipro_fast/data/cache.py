"""The decoded-image cache: `python -m adavipro_fast.cache` lists it, `--clear` empties it.

Images are decoded and resized once, by the encoder's own preprocessing, into a memory-mapped
uint8 file. Its name is a hash of the images' bytes and of the preprocessing, so a changed image or
another encoder makes a new file and a moved folder does not. Processes share the files; those used
longest ago go when the folder outgrows its limit.
"""

import contextlib
import hashlib
import json
import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.lib.format import open_memmap
from tqdm import tqdm

from adavipro_fast.data.source import Source
from adavipro_fast.method.preprocess import Preprocess

DEFAULT_DIR = Path.home() / ".cache" / "adavipro_fast"
DECODERS = 8
# Part of a cache file's name: pixels decoded otherwise are other pixels.
DECODING = 2


def decoded(
    source: Source, preprocess: Preprocess, folder: Path, *, label: str, limit: int
) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], str]:
    """Open a split's cache file, making it first where it is not there.

    Args:
        source: the images.
        preprocess: the encoder's preprocessing.
        folder: of the cache.
        label: what to call the split in the progress bar.
        limit: bytes that the folder may hold; other files than this one go beyond it.

    Returns:
        (N, 3, S, S) uint8, memory-mapped, and the hash that names it.

    Raises:
        OSError: the folder cannot be written.
        ValueError: an image cannot be read, or the file is not what was written.
    """
    key = content_key(source, preprocess)
    path = folder / f"{key}.npy"
    shape = (len(source.labels), 3, preprocess.size, preprocess.size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                fill(path, shape, source, preprocess, label)
                shrink(folder, limit, keep=path)
            os.utime(path)
            images = opened(path)
    except OSError as error:
        raise OSError(f"cannot keep decoded images in {folder}: {error}") from error
    if images.shape != shape or images.dtype != np.uint8:
        raise ValueError(f"{path} is not the cache file it should be; remove it")
    return images, key


def opened(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Map a cache file into memory.

    Raises:
        ValueError: it is not a whole array file.
    """
    try:
        # Copy-on-write: torch wants writable memory, the file stays as it is.
        images: np.ndarray[Any, np.dtype[np.uint8]] = np.load(path, mmap_mode="c")
    # NumPy parses the header with Python's own parser, which has many ways to refuse.
    except Exception as error:
        raise ValueError(f"{path} is damaged: {error}; remove it") from error
    return images


def content_key(source: Source, preprocess: Preprocess) -> str:
    """Hash the images' bytes and the preprocessing."""
    settings = preprocess.stored() | {"decoding": DECODING}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    with ThreadPoolExecutor(DECODERS) as pool:
        indices = range(len(source.labels))
        for content in pool.map(lambda i: hashlib.sha256(source.read(i)).digest(), indices):
            digest.update(content)
    return digest.hexdigest()[:32]


def fill(
    path: Path, shape: tuple[int, ...], source: Source, preprocess: Preprocess, label: str
) -> None:
    """Decode all images into a file, which gets its name when it is whole."""
    transform = preprocess.pixels()
    # The caller holds the lock: what is there is of a process that was killed.
    for partial in path.parent.glob(f"{path.stem}*.partial"):
        partial.unlink(missing_ok=True)
    partial = path.with_suffix(f".{secrets.token_hex(4)}.partial")

    def decode(index: int) -> None:
        pixels[index] = transform(source.open(index, preprocess))

    try:
        # Never a file or link that is there already.
        partial.open("xb").close()
        pixels = open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        # A full disk must be told now: writing to a map that has no room ends the process.
        if hasattr(os, "posix_fallocate"):
            with partial.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        with ThreadPoolExecutor(DECODERS) as pool:
            done = pool.map(decode, range(shape[0]))
            for _ in tqdm(
                done, f"decode {label}", shape[0], unit="image", leave=False, disable=None
            ):
                pass
        pixels.flush()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def files(folder: Path) -> list[Path]:
    """Return the cache's files, those used longest ago first."""
    found = []
    for path in folder.glob("*.npy"):
        # Another process may remove it at any time.
        with contextlib.suppress(FileNotFoundError):
            found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found)]


def size_of(path: Path) -> int:
    """Return a file's bytes, 0 where it is gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def shrink(folder: Path, limit: int, keep: Path | None = None) -> int:
    """Remove the files used longest ago until the rest fits; return the bytes removed.

    A file that another process has just opened stays readable to it.
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
    return before - held
