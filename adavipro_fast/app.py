"""Classify images in the browser: `python -m adavipro_fast.app ARTIFACT`.

Serves the page on this machine only: drop a picture and see classes, mask and prompted picture.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from adavipro_fast import cli
from adavipro_fast.artifact.artifact import Artifact
from adavipro_fast.artifact.open import open_artifact
from adavipro_fast.data.images import LARGEST_IMAGE
from adavipro_fast.device import slow_precision, torch_device
from adavipro_fast.errors import printable
from adavipro_fast.files.hub import on_disk
from adavipro_fast.method.config import Precision
from adavipro_fast.serving.address import is_loopback, listen
from adavipro_fast.serving.served import Served
from adavipro_fast.serving.server import Server, check_installed, server

LARGEST_FILE = 64_000_000
LONGEST_STOP_S = 1


@dataclass(frozen=True)
class AppConfig:
    """Open a page that classifies the images you drop on it."""

    artifact: Annotated[Path, tyro.conf.Positional]
    """checkpoint.safetensors, .onnx or .engine"""
    beside: Path | None = None
    """second file whose answers are also shown (default: the checkpoint without its prompt)"""
    host: str = "127.0.0.1"
    """address to listen on; only addresses of this machine are allowed"""
    port: int = 7860
    """port to listen on; 0 chooses a free one"""
    reject: cli.Reject = None
    task: cli.Task = None
    model: cli.Model = None
    pretrained: cli.Pretrained = None
    precision: Precision = "fp32"
    """precision of a checkpoint's encoder"""
    device: cli.Device = "auto"
    runtime: cli.Runtime = "auto"
    threads: cli.Threads = None

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port is {self.port}; use 0 to {2**16 - 1}")


def main() -> None:
    """Parse, serve the page until a signal arrives, print how many pictures were classified."""
    cli.main(AppConfig, command)


def command(config: AppConfig) -> dict[str, Any]:
    """Serve the page until a signal arrives.

    Raises:
        ImportError: the extra is not installed.
        ValueError: a file cannot be used, or other machines can reach the address.
    """
    page = prepared(config)
    address = page.address
    print(f"{printable(str(config.artifact))} at {address}; press Ctrl-C to stop", file=sys.stderr)
    page.run_until_signal()
    return {"address": address, "pictures": page.metrics.pictures}


def prepared(config: AppConfig) -> Server:
    """Listen and open the files; raises the errors of `command`."""
    if not is_loopback(config.host):
        raise ValueError(
            f"{config.host} is reachable from other machines; use adavipro-serve to serve others"
        )
    check_installed()
    from adavipro_fast.serving.application import Limits
    from adavipro_fast.serving.view import Page, warm

    listening = listen(config.host, config.port)
    served, beside = opened(config)
    page = Page(
        printable(str(config.artifact)),
        config.reject,
        beside,
        printable(config.beside.name) if config.beside else "Without the prompt",
    )
    warm(served.now, page)
    # Requests for any other host name are refused, which stops DNS rebinding.
    host = f"[{config.host}]" if ":" in config.host else config.host
    local = ["localhost", "127.0.0.1", "[::1]", host]
    return server(
        listening,
        [served],
        longest_stop_s=LONGEST_STOP_S,
        limits=Limits(body_bytes=LARGEST_FILE, image_pixels=LARGEST_IMAGE),
        page=page,
        hosts=local,
    )


def opened(config: AppConfig) -> tuple[Served, Artifact | None]:
    """Open the file and the one to compare it with.

    Raises:
        ValueError: a file needs the name of a task.
    """
    cli.warn(slow_precision(config.precision, torch_device(config.device)))
    options = cli.opening(config, "device", "task")
    path = on_disk(config.artifact)
    served = Served(path.stem, path, (config.device,), task=config.task, **options)
    if served.now.about.open_for is not None:
        served.now.about.check_one_task(config.artifact)
    if config.beside is None:
        return served, None
    beside = open_artifact(config.beside, device=config.device, **options)
    if beside.about.tasks or beside.about.open_for is not None:
        raise ValueError(
            f"{config.beside} holds several tasks; --beside needs a file with one task"
        )
    return served, beside


if __name__ == "__main__":
    main()
