"""Describe the machine that a bench runs on: device, clocks, versions, commit, memory."""

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from adavipro_fast.artifact.openvino import INSTALL

ROOT = Path(__file__).parents[2]
PACKAGES = (
    *("torch", "torchvision", "open_clip_torch", "triton", "onnx", "onnxruntime-gpu"),
    *("onnxruntime", "tensorrt", "tensorrt-rtx-cu13", "transformers", "openvino"),
)
GPU_FIELDS = (
    *("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu"),
    *("power.draw", "clocks_throttle_reasons.active"),
)


def no_openvino(device: torch.device) -> str | None:
    """Return why OpenVINO is not measured on a device; None if it is."""
    if device.type == "cpu" and find_spec("openvino") is not None:
        return None
    return f"OpenVINO runs on CPUs, where it is installed: {INSTALL}"


def peak_host_mib() -> float:
    """Return the peak resident memory of this process, MiB; 0 if unknown."""
    # Not getrusage, whose peak is inherited from the parent process.
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 2**10
    return 0.0


def peak_device_mib(work: Callable[[], object], device: torch.device) -> float:
    """Return torch's peak GPU memory during a call, MiB."""
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) / 2**20


def cpu_name() -> str:
    """Return the processor's model."""
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def clocks() -> dict[str, Any]:
    """Return the current clocks and the reasons for throttling, if available."""
    about: dict[str, Any] = {}
    if hasattr(os, "getloadavg"):
        about["load_average"] = os.getloadavg()[0]
    with contextlib.suppress(OSError):
        cores = re.findall(r"cpu MHz\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text())
        if cores:
            about["cpu_mhz"] = max(map(float, cores))
    folder = Path("/sys/devices/system/cpu/cpu0")
    for name in ("cpufreq/cpuinfo_max_freq", "thermal_throttle/core_throttle_count"):
        with contextlib.suppress(OSError, ValueError):
            about[name.split("/")[1]] = int((folder / name).read_text())
    if torch.cuda.is_available() and shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        values = done.stdout.split("\n")[0].split(", ")
        if len(values) == len(GPU_FIELDS):
            about["gpu"] = dict(zip(GPU_FIELDS, values, strict=True))
    return about


def versions() -> dict[str, str]:
    """Return the installed versions of measured packages."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit_here() -> str:
    """Return the commit, with `-dirty` if files differ; "" if unknown.

    A copy of the files without the git history uses $ADAVIPRO_COMMIT.
    """
    command = ["git", "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return os.environ.get("ADAVIPRO_COMMIT", "")


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine: device, clocks, versions, commit."""
    commit = commit_here()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": name,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clocks": clocks(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit.removesuffix("-dirty"),
        "dirty": commit.endswith("-dirty"),
    }
