"""Classify a stream of pictures: threads decode the next batches while the model runs."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from adavipro_fast.artifact.artifact import Artifact
from adavipro_fast.bulk.rows import Output, Row
from adavipro_fast.bulk.sources import Item, items
from adavipro_fast.bulk.values import Decoded, decoded, values_of
from adavipro_fast.data.ahead import decoded_ahead

BATCH = 32
# A part is written after this many rows or seconds; a killed run loses at most that much.
PART_ROWS, PART_S = 4096, 20.0


Answers = Callable[[Iterator[Item]], Iterator[list[Row]]]


def classify_all(answers: Answers, sources: Sequence[Path], output: Output) -> dict[str, Any]:
    """Classify all pictures of the sources into a new output, or continue an unfinished one.

    Args:
        answers: yields the rows of batches of pictures, in order.
        sources: see `sources.items`.
        output: a new output, or that of a stopped run.

    Returns:
        images, errors, seconds, images_per_s, output, and resumed (rows from earlier starts).

    Raises:
        ValueError: the sources changed since the output was started.
    """
    record, resumed, began = output.record, output.record.images, time.perf_counter()
    if not record.done:
        waiting = skipped(items(sources), resumed, record.last)
        rows: list[Row] = []
        since = began
        try:
            with tqdm(initial=resumed, unit="image", disable=None, leave=False) as bar:
                for batch in answers(waiting):
                    rows += batch
                    bar.update(len(batch))
                    now = time.perf_counter()
                    if len(rows) >= PART_ROWS or now - since > PART_S:
                        output.add(rows, now - since)
                        rows, since = [], now
        except KeyboardInterrupt:
            output.add(rows, time.perf_counter() - since)
            raise KeyboardInterrupt("stopped; run the same command again to continue") from None
        output.add(rows, time.perf_counter() - since)
    output.finish()
    new, seconds = record.images - resumed, time.perf_counter() - began
    return {
        "images": record.images,
        "errors": record.errors,
        "seconds": seconds,
        "images_per_s": new / max(seconds, 1e-9),
        "output": str(output.path),
        "resumed": resumed,
    }


def skipped(pictures: Iterator[Item], count: int, last: str) -> Iterator[Item]:
    """Skip the pictures that already have rows.

    Raises:
        ValueError: picture number `count` is not the one named `last`.
    """
    if count:
        found = next(islice(pictures, count - 1, None), None)
        if found is None or found.id != last:
            raise ValueError(
                f"image {count} was {last!r} and is now {found.id if found else 'missing'!r}: the "
                "sources changed since the output was started; choose another --output"
            )
    return pictures


def answered(
    artifact: Artifact, pictures: Iterable[Item], columns: Sequence[str], reject: float | None
) -> Iterator[list[Row]]:
    """Yield the rows of each batch of pictures, in order.

    Args:
        artifact: a file of one task.
        pictures: read and decoded in threads while the encoder runs.
        columns: names of the rows' columns.
        reject: share of known images that may be answered `unknown`.
    """
    preprocess = artifact.about.preprocess

    def decode(item: Item) -> Decoded:
        try:
            content = item.read()
        except (OSError, ValueError) as error:
            return str(error)
        return decoded(content, preprocess, item.id)

    for batch, contents in decoded_ahead(pictures, decode, BATCH):
        empty = dict.fromkeys(columns)
        results = values_of(artifact, contents, reject)
        yield [
            empty | {"id": item.id} | {name: v for name, v in values.items() if name in empty}
            for item, values in zip(batch, results, strict=True)
        ]
