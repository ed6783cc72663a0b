import os

import pytest
import torch

from adavipro_fast import cores
from adavipro_fast.artifact.onnx import session_options


def written(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root / "fs", root / "cgroup"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cgroup": "0::/\n", "fs/cpu.max": "max 100000\n"}, None),
        ({"cgroup": "0::/\n", "fs/cpu.max": "150000 100000\n"}, 1.5),
        # The least of a group and those above it.
        ({"cgroup": "0::/a/b\n", "fs/a/cpu.max": "50000 100000", "fs/a/b/cpu.max": "max 1"}, 0.5),
        ({"cgroup": "0::/docker/x\n", "fs/cpu.max": "300000 100000"}, 3),
        (
            {
                "cgroup": "3:cpu,cpuacct:/j\n2:memory:/k\n",
                "fs/cpu/j/cpu.cfs_quota_us": "400000",
                "fs/cpu/j/cpu.cfs_period_us": "200000",
                "fs/cpu/cpu.cfs_quota_us": "-1",
                "fs/cpu/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        ({"cgroup": "0::/\n", "fs/cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_a_quota_is_the_least_of_the_cgroups(files, expected, tmp_path):
    assert cores.cpu_quota(*written(tmp_path, files)) == expected


@pytest.fixture
def threads_as_before():
    before = torch.get_num_threads()
    yield
    cores.use_threads(None)
    torch.set_num_threads(before)


def test_a_quota_limits_all_that_have_threads(monkeypatch, tmp_path, threads_as_before):
    files = {"cgroup": "0::/\n", "fs/cpu.max": "250000 100000"}
    fs, membership = written(tmp_path, files)
    monkeypatch.setattr(cores, "CGROUPS", fs)
    monkeypatch.setattr(cores, "MEMBERSHIP", membership)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    torch.set_num_threads(8)
    assert cores.use_threads(None) == 3
    assert torch.get_num_threads() == 3
    assert session_options("fp32").intra_op_num_threads == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert cores.threads() == 1


def test_threads_that_are_asked_for_win(threads_as_before):
    assert cores.use_threads(3) == 3
    assert torch.get_num_threads() == session_options("fp32").intra_op_num_threads == 3
    with pytest.raises(ValueError, match="threads is 0; use 1 to"):
        cores.use_threads(0)
