"""Where a server listens, whether others can reach it, and how it is stopped."""

import ipaddress
import signal
import socket

MOST_CONNECTIONS = 1024


def is_loopback(host: str) -> bool:
    """Tell whether an address is of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Take an address, before files are opened.

    Raises:
        OSError: it is taken, or not of this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=MOST_CONNECTIONS)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error}; choose another --port") from error


def leave_signals_to_uvicorn() -> None:
    """Let uvicorn stop at signals: it answers what it took, and raises them again, to nobody."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)


def url(listening: socket.socket) -> str:
    """Return what a browser calls the address."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
