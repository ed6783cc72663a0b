"""Decode pictures ahead of the encoder: threads fill the next batches while one runs."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from adavipro_fast.cores import threads

# Number of batches decoded ahead of the current one.
AHEAD = 2
T = TypeVar("T")
R = TypeVar("R")


def decoded_ahead(
    items: Iterable[T], decode: Callable[[T], R], size: int
) -> Iterator[tuple[list[T], list[R]]]:
    """Yield batches of items with their decoded values, in order.

    Args:
        items: consumed as needed.
        decode: called in threads.
        size: of a batch.
    """
    waiting = iter(items)
    with ThreadPoolExecutor(threads()) as pool:
        ahead: deque[tuple[list[T], list[Future[R]]]] = deque()
        while True:
            while len(ahead) <= AHEAD and (batch := list(islice(waiting, size))):
                ahead.append((batch, [pool.submit(decode, item) for item in batch]))
            if not ahead:
                return
            batch, work = ahead.popleft()
            yield batch, [each.result() for each in work]
