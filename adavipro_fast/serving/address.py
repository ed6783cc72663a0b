"""A server's address, whether other machines can reach it, and its signals."""

import ipaddress
import signal
import socket

MOST_CONNECTIONS = 1024


def is_loopback(host: str) -> bool:
    """Report whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Bind and listen on an address.

    Raises:
        OSError: the address is in use or does not belong to this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=MOST_CONNECTIONS)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error}; choose another --port") from error


def leave_signals_to_uvicorn() -> None:
    """Ignore SIGINT and SIGTERM outside uvicorn, which stops gracefully and re-raises them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)


def url(listening: socket.socket) -> str:
    """Return the address as a URL."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
