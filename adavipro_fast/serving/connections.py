"""uvicorn's HTTP connections, closed if request headers do not arrive in time."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0


class ImpatientProtocol(H11Protocol):
    """Closes a connection if the headers of its next request do not arrive in time.

    uvicorn has no time limit for headers; the application limits the time for a body.
    """

    late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the timer for the first request."""
        super().connection_made(transport)
        self.wait()

    def data_received(self, data: bytes) -> None:
        """Run the timer from the first byte of a request to the end of its headers."""
        cycle = self.cycle
        if self.late is None and (cycle is None or cycle.response_complete):
            self.wait()
        super().data_received(data)
        if self.cycle is not cycle:
            self.settle()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self.settle()
        super().connection_lost(exc)

    def wait(self) -> None:
        """Start the timer."""
        self.late = self.loop.call_later(HEADER_SECONDS, self.close)

    def settle(self) -> None:
        """Stop the timer, since the headers have arrived."""
        if self.late is not None:
            self.late.cancel()
            self.late = None

    def close(self) -> None:
        """Close the connection."""
        self.late = None
        self.transport.close()
