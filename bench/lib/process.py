"""Run commands of this project in separate processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adavipro_fast.errors import VerificationError

LONGEST_LINE = 400


def printed(*arguments: object, environment: Mapping[str, str] | None = None) -> str:
    """Run Python with these arguments in a new process and return what it printed.

    Raises:
        VerificationError: the exit code is not 0.
    """
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise VerificationError(f"{' '.join(command)} failed: {done.stdout[-2000:]}")
    return done.stdout


def result_of(*arguments: object, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run Python like `printed`, and return the JSON object in its last line."""
    return dict(json.loads(printed(*arguments, environment=environment).splitlines()[-1]))


def streamed(
    command: Sequence[str],
    *,
    limit_s: float,
    log: Path,
    environment: Mapping[str, str],
    folder: Path,
    quiet: bool = False,
) -> int | str:
    """Run a command, and copy its output to stderr and a log.

    Args:
        command: program and arguments.
        limit_s: time limit in seconds, after which it and its children are stopped.
        log: file to which lines are appended.
        environment: of the command.
        folder: working directory.
        quiet: write only to the log.

    Returns:
        The exit code, or why there is none.
    """
    try:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return f"cannot start: {error}"
    reader = threading.Thread(target=_copy, args=(child, log, quiet), daemon=True)
    reader.start()
    try:
        code = child.wait(limit_s)
    except subprocess.TimeoutExpired:
        _end(child)
        return f"ended after {limit_s:.0f} s, its limit"
    finally:
        if child.poll() is None:
            _end(child)
        reader.join(5)
    return code


def _copy(child: subprocess.Popen[str], log: Path, quiet: bool) -> None:
    assert child.stdout is not None
    with log.open("a") as file:
        for line in child.stdout:
            short = line.rstrip("\n")[:LONGEST_LINE]
            print(short, file=file, flush=True)
            if not quiet:
                print(short, file=sys.stderr, flush=True)


def _end(child: subprocess.Popen[str]) -> None:
    """Stop a process that we started and its children, by its process group."""
    for way in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, way)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5)
            return
