"""Run tests of the fused kernel on the PTX that Triton compiles, without a GPU.

    PYTHONPATH=tests:../shared/tools/ptx PTX_ARCH=80 pytest -p on_compiled_code tests/test_kernel.py

Two threads that store different values to one address are an error.
"""

import os
import re

# Triton reads it when it is imported: the interpreter would run the Python instead.
os.environ.pop("TRITON_INTERPRET", None)

import emulate
import ptx
import pytest

from adavipro_fast.kernels import adaptive_prompt as kernels
from adavipro_fast.method import prompt

PROGRAM = ptx.Program
# Sums of a half and a float, from sm_100 on, which the emulator would take for sums of halves.
MIXED = re.compile(r"(add|sub)(\.rn)?\.f32\.(b?f16)\s+(\S+), (\S+), (\S+);")


def program(text):
    """Parse PTX, rewritten to instructions that the emulator executes rightly."""
    text = MIXED.sub(r"cvt.f32.\3 \4, \5;\n\t\1\2.f32 \4, \4, \6;", text)
    # A block's shared memory has two names.
    return PROGRAM(text.replace(".shared::cta", ".shared"))


ptx.Program = program
for name in ("_forward", "_backward", "_logistic_noise"):
    launched = emulate.Emulated(getattr(kernels, name), int(os.environ["PTX_ARCH"]))
    setattr(kernels, name, launched)
# The fused path asks for a GPU or the interpreter.
prompt.triton_interprets = lambda: True


@pytest.fixture(autouse=True)
def compiled_kernels():
    os.environ.pop("TRITON_INTERPRET", None)  # which conftest.py sets
