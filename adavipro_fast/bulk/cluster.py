"""Classify a stream of pictures on the machines of a Ray cluster.

Workers take batches and give back rows; the driver keeps their order and writes them. A worker
that is lost, with its machine or alone, is replaced, and its batches go to others.
"""

import importlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from adavipro_fast.artifact.open import open_artifact
from adavipro_fast.bulk.rows import Row
from adavipro_fast.bulk.run import BATCH, answered
from adavipro_fast.bulk.sources import Item
from adavipro_fast.cores import use_threads

INSTALL = "--ray needs Ray: pip install 'adavipro_fast[ray]'"
# Cores of a worker on machines without GPUs.
CORES = 4
# Images of a call. Within it the next batch is decoded while the model runs; two calls at once
# would compete for the cores.
CALL = 4 * BATCH
# Calls that a worker has at once: one runs, the others wait.
AT_ONCE = 3
# Calls given out before the earliest one is back, as a multiple of what all workers have at once.
WINDOW = 4
# Workers that may be lost one after the other without a batch in between.
MOST_LOST = 20


class Worker:
    """Opens the file once and classifies batches.

    Args:
        path: of the artifact, on a disk that all machines see.
        options: of `open_artifact`.
        threads: of this worker.
        columns: of the rows.
        reject: share of known images that may be answered `unknown`.
    """

    def __init__(
        self,
        path: Path,
        options: dict[str, Any],
        threads: int | None,
        columns: Sequence[str],
        reject: float | None,
    ) -> None:
        use_threads(threads)
        self.artifact = open_artifact(path, **options)
        self.columns, self.reject = columns, reject

    def ready(self) -> None:
        """Return once the file is open."""

    def classify(self, items: Sequence[Item]) -> list[Row]:
        """Classify one batch."""
        batches = answered(self.artifact, items, self.columns, self.reject)
        return list(chain.from_iterable(batches))


def answered_by_ray(
    pictures: Iterable[Item],
    *,
    address: str,
    path: Path,
    options: dict[str, Any],
    threads: int | None,
    columns: Sequence[str],
    reject: float | None,
) -> Iterator[list[Row]]:
    """Yield the rows of each batch of pictures, in order.

    Args:
        pictures: their files are visible to all machines under the same paths.
        address: of a cluster, or `auto` for the one of this machine, started where there is none.
        path: see `Worker`, as the others.
        options: of `open_artifact`.
        threads: cores of a worker; without GPUs there is one for each so many cores.
        columns: of the rows.
        reject: share of known images that may be answered `unknown`.

    Raises:
        ImportError: Ray is not installed.
        ValueError: there is no cluster, or its workers cannot open the file.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise ImportError(f"{INSTALL} ({error})") from error
    connect(ray, address)
    resources = ray.cluster_resources()
    gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    each = min(threads or CORES, cores)
    need = {"num_gpus": 1} if gpus else {"num_cpus": each}
    kind = ray.remote(**need)(Worker)

    def start() -> tuple[Any, Any]:
        worker = kind.remote(path, options, None if gpus else each, columns, reject)
        return worker.ready.remote(), worker

    yield from _scheduled(ray, start, gpus or max(1, cores // each), iter(pictures))


def connect(ray: Any, address: str) -> None:
    """Join a cluster.

    Raises:
        ValueError: there is none at the address.
    """
    if ray.is_initialized():
        return
    try:
        try:
            ray.init(address=address, log_to_driver=False)
        except ConnectionError:
            if address != "auto":
                raise
            ray.init(log_to_driver=False, include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"no Ray cluster at {address}: {reason}") from error


def _scheduled(ray: Any, start: Any, count: int, pictures: Iterator[Item]) -> Iterator[list[Row]]:
    """Give batches to workers as they become ready and free, and yield their rows in order."""
    starting = dict(start() for _ in range(count))
    load: dict[Any, int] = {}
    running: dict[Any, tuple[int, list[Item], Any]] = {}
    again: deque[tuple[int, list[Item]]] = deque()
    found: dict[int, list[Row]] = {}
    given, due, lost = 0, 0, 0
    while True:
        while due in found:
            yield found.pop(due)
            due += 1
        while load and min(load.values()) < AT_ONCE:
            # A lost batch first: it may be the one that all rows wait for.
            if again:
                number, batch = again.popleft()
            # Rows that wait for an earlier batch are few, however slow that is.
            elif given - due < WINDOW * AT_ONCE * count and (batch := list(islice(pictures, CALL))):
                number, given = given, given + 1
            else:
                break
            worker = min(load, key=lambda one: load[one])
            load[worker] += 1
            running[worker.classify.remote(batch)] = number, batch, worker
        if not running and not again and due == given and load:
            return
        (ref, *_), _ = ray.wait([*running, *starting], num_returns=1)
        try:
            rows = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            raise ValueError(f"a worker failed: {error.cause or error}") from error
        except ray.exceptions.RayActorError as error:
            lost += 1
            if lost > MOST_LOST:
                reason = " ".join(str(error).split())[:300]
                raise ValueError(f"too many workers were lost: {reason}") from error
            if ref in running:
                number, batch, worker = running.pop(ref)
                again.append((number, batch))
                # Its other batches come back by themselves.
                if load.pop(worker, None) is not None:
                    starting |= [start()]
            else:
                del starting[ref]
                starting |= [start()]
            continue
        lost = 0
        if ref in starting:
            load[starting.pop(ref)] = 0
        else:
            number, _, worker = running.pop(ref)
            found[number] = rows
            if worker in load:
                load[worker] -= 1
