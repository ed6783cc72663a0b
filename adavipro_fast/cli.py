"""What every command shares: flat flags, one JSON object as the last line, exit codes.

Exit 0: done. 1: a verification failed, or training diverged. 2: bad request, reported in one line.
"""

import contextlib
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import torch
import tyro

from adavipro_fast import usage
from adavipro_fast.cores import use_threads
from adavipro_fast.errors import EncoderWarning, VerificationError, printable
from adavipro_fast.files import hub
from adavipro_fast.method import config as settings
from adavipro_fast.method import preprocess

Config = TypeVar("Config")
Result = dict[str, Any]
INTERRUPTED = 128 + signal.SIGINT

# Options of several commands.
Device = Annotated[str, tyro.conf.arg(help="auto, cpu, cuda, cuda:1, ...")]
Model = Annotated[
    str | None,
    tyro.conf.arg(help="encoder of the checkpoint, if it has moved (default: as in training)"),
]
Pretrained = Annotated[
    str | None,
    tyro.conf.arg(help="tag or path of the encoder's weights (default: as in training)"),
]
Runtime = Annotated[
    settings.Runtime,
    tyro.conf.arg(
        help="runtime for an .onnx file; auto: OpenVINO on a CPU if it is installed, except for "
        "int8, fp8 and tasks as data; otherwise ONNX Runtime"
    ),
]
Reject = Annotated[
    float | None,
    tyro.conf.arg(
        help="answer `unknown` when the confidence is below that of this share of the validation "
        "images, such as 0.05 (default: always give a class)"
    ),
]
Task = Annotated[
    str | None,
    tyro.conf.arg(help="name of the task, if the file holds several; adavipro-tasks lists them"),
]
Decode = Annotated[
    preprocess.Decode | None,
    tyro.conf.arg(
        help="fast resizes with PyTorch instead of Pillow: pixels differ by at most two grey "
        "levels; scaled also decodes large JPEGs at 1/2, 1/4 or 1/8 of their size, which changes "
        "about one answer in a hundred (default: as in training)"
    ),
]
Threads = Annotated[
    int | None,
    tyro.conf.arg(
        help="threads of PyTorch, ONNX Runtime, OpenVINO and the decoders (default: the cores that "
        "this process may use)"
    ),
]
Images = Annotated[
    tuple[Path, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(
        help="folder of images for the verification (default: generated images); repeatable, one "
        "per task in the order of the checkpoints"
    ),
]


# Flags of commands that `open_artifact` takes.
OPENING = ("model", "pretrained", "precision", "device", "runtime", "task", "decode")


def opening(config: Any, *but: str) -> dict[str, Any]:
    """Return the flags with which a command's file is opened, except those named."""
    return {k: v for k, v in vars(config).items() if k in OPENING and k not in but}


def main(
    config: type[Config],
    command: Callable[[Config], Result],
    summary: Callable[[Result], str] | None = None,
    *,
    quiet: bool = False,
) -> None:
    """Parse the flags, run the command, print its summary for people and its JSON for programs."""
    parsed = parse(config)
    run(lambda: _prepared(parsed, command), summary, quiet=quiet)


def _prepared(parsed: Any, command: Callable[[Any], Result]) -> Result:
    use_threads(getattr(parsed, "threads", None))
    return command(on_disk(parsed))


def on_disk(config: Any) -> Any:
    """Fetch what a configuration names as `hub:owner/name`, and name the files there instead."""
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name == "output":
            continue
        if isinstance(value, Path):
            found[name] = hub.on_disk(value)
        elif isinstance(value, tuple):
            found[name] = tuple(hub.on_disk(v) if isinstance(v, Path) else v for v in value)
    return replace(config, **found)


def parse(
    kind: type[Config] | Callable[..., Config],
    default: Any = None,
    flags: Sequence[str] | None = None,
) -> Config:
    """Parse flags (default: the command line's); errors are reported in one line."""
    more = {} if default is None else {"default": default}
    parsed: Config = _parse(kind, args=flags, **more)
    return parsed


def parse_some(kind: type[Config], flags: Sequence[str] | None = None) -> Config:
    """Parse the flags that `kind` knows, and leave the others for `parse`."""
    arguments = sys.argv[1:] if flags is None else flags
    # A request for shell completion is about all flags.
    if any(argument.startswith("--tyro-") for argument in arguments[:1]):
        arguments = []
    parsed: Config = _parse(kind, args=arguments, return_unknown_args=True, add_help=False)[0]
    return parsed


def _parse(kind: Any, **options: Any) -> Any:
    escape_output()
    given = set(sys.argv[1:] if options.get("args") is None else options["args"])
    if "--version" in given:
        print(f"adavipro_fast {version('adavipro_fast')}")
        raise SystemExit
    if options.get("add_help", True) and given & {"-h", "--help"}:
        usage.print_help(kind, options.get("default", tyro.MISSING_NONPROP))
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, prog=usage.program(), config=usage.MARKERS, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        fail(f"{usage.sentence(complaint.getvalue())}; see {usage.program()} --help")


def fail(message: object, code: int = 2) -> NoReturn:
    """Print one line on stderr and exit."""
    print("error: " + printable(" ".join(str(message).split())), file=sys.stderr)
    raise SystemExit(code)


def warn(message: str | None) -> None:
    """Print a line on stderr, if there is something to say."""
    if message:
        print(f"warning: {printable(message)}", file=sys.stderr)


def run(
    command: Callable[[], Result],
    summary: Callable[[Result], str] | None = None,
    *,
    quiet: bool = False,
) -> None:
    """Run a command and print what it gave; turn what went wrong into a line and an exit code.

    Args:
        command: returns the JSON object.
        summary: says the same for a person, on stderr; empty where all is printed already.
        quiet: print neither.
    """
    escape_output()
    warnings.showwarning = _show(warnings.showwarning)
    try:
        result = command()
        if not quiet:
            if summary is not None and (text := summary(result)):
                print("\n" + text, file=sys.stderr)
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
            fail(
                f"out of memory: {error}; process fewer images at once, for example with "
                "--batch-size"
            )
        if not isinstance(error, ValueError | TypeError | OSError | ImportError):
            raise
        if isinstance(error, OSError) and sys.stdout is not None and not _flushed():
            # Or else Python tries again at its exit, and complains.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail(error)


def _show(others: Callable[..., None]) -> Callable[..., None]:
    """Print our own warnings in one line, and others as before."""

    def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, EncoderWarning):
            warn(str(message))
        else:
            others(message, category, *rest, **more)

    return show


def escape_output() -> None:
    """Escape what stdout's encoding lacks, which would end a command after all its work."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


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
