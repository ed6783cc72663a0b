"""Middleware: the bearer token, HEAD requests, and metrics."""

import hmac
import time
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from adavipro_fast.serving.application import Metrics

OPEN_TO_ALL = ("/v2/health/live", "/v2/health/ready")


class Guarded:
    """Rejects requests without the bearer token."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app = app
        self.expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or reject it."""
        if scope["type"] == "http" and self.expected and not open_to_all(scope):
            shown = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(shown, self.expected):
                refusal = JSONResponse(
                    {
                        "error": "missing or wrong token; send the header Authorization: "
                        "Bearer TOKEN"
                    },
                    401,
                    {"WWW-Authenticate": "Bearer"},
                )
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)


def open_to_all(scope: Scope) -> bool:
    """Report whether a request needs no token: health, and the page, which then sends the token."""
    page = scope["path"] == "/" and scope["method"] in ("GET", "HEAD")
    return page or scope["path"] in OPEN_TO_ALL


class Headed:
    """Answers HEAD like GET, without the body."""

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
    """Counts requests and their time by route and status code."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and record its status and time."""
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
            # Label by route: clients could create any number of paths.
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.answered += 1
            self.metrics.requests.labels(route, code).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - began)
