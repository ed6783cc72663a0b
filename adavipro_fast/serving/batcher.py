"""Gather the images of many requests into batches: a bounded queue, and a thread per device.

When a device becomes idle, the waiting jobs form a batch, up to the largest size. A job waits at
most a few milliseconds for others. Requests that exceed the queue are rejected immediately.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adavipro_fast.artifact.artifact import Artifact
from adavipro_fast.method.model import Prediction

# Exponential smoothing of the time per image, from which Retry-After is computed.
SMOOTHING = 0.8


class FullError(Exception):
    """The queue is full."""

    def __init__(self, seconds: float) -> None:
        super().__init__("too many images are waiting")
        self.seconds = seconds
        """estimated time until there is room"""


class RetryError(Exception):
    """The server is stopping or a task was replaced; the request may be sent again."""


@dataclass(frozen=True)
class Job:
    """The images of one request, and the future of its answer."""

    artifacts: Sequence[Artifact]
    """one per device; a batch contains only jobs with the same artifacts"""
    pixels: Tensor
    tasks: Sequence[str] | None
    answer: "Future[Prediction]" = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Runs jobs in batches, with one thread per device.

    Args:
        devices: number of devices.
        largest: largest number of images in a batch; a larger request becomes its own batch.
        delay: seconds that a job may wait for others while a device is idle.
        room: number of images that may wait or run at once.
        on_batch: called with the number of images of each batch.
    """

    def __init__(
        self,
        *,
        devices: int = 1,
        largest: int = 32,
        delay: float = 0.002,
        room: int = 256,
        on_batch: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.largest, self.delay, self.room, self.on_batch = largest, delay, room, on_batch
        self.held = 0
        """number of images waiting or running"""
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._seconds_an_image = 0.0
        self._threads = [
            threading.Thread(target=self._work, args=(number,), daemon=True)
            for number in range(devices)
        ]
        for thread in self._threads:
            thread.start()

    @contextmanager
    def place(self, images: int) -> Iterator[None]:
        """Reserve room for a request's images until it is answered.

        Raises:
            FullError: there is not enough room.
        """
        with self._changed:
            if self.held + images > self.room:
                raise FullError(self._seconds_an_image * self.held / len(self._threads))
            self.held += images
        try:
            yield
        finally:
            with self._changed:
                self.held -= images

    def submit(self, job: Job) -> "Future[Prediction]":
        """Queue a job, whose room is already reserved; return the future of its answer.

        Raises:
            RetryError: the batcher was closed.
        """
        with self._changed:
            if self._closed:
                raise RetryError("the server is stopping")
            self._jobs.append(job)
            self._changed.notify()
        return job.answer

    def close(self) -> None:
        """Answer the submitted jobs, then end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self, device: int) -> None:
        while batch := self._next_batch():
            # Skip cancelled jobs, since nobody waits for their answer.
            batch = [job for job in batch if job.answer.set_running_or_notify_cancel()]
            if batch:
                began, images = time.monotonic(), sum(len(job.pixels) for job in batch)
                run(batch, device)
                spent = (time.monotonic() - began) / images
                before = self._seconds_an_image or spent
                self._seconds_an_image = SMOOTHING * before + (1 - SMOOTHING) * spent
                self.on_batch(images)

    def _next_batch(self) -> list[Job]:
        """Wait for a batch and remove it from the queue; empty once the batcher is closed."""
        with self._changed:
            while True:
                if not self._jobs and self._closed:
                    return []
                left = self._jobs[0].since + self.delay - time.monotonic() if self._jobs else None
                full = sum(len(job.pixels) for job in self._together()) >= self.largest
                if left is not None and (full or self._closed or left <= 0):
                    return self._take()
                self._changed.wait(left)

    def _take(self) -> list[Job]:
        batch: list[Job] = []
        count = 0
        for job in self._together():
            count += len(job.pixels)
            if batch and count > self.largest:
                break
            batch.append(job)
        taken = set(map(id, batch))
        self._jobs = deque(job for job in self._jobs if id(job) not in taken)
        return batch

    def _together(self) -> list[Job]:
        """Return the waiting jobs with the same file as the oldest job, in order."""
        return [job for job in self._jobs if job.artifacts is self._jobs[0].artifacts]


def run(batch: Sequence[Job], device: int) -> None:
    """Answer the jobs of a batch with one call."""
    artifact = batch[0].artifacts[device]
    tasks = None
    if batch[0].tasks is not None:
        tasks = [task for job in batch for task in job.tasks or ()]
    try:
        prediction = artifact(torch.cat([job.pixels for job in batch]), tasks)
    except Exception as error:
        if len(batch) == 1:
            batch[0].answer.set_exception(error)
            return
        # An error of one request, such as a task just removed, must not fail the others.
        for job in batch:
            run([job], device)
        return
    begin = 0
    for job in batch:
        end = begin + len(job.pixels)
        job.answer.set_result(Prediction(*(part[begin:end] for part in prediction)))
        begin = end
