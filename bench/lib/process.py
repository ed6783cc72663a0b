"""Commands of this project in processes of their own."""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from adavipro_fast.errors import VerificationError


def printed(*arguments: object, environment: Mapping[str, str] | None = None) -> str:
    """Run Python with these arguments in a new process and return what it printed.

    Raises:
        VerificationError: it exited with another code than 0.
    """
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise VerificationError(f"{' '.join(command)} failed: {done.stdout[-2000:]}")
    return done.stdout


def result_of(*arguments: object, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run Python likewise and return the JSON object of its last line."""
    return dict(json.loads(printed(*arguments, environment=environment).splitlines()[-1]))
