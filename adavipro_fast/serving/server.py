"""The server: the web application run by uvicorn on a listening socket."""

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adavipro_fast.serving.address import MOST_CONNECTIONS, leave_signals_to_uvicorn, url
from adavipro_fast.serving.served import Served

INSTALL = "serving needs more packages: pip install 'adavipro_fast[serve]'"
LONGEST_STOP_S = 60


@dataclass(frozen=True)
class Server:
    """A server that is already listening; `run` answers requests."""

    uvicorn: Any
    listening: socket.socket
    served: Sequence[Served]
    batcher: Any
    metrics: Any

    @property
    def address(self) -> str:
        """The URL that it listens on."""
        return url(self.listening)

    def run(self) -> None:
        """Answer requests until uvicorn is stopped."""
        asyncio.run(self.uvicorn.serve(sockets=[self.listening]))

    def run_until_signal(self) -> None:
        """Answer requests until SIGINT or SIGTERM."""
        leave_signals_to_uvicorn()
        self.run()


def server(
    listening: socket.socket,
    served: Sequence[Served],
    *,
    devices: int = 1,
    batch: int = 32,
    delay_ms: float = 0.0,
    room: int = 256,
    longest_stop_s: int = LONGEST_STOP_S,
    **settings: Any,
) -> Server:
    """Build the batcher and the web application for a socket.

    Args:
        listening: the socket.
        served: the files.
        devices: number of devices that run batches.
        batch: largest number of images in a batch.
        delay_ms: longest wait for other requests while a device is idle.
        room: number of images that may wait or run at once.
        longest_stop_s: time for running requests to finish when the server is stopped.
        settings: arguments of `web.create`.
    """
    import uvicorn

    from adavipro_fast.serving import web
    from adavipro_fast.serving.application import Metrics
    from adavipro_fast.serving.batcher import Batcher
    from adavipro_fast.serving.connections import ImpatientProtocol

    metrics = Metrics()
    batcher = Batcher(
        devices=devices,
        largest=batch,
        delay=delay_ms / 1e3,
        room=room,
        on_batch=metrics.batches.observe,
    )
    configuration = uvicorn.Config(
        web.create(served, batcher, metrics=metrics, **settings),
        http=ImpatientProtocol,
        ws="none",
        log_config=None,
        # Errors of clients are reported to the clients, not on the terminal.
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=longest_stop_s,
    )
    return Server(uvicorn.Server(configuration), listening, served, batcher, metrics)


def check_installed() -> None:
    """Raise ImportError unless the extra is installed; the message has the pip command."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{INSTALL} ({error})") from error
