"""uvicorn's HTTP connections, with an end to those that do not come to the point."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0


class ImpatientProtocol(H11Protocol):
    """Closes a connection whose next request has not shown its headers in time.

    uvicorn waits for them without end; a body has the application's own limit.
    """

    late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start to wait for the first request."""
        super().connection_made(transport)
        self.wait()

    def data_received(self, data: bytes) -> None:
        """Wait for a request's headers from its first byte to its last."""
        cycle = self.cycle
        if self.late is None and (cycle is None or cycle.response_complete):
            self.wait()
        super().data_received(data)
        if self.cycle is not cycle:
            self.settle()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self.settle()
        super().connection_lost(exc)

    def wait(self) -> None:
        """Give the headers some time."""
        self.late = self.loop.call_later(HEADER_SECONDS, self.close)

    def settle(self) -> None:
        """The headers came."""
        if self.late is not None:
            self.late.cancel()
            self.late = None

    def close(self) -> None:
        """End the connection."""
        self.late = None
        self.transport.close()
