"""State and steps that the routes share: files, limits, metrics, decoding, classification."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version as installed
from typing import Any

import numpy as np
import torch
from fastapi import HTTPException, Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from torch import Tensor

from adavipro_fast.artifact.answers import answers_of_tasks
from adavipro_fast.artifact.artifact import NotRunnableError
from adavipro_fast.cores import threads
from adavipro_fast.data.images import decode
from adavipro_fast.files.about import Description
from adavipro_fast.method.model import Prediction
from adavipro_fast.serving.batcher import Batcher, Job, RetryError
from adavipro_fast.serving.served import CLASSIFY, Generation, Served

VERSION = installed("adavipro_fast")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Limits:
    """Limits of a request."""

    body_bytes: int = 16_000_000
    image_pixels: int = 50_000_000
    """of an image before it is resized"""
    images: int = 64
    """per request"""
    seconds: float = 30.0
    """time for the body to arrive"""


class Metrics:
    """A server's Prometheus metrics."""

    def __init__(self) -> None:
        self.answered = 0
        self.pictures = 0
        """number of pictures classified by the page"""
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "adavipro_requests", "requests", ("route", "code"), registry=self.registry
        )
        self.seconds = Histogram(
            "adavipro_request_seconds", "time to answer", ("route",), registry=self.registry
        )
        self.batches = Histogram(
            "adavipro_batch_images", "images in a batch", buckets=BATCHES, registry=self.registry
        )
        self.threads = Gauge(
            "adavipro_threads", "threads of runtimes and decoders", registry=self.registry
        )
        self.threads.set(threads())
        self.held = Gauge(
            "adavipro_images_held", "images waiting or running", registry=self.registry
        )


class Application:
    """State that the routes share.

    Args:
        served: the files; the first is the default.
        batcher: runs them.
        limits: of a request.
        metrics: updated by the routes.
    """

    def __init__(
        self, served: Sequence[Served], batcher: Batcher, limits: Limits, metrics: Metrics
    ) -> None:
        self.served = {each.name: each for each in served}
        self.batcher, self.limits, self.metrics = batcher, limits, metrics
        metrics.held.set_function(lambda: batcher.held)
        # Threads are enough, since decoding releases the GIL.
        self.decoders = ThreadPoolExecutor(threads())

    def named(self, name: str, version: str | None = None) -> tuple[Generation, bool]:
        """Return a model's current generation, and whether the model accepts image files.

        Raises:
            HTTPException: there is no such model or version.
        """
        files = name not in self.served and name.endswith(CLASSIFY)
        served = self.served.get(name.removesuffix(CLASSIFY) if files else name)
        if served is None or version not in (None, str(served.now.version)):
            raise HTTPException(404, f"model {name!r}, version {version or 'any'}, is not served")
        return served.now, files

    async def read(self, request: Request) -> bytes:
        """Read a request's body.

        Raises:
            HTTPException: the body is too large, too slow or compressed.
        """
        most, parts, size = self.limits.body_bytes, [], 0
        if "content-encoding" in request.headers:
            raise HTTPException(415, "compressed request bodies are not supported")
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise HTTPException(413, f"the request body is larger than {most} bytes")
                    parts.append(part)
        except TimeoutError:
            raise HTTPException(
                408, f"the request body took more than {self.limits.seconds:g} s to arrive"
            ) from None
        return b"".join(parts)

    async def decoded(self, files: Sequence[tuple[str, bytes]], about: Description) -> Tensor:
        """Decode image files to (B, 3, S, S) uint8.

        Raises:
            HTTPException: a file is not a readable image.
        """
        each = await self.decode_each(files, about)
        for error in each:
            if isinstance(error, ValueError):
                raise HTTPException(400, str(error)) from None
        return torch.from_numpy(np.stack(each))

    async def decode_each(
        self, files: Sequence[tuple[str, bytes | ValueError]], about: Description
    ) -> list[Any]:
        """Decode each image file to (3, S, S) uint8, or return a ValueError in its place."""
        transform, most = about.preprocess.pixels(), self.limits.image_pixels

        def prepare(name: str, content: bytes | ValueError) -> np.ndarray[Any, np.dtype[np.uint8]]:
            if isinstance(content, ValueError):
                raise content
            return transform(decode(content, repr(name), about.preprocess, most))

        loop = asyncio.get_running_loop()
        work = [loop.run_in_executor(self.decoders, prepare, *file) for file in files]
        results = await asyncio.gather(*work, return_exceptions=True)
        for error in results:
            if isinstance(error, BaseException) and not isinstance(error, ValueError):
                raise error
        return results

    async def run(
        self, generation: Generation, pixels: Tensor, tasks: Sequence[str] | None
    ) -> Prediction:
        """Classify pixels in a batch with other requests.

        Raises:
            HTTPException: a task is missing or unknown, the file cannot run, or the server is
                stopping.
        """
        try:
            before = tasks_of(generation.about, tasks)
            generation.about.numbers(tasks, len(pixels))
            answer = self.batcher.submit(Job(generation.artifacts, pixels, tasks))
            prediction = await asyncio.wrap_future(answer)
            if before != tasks_of(generation.about, tasks):
                raise RetryError("a task was replaced during the request; try again")
            if generation.about.open_for is None:
                return prediction
            # The batch's logits have the classes of its largest task; keep this request's classes.
            widest = max(len(task.class_names) for task in before.values())
            return prediction._replace(logits=prediction.logits[:, :widest])
        except NotRunnableError as error:
            raise HTTPException(500, str(error)) from None
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        except RetryError as error:
            raise HTTPException(503, str(error), {"Retry-After": "1"}) from None

    def check_images(self, count: int) -> None:
        """Raise HTTPException unless the number of images is within the limit."""
        if not 1 <= count <= self.limits.images:
            raise HTTPException(
                400 if count == 0 else 413,
                f"the request has {count} images; send 1 to {self.limits.images}",
            )


def tasks_of(about: Description, tasks: Sequence[str] | None) -> dict[str, Description]:
    """Describe each task that a request names, once each, since a look-up scans all tasks.

    Raises:
        ValueError: a task is unknown.
    """
    return {task: about.of_task(task) for task in dict.fromkeys(tasks or ())}


async def classified(
    own: Application,
    now: Generation,
    pixels: Tensor,
    tasks: Sequence[str] | None,
    reject: float | None,
    shown: int,
) -> list[dict[str, Any]]:
    """Classify pixels and return answers with class names."""
    prediction = await own.run(now, pixels, tasks)
    return answers_of_tasks(now.about, prediction, tasks, reject, shown)
