"""How many processor cores a process may use, from its affinity and its container's quota."""

import math
import os
from pathlib import Path

import torch

MOST = 4096
CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_cores() -> int:
    """Return the cores of this process: the minimum of its affinity and its cgroups' quotas."""
    try:
        cores = len(os.sched_getaffinity(0))
    # macOS and Windows lack this function.
    except AttributeError:
        cores = os.cpu_count() or 1
    quota = cpu_quota(CGROUPS, MEMBERSHIP)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def cpu_quota(cgroups: Path, membership: Path) -> float | None:
    """Return the smallest quota of a process's cgroups, in cores; None if none has a quota.

    Args:
        cgroups: where the control groups are mounted, version 2 or 1.
        membership: the process's `cgroup` file, with one line per hierarchy.
    """
    quotas = []
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups if number == "0" and not controllers else cgroups / controllers
        if controllers and not root.exists():
            root = cgroups / "cpu"
        folder = root / name.lstrip("/")
        # In a container the group's own name may be missing below the mount.
        for group in (folder, *folder.parents):
            quotas.append(_quota(group))
            if group == root:
                break
    return min((quota for quota in quotas if quota is not None), default=None)


class _Asked:
    """The number of threads that was requested for this process, if any."""

    threads: int | None = None


def threads() -> int:
    """Return how many threads runtimes and decoders use: the requested number or one per core."""
    return _Asked.threads or available_cores()


def use_threads(count: int | None) -> int:
    """Set the threads of PyTorch, ONNX Runtime, OpenVINO and the decoders; return how many.

    Args:
        count: threads of this process; set it before files are opened (default: one per available
            core; PyTorch keeps a smaller number, for example from OMP_NUM_THREADS).

    Raises:
        ValueError: the number is out of range.
    """
    if count is not None and not 1 <= count <= MOST:
        raise ValueError(f"threads is {count}; use 1 to {MOST}")
    _Asked.threads = count
    wanted = count or min(torch.get_num_threads(), available_cores())
    if wanted != torch.get_num_threads():
        torch.set_num_threads(wanted)
    return threads()


def _quota(group: Path) -> float | None:
    """Return a group's own quota in cores; None without one."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
