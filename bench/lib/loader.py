"""Speed of the data loader: decoding JPEG files, or reading the cache."""

import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adavipro_fast.cores import threads
from adavipro_fast.data.images import decode
from adavipro_fast.data.sets import DataConfig, load_dataset
from adavipro_fast.data.split import Split
from adavipro_fast.method.preprocess import Preprocess

# A usual size of photographs on the web; JPEG stores the smooth noise used here in 50 kB.
WIDTH, HEIGHT = 500, 375
CLASSES = 4


@contextmanager
def jpeg_folder(count: int) -> Iterator[Path]:
    """Create a data folder of `count` training JPEGs and a few others; remove it at the end."""
    noise = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        for split, images in (("train", count), ("val", CLASSES), ("test", CLASSES)):
            for number in range(images):
                coarse = Image.fromarray(noise.integers(0, 256, (48, 64, 3), dtype=np.uint8))
                path = Path(name) / "images" / split / f"class{number % CLASSES}" / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(path, quality=90)
        yield Path(name)


def decoded_batches(
    folder: Path, preprocess: Preprocess, size: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield batches without a cache: decode and resize in threads."""
    transform = preprocess.pixels()
    files = sorted((folder / "images" / "train").rglob("*.jpg"))
    with ThreadPoolExecutor(threads()) as pool:
        for start in range(0, len(files), size):
            paths = files[start : start + size]
            arrays = pool.map(
                lambda p: transform(decode(p.read_bytes(), str(p), preprocess)), paths
            )
            yield torch.from_numpy(np.stack(list(arrays))).to(device)


def loaded(folder: Path, preprocess: Preprocess) -> Split:
    """Load the training split as in training, and decode images that are not yet cached."""
    config = DataConfig(data=str(folder / "images"), cache_dir=folder / "cache")
    return load_dataset(config, preprocess).train


def loader_rows(
    preprocess: Preprocess, device: torch.device, *, count: int, batch: int
) -> list[dict[str, Any]]:
    """Measure the loader alone, images/s: decoding, filling the cache, reading the cache."""
    rounds: dict[str, list[float]] = {"loader_decode": [], "loader_cache": []}
    with jpeg_folder(count) as folder:
        began = time.perf_counter()
        split = loaded(folder, preprocess)
        filled = time.perf_counter() - began
        for _ in range(3):
            began = time.perf_counter()
            for _ in decoded_batches(folder, preprocess, batch, device):
                pass
            rounds["loader_decode"].append(time.perf_counter() - began)
            # Ten epochs, since one is too short to be timed.
            began = time.perf_counter()
            for _ in range(10):
                order = torch.randperm(count)
                for positions in order.split(batch):
                    split.batch(positions, device)
            rounds["loader_cache"].append((time.perf_counter() - began) / 10)
    rates = {name: count / sorted(times)[1] for name, times in rounds.items()}
    rates["loader_fill_cache"] = count / filled
    return [
        {"name": name, "images_per_s": rate, "ratio_to_decode": rate / rates["loader_decode"]}
        for name, rate in rates.items()
    ]
