import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adavipro_fast.files import whole


def test_files_are_flushed_before_they_get_their_names(tmp_path, monkeypatch):
    output, order = tmp_path / "f.onnx", []
    real = os.fsync

    def fsync(descriptor):
        order.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, output.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with whole.named_when_whole(output) as path:
        path.write_bytes(b"graph")
        path.with_name("f.onnx.data").write_bytes(b"weights")
    assert order == [("f.onnx.data", False), ("f.onnx", False), (tmp_path.name, True)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.onnx", "f.onnx.data"]


def test_an_error_leaves_nothing(tmp_path):
    def export():
        with whole.named_when_whole(tmp_path / "f.onnx") as path:
            path.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        export()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_removed_and_a_running_ones_is_not(tmp_path):
    program = (
        "import sys, time; from pathlib import Path\n"
        "from adavipro_fast.files.whole import named_when_whole\n"
        "with named_when_whole(Path(sys.argv[1]) / 'f.onnx') as path:\n"
        "    path.write_bytes(bytes(1000)); print(flush=True); time.sleep(100)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        (left,) = tmp_path.iterdir()
        with whole.named_when_whole(tmp_path / "g.onnx") as path:
            path.write_bytes(b"graph")
        assert left.exists()
        other.kill()
    time.sleep(0.1)
    with whole.named_when_whole(tmp_path / "g.onnx") as path:
        path.write_bytes(b"graph")
    assert [p.name for p in tmp_path.iterdir()] == ["g.onnx"]
