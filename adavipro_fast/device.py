"""Which device a command runs on, what it does fast, and fp32 that is fp32 on it."""

import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

backends: Any = torch.backends
# Where PyTorch may take a shorter type for fp32 products: TF32 on GPUs, bf16 on CPUs.
PRODUCTS = (
    backends.cudnn.conv,
    backends.cudnn.rnn,
    backends.cuda.matmul,
    backends.mkldnn.conv,
    backends.mkldnn.matmul,
)
# Limits of oneDNN's instruction sets under which it still has bf16 instructions.
BF16_ISAS = (
    "DEFAULT",
    "ALL",
    "AVX512_CORE_BF16",
    "AVX512_CORE_FP16",
    "AVX512_CORE_AMX",
    "AVX512_CORE_AMX_FP16",
    "AVX10_1_512",
    "AVX10_1_512_AMX",
    "AVX10_1_512_AMX_FP16",
)
# The older pair of settings, which torch itself reads, and refuses to read where they disagree
# with the newer ones: whether cuDNN may take TF32, and how exact matrix products are.
Older = tuple[bool, str]


def torch_device(name: str) -> torch.device:
    """Turn `auto` or a device name into a device that is there, a CUDA one with its number.

    Raises:
        ValueError: unknown or absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown; use auto, cpu or cuda") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"device {name!r} is not supported; use auto, cpu or cuda")
    if not torch.cuda.is_available():
        raise ValueError(
            f"device {name!r} was requested, but PyTorch finds no CUDA device; use cpu"
        )
    # TensorRT, ONNX Runtime and events want a number: "cuda" alone means the current one.
    number = torch.cuda.current_device() if device.index is None else device.index
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} does not exist; PyTorch finds {torch.cuda.device_count()} CUDA "
            "devices, "
            "counted from 0"
        )
    return torch.device("cuda", number)


def _settings() -> tuple[Older | None, tuple[str, ...]]:
    newer = tuple(product.fp32_precision for product in PRODUCTS)
    try:
        return (backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()), newer
    except RuntimeError:
        # The caller has set them apart.
        return None, newer


def _set(older: Older | None, newer: tuple[str, ...]) -> None:
    if older is not None:
        backends.cudnn.allow_tf32, precision = older
        torch.set_float32_matmul_precision(precision)
    for product, precision in zip(PRODUCTS, newer, strict=True):
        product.fp32_precision = precision


class _Inside:
    """How many calls are inside `full_fp32`, of all threads, and what the first one found."""

    lock = threading.Lock()
    count = 0
    before: tuple[Older | None, tuple[str, ...]] = (None, ())


@contextmanager
def full_fp32() -> Iterator[None]:
    """Keep fp32 products from running in TF32 or bf16, whatever the caller allows elsewhere.

    cuDNN uses TF32 by default, which turns a mask where Δ is near 0. The settings are
    the process's: products of other threads are exact meanwhile. What a caller had set through
    torch.backends.fp32_precision for all products is afterwards set for each. A backward pass runs
    under its caller's settings, and torch.compile does not see these: call both inside.
    """
    if torch.compiler.is_compiling():
        yield
        return
    with _Inside.lock:
        if _Inside.count == 0:
            _Inside.before = _settings()
            older = None if _Inside.before[0] is None else (False, "highest")
            _set(older, ("ieee",) * len(PRODUCTS))
        _Inside.count += 1
    try:
        yield
    finally:
        with _Inside.lock:
            _Inside.count -= 1
            if _Inside.count == 0:
                _set(*_Inside.before)


def fast_bf16(device: torch.device) -> bool:
    """Report whether the processor has bf16 instructions that PyTorch uses: read, not timed."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if platform.machine().lower() in ("arm64", "aarch64"):
        # oneDNN with Arm's library; Apple's processors and builds without it emulate bf16.
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    # oneDNN's own variable limits what it uses, ATen's the rest.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "DEFAULT"))
    limited = limit.upper() not in BF16_ISAS
    wide = "AVX512" in torch.backends.cpu.get_cpu_capability().upper()
    return wide and not limited and bool(torch.cpu._is_avx512_bf16_supported())


def fast_precision(device: torch.device) -> Literal["fp32", "bf16"]:
    """Return the precision that the device trains in fastest: bf16 where it has it, else fp32."""
    return "bf16" if fast_bf16(device) else "fp32"


def slow_precision(precision: str, device: torch.device) -> str | None:
    """Return a warning about a precision that the device only emulates, or None."""
    if device.type != "cpu":
        return None
    if precision == "fp16":
        return "fp16 has no fast path on a CPU and takes many times longer than fp32"
    if precision == "bf16" and not fast_bf16(device):
        return "this processor emulates bf16, which takes many times longer than fp32"
    return None
