"""Serve files over HTTP: `python -m adavipro_fast.serve ARTIFACT...`.

    curl -F image=@photo.jpg http://127.0.0.1:8000/classify

A browser shows a page to drop pictures on. The server also has the KServe v2 protocol
(`tritonclient` works), an OpenAPI page at /docs and metrics at /metrics.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from adavipro_fast import cli
from adavipro_fast.cores import threads
from adavipro_fast.errors import counted, printable
from adavipro_fast.files.hub import on_disk, run_name
from adavipro_fast.method.config import Precision
from adavipro_fast.serving.address import is_loopback, listen
from adavipro_fast.serving.served import CLASSIFY, Served
from adavipro_fast.serving.server import Server, check_installed, server


@dataclass(frozen=True)
class ServeConfig:
    """Serve checkpoints or exported files over HTTP, with dynamic batching."""

    help_first: ClassVar[tuple[str, ...]] = (
        "host",
        "port",
        "token_file",
        "tasks_folder",
        "batch",
        "delay_ms",
        "queue",
        "device",
        "threads",
    )

    artifact: Annotated[tuple[str, ...], tyro.conf.Positional]
    """checkpoint.safetensors, .onnx or .engine; NAME=PATH sets the model's name in URLs"""
    host: str = "127.0.0.1"
    """address to listen on; addresses reachable from other machines need --token-file"""
    port: int = 8000
    """port to listen on; 0 chooses a free one"""
    token_file: Path | None = None
    """file with the bearer token that clients must send"""
    allow_origin: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """origin that may send requests from a browser (CORS), such as https://example.org;
    repeatable (* allows all)"""
    tasks_folder: Path | None = None
    """folder of .task files for a file exported with --tasks open; they may change at any time"""
    batch: int = 32
    """largest batch, images"""
    delay_ms: float = 2.0
    """longest time to wait for more requests while a device is idle"""
    queue: int = 256
    """images that may wait or run at once; further requests get 503 with Retry-After"""
    images: int = 64
    """largest number of images per request"""
    body_mb: float = 16.0
    """largest request, 10^6 bytes"""
    image_megapixels: float = 50.0
    """largest image"""
    seconds: float = 30.0
    """longest time for a request to arrive"""
    device: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """device to run on; repeatable, each device runs its own batches (default: auto)"""
    runtime: cli.Runtime = "auto"
    decode: cli.Decode = None
    threads: cli.Threads = None
    model: cli.Model = None
    pretrained: cli.Pretrained = None
    precision: Precision = "fp32"
    """precision of a checkpoint's encoder"""

    def __post_init__(self) -> None:
        for name in ("batch", "queue", "images", "body_mb", "image_megapixels", "seconds"):
            if not 0 < getattr(self, name) < 1e9:
                raise ValueError(f"{name} is {getattr(self, name)}; use a number above 0")
        if not 0 <= self.delay_ms <= 1000:
            raise ValueError(f"delay_ms is {self.delay_ms}; use 0 to 1000")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port is {self.port}; use 0 to {2**16 - 1}")
        for origin in self.allow_origin:
            if not re.fullmatch(r"\*|https?://[^/\s]+", origin):
                raise ValueError(
                    f"allow_origin is {origin!r}; use scheme and host (https://example.org) or *"
                )
        if self.images > self.queue:
            raise ValueError(
                f"images is {self.images}, more than queue ({self.queue}); lower --images or "
                "raise --queue"
            )


def main() -> None:
    """Parse, serve until a signal arrives, print what was served."""
    cli.main(ServeConfig, command)


def command(config: ServeConfig) -> dict[str, Any]:
    """Serve until a signal arrives.

    Raises:
        ImportError: the extra is not installed.
        ValueError: a file cannot be served, or the address needs a token.
    """
    ready = prepared(config)
    names, address = [each.name for each in ready.served], ready.address
    count = counted(threads(), "thread")
    say(f"serving {', '.join(names)} at {address}; {address}/docs; {count}")
    ready.run_until_signal()
    return {"address": address, "requests": ready.metrics.answered, "models": names}


def prepared(config: ServeConfig) -> Server:
    """Listen and open the files; raises the errors of `command`."""
    check_installed()
    from adavipro_fast.serving.application import Limits

    token = read_token(config.token_file)
    if token is None and not is_loopback(config.host):
        raise ValueError(f"{config.host} is reachable from other machines; add --token-file")
    listening = listen(config.host, config.port)
    devices = config.device or ("auto",)
    return server(
        listening,
        opened(config, devices),
        devices=len(devices),
        batch=config.batch,
        delay_ms=config.delay_ms,
        room=config.queue,
        limits=Limits(
            int(1e6 * config.body_mb),
            int(1e6 * config.image_megapixels),
            config.images,
            config.seconds,
        ),
        token=token,
        origins=config.allow_origin,
    )


def opened(config: ServeConfig, devices: Sequence[str]) -> list[Served]:
    """Open the files.

    Raises:
        ValueError: there are no files, two have the same name, or a tasks folder is given and no
            file accepts tasks.
    """
    if not config.artifact:
        raise ValueError("no file given; use adavipro-serve ARTIFACT [ARTIFACT ...]")
    options = cli.opening(config, "device") | {"say": say}
    if config.tasks_folder is not None and not config.tasks_folder.is_dir():
        raise ValueError(f"no such folder: {config.tasks_folder}")
    served: dict[str, Served] = {}
    for text in config.artifact:
        name, path = named(text)
        if name in served:
            raise ValueError(f"two files have the name {name!r}; rename one with NAME=PATH")
        served[name] = Served(name, path, devices, tasks=config.tasks_folder, **options)
    if config.tasks_folder is not None and not any(
        each.tasks_are_inputs for each in served.values()
    ):
        raise ValueError("--tasks-folder needs a file that was exported with --tasks open")
    return list(served.values())


def named(text: str) -> tuple[str, Path]:
    """Split NAME=PATH; by default a file has its own name, and a checkpoint its folder's.

    Raises:
        ValueError: the name cannot be used in a URL.
    """
    name, given, rest = text.partition("=")
    path = on_disk(Path(rest if given else text))
    if not given:
        name = run_name(path) if path.suffix == ".safetensors" else path.stem
    plain = all(letter.isalnum() or letter in "-_." for letter in name)
    if not plain or not name.strip(".") or name.endswith(CLASSIFY):
        raise ValueError(f"{name!r} cannot be used in a URL; choose a name with NAME={path}")
    return name, path


def read_token(path: Path | None) -> str | None:
    """Read the bearer token that clients must send.

    Raises:
        ValueError: the file contains no token, or one that is too short or invalid in a header.
    """
    if path is None:
        return None
    token = path.read_text().strip()
    if len(token) < 16 or not (token.isascii() and token.isprintable()) or " " in token:
        raise ValueError(
            f"{path} contains no valid token; write at least 16 letters and digits into it"
        )
    return token


def say(line: str) -> None:
    """Print a line to the terminal."""
    print(printable(line), file=sys.stderr)


if __name__ == "__main__":
    main()
