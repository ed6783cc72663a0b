"""Run NVIDIA's tritonserver on this machine's own address for as long as a test needs it."""

import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
START_S, STOP_S = 120, 15
# The server waits this long for clients that keep a connection open.
CLIENTS_S = 3
# Behind an error come tables of models and options.
TAIL_LINES = 100


@dataclass(frozen=True)
class Ports:
    """Where a server listens."""

    http: int
    grpc: int
    metrics: int


@contextmanager
def running(home: Path, repository: Path, *, poll: bool) -> Iterator[Ports]:
    """Serve a model repository until the block ends.

    Args:
        home: what setup.sh made.
        repository: folder of models.
        poll: whether models and versions may come and go.

    Raises:
        RuntimeError: it did not start, or ended by itself; with the end of its log.
        ValueError: a folder's name holds a space.
    """
    for folder in (home.resolve(), repository.resolve()):
        # The server starts its models by a line that it does not quote, and then waits for ever.
        if " " in str(folder):
            raise ValueError(f"{folder} holds a space; name another folder")
    ports, memory = free_ports(), f"tritonserver_{uuid.uuid4().hex}"
    with tempfile.NamedTemporaryFile(prefix="tritonserver", suffix=".log") as log:
        server = subprocess.Popen(
            [*command(home, repository, ports, poll=poll), *sharing(memory)],
            env=environment(home),
            stdout=log,
            stderr=subprocess.STDOUT,
            # Its models are processes of their own, which end with their group.
            start_new_session=True,
        )
        try:
            wait_until_ready(server, ports, Path(log.name))
            yield ports
            if server.poll() is not None:
                raise RuntimeError(f"tritonserver ended by itself{tail(Path(log.name))}")
        finally:
            stop(server, memory)


def command(home: Path, repository: Path, ports: Ports, *, poll: bool) -> list[str]:
    """Return the server's command line."""
    program = home.resolve() / "pytriton" / "tritonserver"
    polling = ["--model-control-mode=poll", "--repository-poll-secs=1"] if poll else []
    return [
        str(program / "bin" / "tritonserver"),
        f"--model-repository={repository.resolve()}",
        f"--backend-directory={program / 'backends'}",
        f"--cache-directory={program / 'caches'}",
        *(f"--{kind}-address={HOST}" for kind in ("http", "grpc", "metrics")),
        f"--http-port={ports.http}",
        f"--grpc-port={ports.grpc}",
        f"--metrics-port={ports.metrics}",
        "--allow-gpu-metrics=false",
        f"--exit-timeout-secs={CLIENTS_S}",
        *polling,
    ]


def sharing(memory: str) -> list[str]:
    """Return options that name the memory which the server shares with its models."""
    backends = ("python", "onnxruntime")
    return [f"--backend-config={each},shm-region-prefix-name={memory}" for each in backends]


def environment(home: Path) -> dict[str, str]:
    """Return the environment: models run in the first `python3` of PATH, by its libpython."""
    home = home.resolve()
    return os.environ | {
        "PATH": f"{home / 'venv' / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(home / "lib"),
    }


def free_ports() -> Ports:
    """Return three ports that nothing listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(3)]
        return Ports(*(each.getsockname()[1] for each in sockets))


def wait_until_ready(server: "subprocess.Popen[bytes]", ports: Ports, log: Path) -> None:
    """Return once all models can be asked.

    Raises:
        RuntimeError: the server ended, or takes too long.
    """
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if server.poll() is not None:
            raise RuntimeError(f"tritonserver ended with {server.returncode}{tail(log)}")
        try:
            with urllib.request.urlopen(f"http://{HOST}:{ports.http}/v2/health/ready", timeout=5):
                return
        # A server that is not ready answers 400, one that does not listen yet refuses.
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"tritonserver was not ready within {START_S} s{tail(log)}")


def stop(server: "subprocess.Popen[bytes]", memory: str) -> None:
    """End a server and the processes of its models, which outlive one that crashed."""
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    for left in Path("/dev/shm").glob(f"{memory}*"):
        left.unlink(missing_ok=True)


def tail(log: Path) -> str:
    """Return the end of a log, for a message."""
    return "\n".join(["", *log.read_text(errors="replace").splitlines()[-TAIL_LINES:]])
