"""The web application: KServe v2, `POST /classify`, metrics; who may ask, and how much.

A model `m` takes pixels and gives the graph's outputs; `m_classify` takes image files and gives
class names and probabilities.
"""

import asyncio
import hmac
import logging
import math
import time
import warnings
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send
from torch import Tensor

from adavipro_fast.artifact.answers import SHOWN_CLASSES, answers_of_tasks
from adavipro_fast.artifact.description import Description, NotRunnableError
from adavipro_fast.cores import threads
from adavipro_fast.data.images import decode_image
from adavipro_fast.method.model import Prediction
from adavipro_fast.serving import kserve
from adavipro_fast.serving.batcher import Batcher, FullError, Job, StoppingError
from adavipro_fast.serving.kserve import TensorSpec
from adavipro_fast.serving.served import CLASSIFY, Generation, Served
from adavipro_fast.serving.uploads import clean, uploaded

VERSION = installed("adavipro_fast")
OPEN_TO_ALL = ("/v2/health/live", "/v2/health/ready")
FILES = {
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "image": {"type": "array", "items": {"type": "string", "format": "binary"}}
                },
            }
        },
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "images": {"type": "array", "items": {"type": "string", "format": "byte"}}
                },
            }
        },
    }
}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    body_bytes: int = 16_000_000
    image_pixels: int = 50_000_000
    """before it is resized"""
    images: int = 64
    """in a request"""
    seconds: float = 30.0
    """for its body to arrive"""


class Metrics:
    """Counters for Prometheus, of one server."""

    def __init__(self) -> None:
        self.answered = 0
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
        self.held = Gauge("adavipro_images_held", "images that wait or run", registry=self.registry)


class Application:
    """What the routes share.

    Args:
        served: files by their names, the first one first.
        batcher: runs them.
        limits: of a request.
        metrics: are counted.
    """

    def __init__(
        self, served: Sequence[Served], batcher: Batcher, limits: Limits, metrics: Metrics
    ) -> None:
        self.served = {each.name: each for each in served}
        self.batcher, self.limits, self.metrics = batcher, limits, metrics
        metrics.held.set_function(lambda: batcher.held)
        # Decoding leaves Python's lock alone.
        self.decoders = ThreadPoolExecutor(threads())

    def named(self, name: str, version: str | None = None) -> tuple[Generation, bool]:
        """Find a model: its file as it is now, and whether it takes image files.

        Raises:
            HTTPException: there is none.
        """
        files = name not in self.served and name.endswith(CLASSIFY)
        served = self.served.get(name.removesuffix(CLASSIFY) if files else name)
        if served is None or version not in (None, str(served.now.version)):
            raise HTTPException(404, f"no model {name!r} of version {version or 'any'} is served")
        return served.now, files

    async def read(self, request: Request) -> bytes:
        """Read a request's body.

        Raises:
            HTTPException: too large, or too slow.
        """
        most, parts, size = self.limits.body_bytes, [], 0
        if "content-encoding" in request.headers:
            raise HTTPException(415, "bodies are taken as they are, not compressed")
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise HTTPException(413, f"a request may have {most} bytes")
                    parts.append(part)
        except TimeoutError:
            raise HTTPException(408, f"the body took over {self.limits.seconds:g} s") from None
        return b"".join(parts)

    async def decoded(self, files: Sequence[tuple[str, bytes]], about: Description) -> Tensor:
        """Decode image files: (B, 3, S, S) uint8.

        Raises:
            HTTPException: one is not an image that can be read.
        """
        each = await self.decode_each(files, about)
        for error in each:
            if isinstance(error, ValueError):
                raise HTTPException(400, str(error)) from None
        return torch.from_numpy(np.stack(each))

    async def decode_each(
        self, files: Sequence[tuple[str, bytes | ValueError]], about: Description
    ) -> list[Any]:
        """Decode image files: for each (3, S, S) uint8, or the ValueError that says why not."""
        transform, most = about.preprocess.pixels(), self.limits.image_pixels

        def decode(name: str, content: bytes | ValueError) -> np.ndarray[Any, np.dtype[np.uint8]]:
            if isinstance(content, ValueError):
                raise content
            return transform(decode_image(content, repr(name), about.preprocess, most))

        loop = asyncio.get_running_loop()
        work = [loop.run_in_executor(self.decoders, decode, *file) for file in files]
        found = await asyncio.gather(*work, return_exceptions=True)
        for error in found:
            if isinstance(error, BaseException) and not isinstance(error, ValueError):
                raise error
        return found

    async def run(
        self, generation: Generation, pixels: Tensor, tasks: Sequence[str] | None
    ) -> Prediction:
        """Classify pixels, in a batch with those of other requests.

        Raises:
            HTTPException: no task is named, or one that is not there.
        """
        try:
            before = tasks_of(generation.about, tasks)
            generation.about.numbers(tasks, len(pixels))
            answer = self.batcher.submit(Job(generation.artifacts, pixels, tasks))
            prediction = await asyncio.wrap_future(answer)
            if before != tasks_of(generation.about, tasks):
                raise StoppingError("a task was replaced meanwhile; ask again")
            return prediction
        except NotRunnableError as error:
            raise HTTPException(500, str(error)) from None
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        except StoppingError as error:
            raise HTTPException(503, str(error), {"Retry-After": "1"}) from None

    def check_images(self, count: int) -> None:
        """Raise HTTPException unless a request may have so many images."""
        if not 1 <= count <= self.limits.images:
            raise HTTPException(
                400 if count == 0 else 413,
                f"a request has 1 to {self.limits.images} images, not {count}",
            )


def tasks_of(about: Description, tasks: Sequence[str] | None) -> dict[str, Description]:
    """Describe each task that a request names, once: finding one goes through all of the file's.

    Raises:
        ValueError: one is not there.
    """
    return {task: about.of_task(task) for task in dict.fromkeys(tasks or ())}


def takes(about: Description, files: bool) -> list[TensorSpec]:
    """List a model's inputs."""
    side = about.preprocess.size
    image = TensorSpec("image", "UINT8", (-1, 3, side, side))
    first = TensorSpec("encoded", "BYTES", (-1,)) if files else image
    several = bool(about.tasks) or about.open_for is not None
    return [first, *([TensorSpec("task", "BYTES", (-1,))] if several else [])]


def gives(about: Description, files: bool) -> list[TensorSpec]:
    """List a model's outputs."""
    if files:
        return [TensorSpec("class", "BYTES", (-1,)), TensorSpec("probability", "FP32", (-1,))]
    grid = about.preprocess.size // about.config.region_size
    classes = -1 if about.open_for is not None else about.most_classes
    return [
        TensorSpec("logits", "FP32", (-1, classes)),
        TensorSpec("mask", "INT32", (-1, grid, grid)),
        TensorSpec("embedding", "FP32", (-1, -1)),
    ]


def create(
    served: Sequence[Served],
    batcher: Batcher,
    *,
    limits: Limits | None = None,
    token: str | None = None,
    refresh_seconds: float = 1.0,
    metrics: Metrics | None = None,
    origins: Sequence[str] = (),
) -> FastAPI:
    """Make the web application.

    Args:
        served: files by their names; `/classify` takes the first unless told otherwise.
        batcher: runs them; closed when the application ends.
        limits: of a request.
        token: that a client must show, if any.
        refresh_seconds: how often files are looked at for changes.
        metrics: that the batcher counts too.
        origins: of pages in browsers that may ask.
    """
    own = Application(served, batcher, limits or Limits(), metrics or Metrics())
    # A line for every broken form, which the client is told of, would be the client's to fill.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        async def refresh() -> None:
            while True:
                await asyncio.sleep(refresh_seconds)
                for each in served:
                    await asyncio.to_thread(each.refresh)

        task = asyncio.create_task(refresh())
        yield
        task.cancel()
        await asyncio.to_thread(batcher.close)
        own.decoders.shutdown()

    web = FastAPI(
        title="adavipro_fast",
        version=VERSION,
        description="Classify images with adaptive visual prompts.",
        lifespan=life,
    )
    add_errors(web)
    add_health(web, own)
    add_kserve(web, own)
    add_classify(web, own)
    web.add_middleware(Counted, metrics=own.metrics)
    web.add_middleware(Guarded, token=token)
    web.add_middleware(Headed)
    if origins:
        # Outside of the token: a browser asks without it first.
        web.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
        )
    return web


def add_errors(web: FastAPI) -> None:
    """Answer every error by one JSON object with one line."""

    @web.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> JSONResponse:
        return JSONResponse({"error": clean(str(error.detail))}, error.status_code, error.headers)

    @web.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return JSONResponse({"error": clean(f"{place}: {first['msg']}")}, 400)

    @web.exception_handler(FullError)
    async def full(_: Request, error: FullError) -> JSONResponse:
        return too_busy(error)

    @web.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=400)


def too_busy(error: FullError) -> JSONResponse:
    """Send a client away for now."""
    after = str(max(1, math.ceil(error.seconds)))
    return JSONResponse({"error": str(error)}, 503, {"Retry-After": after})


def add_health(web: FastAPI, own: Application) -> None:
    """Add what tells whether the server lives, and how it does."""

    @web.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        """Say that the server lives."""
        return {"live": True}

    @web.get("/v2/health/ready")
    async def ready() -> dict[str, bool]:
        """Say that all models can be asked."""
        return {"ready": True}

    @web.get("/metrics")
    async def metrics() -> Response:
        """Report counters in Prometheus's format."""
        return Response(generate_latest(own.metrics.registry), media_type="text/plain")


def add_kserve(web: FastAPI, own: Application) -> None:
    """Add the Open Inference Protocol."""

    @web.get("/v2")
    async def server() -> dict[str, Any]:
        """Describe the server."""
        return {
            "name": "adavipro_fast",
            "version": VERSION,
            "extensions": ["binary_tensor_data"],
        }

    @web.post("/v2/repository/index")
    async def index() -> list[dict[str, str]]:
        """List the models."""
        return [
            {"name": name + kind, "version": str(each.now.version), "state": "READY"}
            for name, each in own.served.items()
            for kind in ("", CLASSIFY)
        ]

    @web.get("/v2/models/{model}/ready")
    @web.get("/v2/models/{model}/versions/{version}/ready")
    async def model_ready(model: str, version: str | None = None) -> dict[str, Any]:
        """Say that a model can be asked."""
        own.named(model, version)
        return {"name": model, "ready": True}

    @web.get("/v2/models/{model}")
    @web.get("/v2/models/{model}/versions/{version}")
    async def described(model: str, version: str | None = None) -> dict[str, Any]:
        """Describe a model's tensors."""
        now, files = own.named(model, version)
        tensors = takes(now.about, files), gives(now.about, files)
        return kserve.metadata(model, str(now.version), *tensors)

    @web.post("/v2/models/{model}/infer")
    @web.post("/v2/models/{model}/versions/{version}/infer")
    async def infer(request: Request, model: str, version: str | None = None) -> Response:
        """Run a model on tensors, in JSON or as bytes behind it."""
        now, files = own.named(model, version)
        with own.batcher.place(1):
            body = await own.read(request)
            length, inputs = request.headers.get(kserve.HEADER), takes(now.about, files)
            try:
                # Off the event loop: a large body takes long.
                asked = await asyncio.to_thread(kserve.parse, body, length, inputs)
            except ValueError as error:
                raise HTTPException(400, str(error)) from None
            first = inputs[0].name
            if first not in asked.inputs:
                raise HTTPException(400, f"input {first!r} is missing")
            count = len(asked.inputs[first])
            own.check_images(count)
            with own.batcher.place(count - 1):
                results = await outputs(own, now, asked, files)
            try:
                written = await asyncio.to_thread(
                    kserve.respond, asked, model, str(now.version), results
                )
            except ValueError as error:
                raise HTTPException(400, str(error)) from None
        return Response(*written[:1], headers=written[1])


async def outputs(
    own: Application, now: Generation, asked: kserve.Request, files: bool
) -> dict[str, kserve.Array]:
    """Run what a KServe request asks for."""
    tasks = None
    if "task" in asked.inputs:
        tasks = [name.decode(errors="replace") for name in asked.inputs["task"]]
    if not files:
        pixels = torch.from_numpy(asked.inputs["image"].copy())
        prediction = await own.run(now, pixels, tasks)
        logits = prediction.logits
        if now.about.open_for is not None:
            # As wide as this request's tasks, whatever others rode in the batch.
            logits = logits[:, : max(len(each.class_names) for each in named_tasks(now, tasks))]
        return {
            "logits": logits.numpy(),
            "mask": prediction.mask.int().numpy(),
            "embedding": prediction.embedding.numpy(),
        }
    contents = [(str(number), each) for number, each in enumerate(asked.inputs["encoded"])]
    pixels = await own.decoded(contents, now.about)
    found = await classified(own, now, pixels, tasks, None, 1)
    return {
        "class": kserve.strings([each["answer"].encode() for each in found], [len(found)]),
        "probability": np.array(
            [each["classes"][0]["probability"] for each in found], dtype=np.float32
        ),
    }


def named_tasks(now: Generation, tasks: Sequence[str] | None) -> list[Description]:
    """Describe the task of each image.

    Raises:
        HTTPException: one is not there.
    """
    try:
        known = tasks_of(now.about, tasks)
    except ValueError as error:
        raise HTTPException(400, str(error)) from None
    return [known[task] for task in tasks or ()]


async def classified(
    own: Application,
    now: Generation,
    pixels: Tensor,
    tasks: Sequence[str] | None,
    reject: float | None,
    shown: int,
) -> list[dict[str, Any]]:
    """Classify pixels and say it in words."""
    prediction = await own.run(now, pixels, tasks)
    return answers_of_tasks(now.about, prediction, tasks, reject, shown)


def add_classify(web: FastAPI, own: Application) -> None:
    """Add the route for people."""

    @web.post("/classify", openapi_extra={"requestBody": FILES})
    async def classify(
        request: Request,
        model: str | None = None,
        task: str | None = None,
        top: int | None = None,
        reject: float | None = None,
    ) -> dict[str, Any]:
        """Classify an image file sent as the body, or several as a form or as base64 in JSON.

        `model`: one of several files; `task`: one of a file's tasks; `top`: how many classes to
        list (5); `reject`: share of known images that may be answered `unknown`. A form or JSON may
        hold the same options. An image that cannot be read has an `error` in its place.
        """
        asked = {"model": model, "task": task, "top": top, "reject": reject}
        with own.batcher.place(1):
            body = await own.read(request)
            try:
                upload = await uploaded(body, request.headers, own.limits.images)
                options = chosen(asked, upload.options)
            except ValueError as error:
                raise HTTPException(400, str(error)) from None
            own.check_images(len(upload.files))
            with own.batcher.place(len(upload.files) - 1):
                return {"predictions": await answered(own, upload.files, options)}


def whole_number(text: str) -> int:
    """Read a number such as 2 or 2.0."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


def chosen(asked: dict[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """Take options from the address, and from a form's or JSON's fields where it has none.

    Raises:
        ValueError: one cannot be used.
    """
    kinds: dict[str, Callable[[str], Any]] = {
        "model": str,
        "task": str,
        "top": whole_number,
        "reject": float,
    }
    options = dict(asked)
    for name, text in fields.items():
        if options[name] is None and text:
            try:
                options[name] = kinds[name](text)
            except ValueError:
                raise ValueError(f"{name} is {text!r}; a number is needed") from None
    options["top"] = SHOWN_CLASSES if options["top"] is None else options["top"]
    if options["top"] < 1:
        raise ValueError(f"top is {options['top']}; 1 or more is needed")
    return options


async def answered(
    own: Application, files: Sequence[tuple[str, bytes | ValueError]], options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Answer each image file, one that cannot be read by its error.

    Raises:
        HTTPException: not one can be read, or an option cannot be used.
    """
    now, _ = own.named(options["model"] or next(iter(own.served)))
    each = await own.decode_each(files, now.about)
    read = [pixels for pixels in each if not isinstance(pixels, ValueError)]
    if not read:
        raise HTTPException(400, str(each[0]))
    tasks = None if options["task"] is None else [options["task"]] * len(read)
    pixels = torch.from_numpy(np.stack(read))
    try:
        found = iter(await classified(own, now, pixels, tasks, options["reject"], options["top"]))
    except ValueError as error:
        raise HTTPException(400, str(error)) from None
    predictions = []
    for (name, _), one in zip(files, each, strict=True):
        failed = isinstance(one, ValueError)
        predictions.append({"file": name} | ({"error": clean(str(one))} if failed else next(found)))
    return predictions


class Guarded:
    """Middleware: shows the door to who has no token."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app = app
        self.expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] == "http" and scope["path"] not in OPEN_TO_ALL and self.expected:
            shown = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(shown, self.expected):
                refusal = JSONResponse(
                    {"error": "show the server's token: Authorization: Bearer TOKEN"},
                    401,
                    {"WWW-Authenticate": "Bearer"},
                )
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Headed:
    """Middleware: answers HEAD as GET, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def without_body(message: Any) -> None:
            if message["type"] == "http.response.body":
                message = message | {"body": b""}
            await send(message)

        await self.app(dict(scope) | {"method": "GET"}, receive, without_body)


class Counted:
    """Middleware: counts requests and their time, by route and code."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and look at its answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, code = time.perf_counter(), 500

        async def watched(message: Any) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            # Paths come from anyone; routes are few.
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.answered += 1
            self.metrics.requests.labels(route, code).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - began)
