"""Which device a command runs on, and fp32 that is fp32 on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Where PyTorch may take a shorter type for fp32 products: TF32 on GPUs, bf16 on CPUs.
backends: Any = torch.backends
PRODUCTS = (
    backends.cudnn.conv,
    backends.cuda.matmul,
    backends.mkldnn.conv,
    backends.mkldnn.matmul,
)


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
        raise ValueError(f"device {name!r} was asked for, but torch sees no CUDA device; use cpu")
    # TensorRT, ONNX Runtime and events want a number: "cuda" alone means the current one.
    number = torch.cuda.current_device() if device.index is None else device.index
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not there; torch sees {torch.cuda.device_count()} CUDA devices, "
            "counted from 0"
        )
    return torch.device("cuda", number)


@contextmanager
def full_fp32() -> Iterator[None]:
    """Keep fp32 products from running in TF32 or bf16, whatever the caller allows elsewhere.

    cuDNN takes TF32 unless told otherwise, which turns a mask where Δ is near 0. The settings are
    the process's: another thread's products meanwhile are exact as well. A backward pass runs
    under its caller's. torch.compile does not follow them: call what it compiled in here.
    """
    if torch.compiler.is_compiling():
        yield
        return
    before = [product.fp32_precision for product in PRODUCTS]
    for product in PRODUCTS:
        product.fp32_precision = "ieee"
    try:
        yield
    finally:
        for product, precision in zip(PRODUCTS, before, strict=True):
            product.fp32_precision = precision


def slow_precision(precision: str, device: torch.device) -> str | None:
    """Say where a precision takes minutes for seconds."""
    if device.type == "cpu" and precision == "fp16":
        return "fp16 runs without the CPU's fast paths and takes many times longer than fp32"
    return None
