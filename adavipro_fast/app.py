"""Try a file in the browser: `python -m adavipro_fast.app ARTIFACT`.

A page of this machine alone: drop a picture on it and see classes, mask and prompted picture.
"""

import asyncio
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from adavipro_fast import cli
from adavipro_fast.artifact.description import Artifact
from adavipro_fast.artifact.open import open_artifact
from adavipro_fast.device import slow_precision, torch_device
from adavipro_fast.errors import printable
from adavipro_fast.method.config import Precision
from adavipro_fast.serving.address import is_loopback, leave_signals_to_uvicorn, listen, url

INSTALL = "the page needs its extra: pip install 'adavipro_fast[app]'"
LONGEST_STOP_S = 1


@dataclass(frozen=True)
class AppConfig:
    """Open a page to drop pictures on; it shows classes, mask and prompted picture."""

    artifact: Annotated[Path, tyro.conf.Positional]
    """checkpoint.safetensors, .onnx or .engine"""
    beside: Path | None = None
    """another file whose answers are shown too (default: a checkpoint's encoder without prompt)"""
    host: str = "127.0.0.1"
    """address to listen on, of this machine alone"""
    port: int = 7860
    """0 takes a free one"""
    reject: cli.Reject = None
    task: cli.Task = None
    model: cli.Model = None
    pretrained: cli.Pretrained = None
    precision: Precision = "fp32"
    """of a checkpoint's encoder"""
    device: cli.Device = "auto"
    runtime: cli.Runtime = "auto"
    threads: cli.Threads = None

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port is {self.port}; 0 to {2**16 - 1} works")


def main() -> None:
    """Parse, show the page until a signal comes, print how many pictures it showed."""
    cli.main(AppConfig, command)


def command(config: AppConfig) -> dict[str, Any]:
    """Show the page until a signal comes.

    Raises:
        ImportError: the extra is not installed.
        ValueError: a file cannot be shown, or the address is not of this machine alone.
    """
    if not is_loopback(config.host):
        raise ValueError(
            f"{config.host} can be reached by others; the page is for this machine, `python -m "
            "adavipro_fast.serve` answers others"
        )
    with tempfile.TemporaryDirectory(prefix="adavipro-") as folder:
        # Gradio reads these when it is imported, and keeps what is dropped in the folder.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        return run(config)


def run(config: AppConfig) -> dict[str, Any]:
    """Open the files, and answer until a signal comes; errors are `command`'s."""
    try:
        import uvicorn

        from adavipro_fast.serving.page import Page
    except ImportError as error:
        raise ImportError(f"{INSTALL} ({error})") from error
    from adavipro_fast.serving.viewer import Viewer

    listening = listen(config.host, config.port)
    artifact, beside = opened(config)
    name = printable(str(config.artifact))
    page = Page(
        Viewer(artifact, beside, config.reject),
        title=name,
        beside=printable(config.beside.name) if config.beside else "Without the prompt",
    )
    settings = uvicorn.Config(
        page.application(config.host),
        log_config=None,
        # An open page is a request that never ends; it is no error that the end cuts it off.
        log_level="critical",
        timeout_graceful_shutdown=LONGEST_STOP_S,
    )
    address = url(listening)
    print(f"{name} at {address}; Ctrl-C ends it", file=sys.stderr)
    leave_signals_to_uvicorn()
    asyncio.run(uvicorn.Server(settings).serve(sockets=[listening]))
    return {"address": address, "pictures": page.shown}


def opened(config: AppConfig) -> tuple[Artifact, Artifact | None]:
    """Open the file, and the one beside it.

    Raises:
        ValueError: neither can be asked without the name of a task.
    """
    cli.warn(slow_precision(config.precision, torch_device(config.device)))
    options: dict[str, Any] = {
        "model": config.model,
        "pretrained": config.pretrained,
        "precision": config.precision,
        "device": config.device,
        "runtime": config.runtime,
    }
    artifact = open_artifact(config.artifact, task=config.task, **options)
    if artifact.about.open_for is not None:
        artifact.about.check_one_task(config.artifact)
    if config.beside is None:
        return artifact, None
    beside = open_artifact(config.beside, **options)
    if beside.about.tasks or beside.about.open_for is not None:
        raise ValueError(f"{config.beside} is of several tasks; --beside takes a file of one")
    return artifact, beside


if __name__ == "__main__":
    main()
