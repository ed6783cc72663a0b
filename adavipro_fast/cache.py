"""List or clear the cache of decoded images: `python -m adavipro_fast.cache`.

Images are decoded and resized once, with the encoder's own preprocessing, into a memory-mapped
uint8 file. The file's name is a hash of the images' bytes and the preprocessing, so a changed
image or another encoder creates a new file, and moving the images does not. Processes share the
files; the least recently used are removed when the folder exceeds its limit.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adavipro_fast import cli
from adavipro_fast.data.cache import DEFAULT_DIR, files, remove_locks, shrink, size_of


@dataclass(frozen=True)
class CacheConfig:
    """List the cache of decoded images, or clear it."""

    cache_dir: Path = DEFAULT_DIR
    """where decoded images are kept"""
    clear: bool = False
    """remove all files that no process has open"""


def command(config: CacheConfig) -> dict[str, Any]:
    """List or clear the cache, and return its remaining files."""
    removed = shrink(config.cache_dir, 0) if config.clear else 0
    if config.clear:
        remove_locks(config.cache_dir)
    sizes = {path.name: size_of(path) for path in files(config.cache_dir)}
    return {
        "cache_dir": str(config.cache_dir),
        "files": [{"file": name, "bytes": size} for name, size in sizes.items()],
        "bytes": sum(sizes.values()),
        "removed_bytes": removed,
    }


def summary(result: dict[str, Any]) -> str:
    """Format the size of the cache in one line."""
    return (
        f"{result['cache_dir']}: {len(result['files'])} files, {result['bytes'] / 1e6:.1f} MB; "
        f"{result['removed_bytes'] / 1e6:.1f} MB removed"
    )


def main() -> None:
    """Parse, list or clear, print."""
    cli.main(CacheConfig, command, summary)


if __name__ == "__main__":
    main()
