"""Choose a device, check its fast precisions, and keep fp32 products in full fp32."""

import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

backends: Any = torch.backends
# Operations for which PyTorch may replace fp32 with a shorter type: TF32 on GPUs, bf16 on CPUs.
PRODUCTS = (
    backends.cudnn.conv,
    backends.cudnn.rnn,
    backends.cuda.matmul,
    backends.mkldnn.conv,
    backends.mkldnn.matmul,
)
# Values of oneDNN's instruction-set limit that still allow bf16 instructions.
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
# PyTorch's older pair of settings: whether cuDNN may use TF32, and the precision of matrix
# products. PyTorch raises when they are read while they contradict the newer settings.
Older = tuple[bool, str]


def torch_device(name: str) -> torch.device:
    """Turn `auto` or a device name into an available device; a CUDA device gets an index.

    Raises:
        ValueError: the device is unknown or not available.
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
    # TensorRT, ONNX Runtime and CUDA events need an index; plain "cuda" means the current device.
    number = torch.cuda.current_device() if device.index is None else device.index
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} does not exist; PyTorch finds {torch.cuda.device_count()} CUDA "
            "devices, counted from 0"
        )
    return torch.device("cuda", number)


def _settings() -> tuple[Older | None, tuple[str, ...]]:
    newer = tuple(product.fp32_precision for product in PRODUCTS)
    try:
        return (backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()), newer
    except RuntimeError:
        # The caller has made older and newer settings disagree.
        return None, newer


def _set(older: Older | None, newer: tuple[str, ...]) -> None:
    if older is not None:
        backends.cudnn.allow_tf32, precision = older
        torch.set_float32_matmul_precision(precision)
    for product, precision in zip(PRODUCTS, newer, strict=True):
        product.fp32_precision = precision


class _Inside:
    """Number of active `full_fp32` contexts in all threads, and the settings before the first."""

    lock = threading.Lock()
    count = 0
    before: tuple[Older | None, tuple[str, ...]] = (None, ())


@contextmanager
def full_fp32() -> Iterator[None]:
    """Run fp32 products in full fp32 instead of TF32 or bf16, whatever the caller's settings.

    cuDNN uses TF32 by default, which flips mask decisions where Δ is near 0. The settings apply to
    the process, so other threads' products are in full fp32 too while the context is active.
    A value that the caller set for all products through torch.backends.fp32_precision is restored
    for each product separately. Run backward passes and compiled functions inside the context as
    well: a backward pass uses the settings at its own call, and torch.compile ignores a context
    inside the compiled function.
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
    """Report whether the device has bf16 instructions that PyTorch uses; nothing is timed."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if platform.machine().lower() in ("arm64", "aarch64"):
        # True for oneDNN with Arm's library. Apple's processors and other builds emulate bf16.
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    # oneDNN's variable limits oneDNN; ATen's capability limits PyTorch's own kernels.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "DEFAULT"))
    limited = limit.upper() not in BF16_ISAS
    avx512 = "AVX512" in torch.backends.cpu.get_cpu_capability().upper()
    return avx512 and not limited and bool(torch.cpu._is_avx512_bf16_supported())


def fast_precision(device: torch.device) -> Literal["fp32", "bf16"]:
    """Return the fastest precision to train in on a device: bf16 if it is native, else fp32."""
    return "bf16" if fast_bf16(device) else "fp32"


def slow_precision(precision: str, device: torch.device) -> str | None:
    """Return a warning if the device only emulates a precision, else None."""
    if device.type != "cpu":
        return None
    if precision == "fp16":
        return "fp16 has no fast path on a CPU and takes many times longer than fp32"
    if precision == "bf16" and not fast_bf16(device):
        return "this processor emulates bf16, which takes many times longer than fp32"
    return None
