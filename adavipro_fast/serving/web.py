"""The web application: routes, error handlers and middleware."""

import asyncio
import logging
import math
import warnings
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from adavipro_fast.serving.application import VERSION, Application, Limits, Metrics
from adavipro_fast.serving.batcher import Batcher, FullError
from adavipro_fast.serving.classify import add_classify
from adavipro_fast.serving.middleware import Counted, Guarded, Headed
from adavipro_fast.serving.served import Served
from adavipro_fast.serving.tensors import add_kserve
from adavipro_fast.serving.uploads import clean
from adavipro_fast.serving.view import Page, add_page


def create(
    served: Sequence[Served],
    batcher: Batcher,
    *,
    limits: Limits | None = None,
    token: str | None = None,
    refresh_seconds: float = 1.0,
    metrics: Metrics | None = None,
    origins: Sequence[str] = (),
    page: Page | None = None,
    hosts: Sequence[str] = (),
) -> FastAPI:
    """Create the web application.

    Args:
        served: the files; `/classify` uses the first by default.
        batcher: runs them; closed when the application ends.
        limits: of a request.
        token: bearer token that clients must send, if any.
        refresh_seconds: interval for checking files for changes.
        metrics: shared with the batcher.
        origins: origins that may send requests from a browser (CORS).
        page: settings of the page.
        hosts: host names that requests may use (default: all).
    """
    own = Application(served, batcher, limits or Limits(), metrics or Metrics())
    # Logging every malformed form would let clients fill the log.
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
    add_page(web, own, page or Page())
    web.add_middleware(Counted, metrics=own.metrics)
    web.add_middleware(Guarded, token=token)
    web.add_middleware(Headed)
    if hosts:
        web.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    if origins:
        # Added last, so it runs before the token check: preflight requests carry no token.
        web.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
        )
    return web


def add_errors(web: FastAPI) -> None:
    """Answer every error with a JSON object that contains one line."""

    @web.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": clean(str(error.detail))}, error.status_code, error.headers)

    @web.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        return JSONResponse({"error": clean(f"{field}: {first['msg']}")}, 400)

    @web.exception_handler(FullError)
    async def full(_: Request, error: FullError) -> JSONResponse:
        return too_busy(error)

    @web.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=400)


def too_busy(error: FullError) -> JSONResponse:
    """Answer 503 with Retry-After."""
    after = str(max(1, math.ceil(error.seconds)))
    return JSONResponse({"error": str(error)}, 503, {"Retry-After": after})


def add_health(web: FastAPI, own: Application) -> None:
    """Add the routes for health and metrics."""

    @web.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        """Report that the server is live."""
        return {"live": True}

    @web.get("/v2/health/ready")
    async def ready() -> dict[str, bool]:
        """Report that all models are ready."""
        return {"ready": True}

    @web.get("/metrics")
    async def metrics() -> Response:
        """Return the metrics in Prometheus's format."""
        return Response(generate_latest(own.metrics.registry), media_type="text/plain")
