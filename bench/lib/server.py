"""Run `python -m adavipro_fast.serve` in a separate process."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adavipro_fast.errors import VerificationError


@contextmanager
def server(path: Path, *flags: str, runtime: str = "onnxruntime") -> Iterator[str]:
    """Serve a file in a separate process; yield the server's address.

    Raises:
        VerificationError: the server does not start.
    """
    command = [sys.executable, "-m", "adavipro_fast.serve", str(path), *flags, "--port", "0"]
    command += ["--runtime", runtime]
    process = subprocess.Popen(
        [*command, "--device", "cpu"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("serving"):
                break
        else:
            raise VerificationError(f"serve did not start: {''.join(said[-3:])}")
        address = said[-1]
        yield address.split(" at ")[1].split(";")[0]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
