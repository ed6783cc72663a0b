"""What every command shares: flat flags, one JSON object as the last line, exit codes.

Exit 0: done. 1: a verification failed, or training diverged. 2: bad request, told in one line.
"""

import contextlib
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
import tyro

Config = TypeVar("Config")

INTERRUPTED = 128 + signal.SIGINT


class VerificationError(Exception):
    """A result was checked and found wrong."""


def printable(text: str) -> str:
    """Escape what a terminal would take as a command: names come from folders and files."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def fail(message: object, code: int = 2) -> NoReturn:
    """Print one line on stderr and exit."""
    print("error: " + printable(" ".join(str(message).split())), file=sys.stderr)
    raise SystemExit(code)


def peek(arguments: Sequence[str], flag: str) -> str | None:
    """Return the value given last to a flag, with - or _, before the flags are parsed."""
    found = None
    for position, argument in enumerate(arguments):
        name, given, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            found = value if given else next(iter(arguments[position + 1 :]), None)
    return found


def parse(kind: type[Config] | Callable[..., Config], default: Any = None) -> Config:
    """Parse the command line; what is wrong with it is told in one line."""
    complaint = io.StringIO()
    extra = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            parsed: Config = tyro.cli(kind, config=(tyro.conf.OmitArgPrefixes,), **extra)
            return parsed
    except SystemExit as stop:
        if not stop.code:
            raise
        text = re.sub("[^\x00-\x7fΑ-ω…·]|---+", " ", complaint.getvalue())
        fail(text.split("For full helptext")[0] + f"; see {sys.argv[0]} --help")


def warn(message: str | None) -> None:
    """Print a line on stderr, if there is something to say."""
    if message:
        print(f"warning: {printable(message)}", file=sys.stderr)


def run(command: Callable[[], dict[str, Any]], *, quiet: bool = False) -> None:
    """Run a command and print its JSON; turn what went wrong into a line and an exit code."""
    try:
        result = command()
        if not quiet:
            print(json.dumps(result))
        # What a full device or a closed pipe does not take shows only here.
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt as stop:
        fail(stop or "interrupted", INTERRUPTED)
    except (VerificationError, ArithmeticError) as error:
        fail(error, 1)
    except Exception as error:
        if lacks_memory(error):
            fail(f"out of memory: {error}; give it fewer images at once, as by --batch-size")
        if not isinstance(error, ValueError | TypeError | OSError | ImportError):
            raise
        if isinstance(error, OSError) and sys.stdout is not None and not _flushed():
            # Or else Python tries again at its exit, and complains.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail(error)


def lacks_memory(error: Exception) -> bool:
    """Tell whether memory ran out, by type, or by what torch and ONNX Runtime say of it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("out of memory", "can't allocate memory", "failed to allocate memory")
    return any(word in str(error).lower() for word in words)


def _flushed() -> bool:
    try:
        sys.stdout.flush()
    except OSError:
        return False
    return True
