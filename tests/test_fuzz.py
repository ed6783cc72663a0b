"""Hostile files: whatever the bytes, a reader returns or raises ValueError or OSError."""

import hashlib
import io
import json
import random
import resource
import struct
import time
from dataclasses import asdict
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from adavipro_fast.data.cache import opened
from adavipro_fast.data.coop import read_split
from adavipro_fast.data.images import FORMATS, decode_image
from adavipro_fast.files.checked import read
from adavipro_fast.files.checkpoint import BASELINE_FORMAT, checkpoint_of, load_checkpoint
from adavipro_fast.files.sealed import (
    SEAL_KEY,
    UNSEALED,
    describe_onnx,
    read_sidecar,
    seal,
    sidecar_sha256,
)
from adavipro_fast.files.task import TaskFile, load_task
from adavipro_fast.files.whole import safetensors_bytes
from adavipro_fast.method.clip import load_encoder
from adavipro_fast.method.config import PromptConfig
from adavipro_fast.method.model import AdaViPro
from adavipro_fast.method.preprocess import Preprocess
from adavipro_fast.training.state import Progress, read_state

# Pillow and NumPy remark on what they find odd before they refuse it.
pytestmark = pytest.mark.filterwarnings("ignore")

INPUTS = 250
ODD = [
    *(None, True, 0, -1, 2**31, 2**63, 10**400, 0.5, float("nan"), "", "\0", "\x1b[2J", "../../x"),
    *([], {}, [[]], {"a": {}}, "a" * 5000, "\ud800"),
]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat or overwrite bytes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(64)
        place = min(place, max(0, len(data) - 1))
        match rng.randrange(5):
            case 0:
                data[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[place:]
            case 2:
                data[place:place] = data[place : place + rng.randrange(1, 64)]
            case 3:
                data[place : place + 8] = struct.pack("<q", rng.choice((-1, 0, 2**31, 2**62)))
            case _:
                del data[place : place + rng.randrange(1, 32)]
    return bytes(data)


def twisted(value, rng: random.Random):
    """Replace, drop or add one thing somewhere in a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: twisted(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], twisted(value[place], rng), *value[place + 1 :]]
    return rng.choice(ODD)


def json_bytes(value) -> bytes:
    """Write JSON, deep nesting now and then."""
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def parts(demo_clip):
    """Return a checkpoint's tensors and metadata."""
    encoder = demo_clip[0]
    model = AdaViPro(encoder, torch.ones(2, 8), PromptConfig(embed_dim=1, region_size=8))
    return checkpoint_of(model, ("a", "b"))


def parted(content: bytes):
    """Return a safetensors file whole, its header and what follows it."""
    (length,) = struct.unpack("<Q", content[:8])
    return content, json.loads(content[8 : 8 + length]), content[8 + length :]


def checkpoint_seeds(parts, folder, tmp):
    parts.save(tmp / "seed.safetensors")
    return parted((tmp / "seed.safetensors").read_bytes())


def checkpoint_input(seeds, rng):
    content, header, tail = seeds
    if rng.random() < 0.4:
        return mutated(content, rng)
    header = dict(header)
    if rng.random() < 0.6:
        metadata = dict(header["__metadata__"])
        key = rng.choice(sorted(metadata))
        metadata[key] = json.dumps(twisted(json.loads(metadata[key]), rng))
        if rng.random() < 0.05:
            metadata[key] = "[" * 100_000
        header["__metadata__"] = metadata
    else:
        header = twisted(header, rng)
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + tail


def state_seeds(parts, folder, tmp):
    from dataclasses import asdict

    metadata = {
        "settings": {"model": "demo"},
        "identity": {"data": "a"},
        "progress": asdict(Progress()),
    }
    return parted(safetensors_bytes({"prompt": torch.zeros(3, 4, 4)}, metadata))


def head_seeds(parts, folder, tmp):
    metadata = {
        "format": BASELINE_FORMAT,
        "config": asdict(PromptConfig(method="linear_probe")),
        "class_names": ["a", "b"],
        "encoder": asdict(parts.encoder),
        "preprocess": parts.preprocess.stored(),
    }
    width = small_clip().visual.proj.shape[0]
    tensors = {"head.weight": torch.zeros(2, width), "head.bias": torch.zeros(2)}
    return parted(safetensors_bytes(tensors, metadata))


def task_seeds(parts, folder, tmp):
    tables = {
        "kernels": torch.zeros(3, 34, 34),
        "constants": torch.zeros(49),
        "rows": torch.zeros(1, 4, 2),
        "classes": torch.zeros(len(parts.class_names), 3),
        "biases": torch.zeros(len(parts.class_names)),
    }
    task = TaskFile("t", tables, parts.class_names, parts.config, parts.encoder, parts.preprocess)
    task.save(tmp / "seed.task")
    return parted((tmp / "seed.task").read_bytes())


@cache
def small_clip():
    return load_encoder("demo")


def read_head(path):
    return load_checkpoint(path).model(small_clip())


def onnx_seeds(parts, folder, tmp):
    node = onnx.helper.make_node("Identity", ["image"], ["logits"])
    value = [onnx.helper.make_tensor_value_info(n, 1, ["b"]) for n in ("image", "logits")]
    graph = onnx.helper.make_graph([node], "g", value[:1], value[1:])
    about = {
        "format": "adavipro-fast/1",
        "class_names": ["a", "b"],
        "preprocess": asdict(Preprocess(32, (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest")),
        "config": asdict(PromptConfig()),
        "precision": "fp32",
        "input": "uint8",
        "baseline": False,
    }
    return graph, about


def onnx_input(seeds, rng):
    graph, about = seeds
    model = onnx.helper.make_model(graph)
    about = twisted(about, rng) if rng.random() < 0.8 else about
    texts = {str(k): json.dumps(v) for k, v in about.items()} if isinstance(about, dict) else {}
    if texts and rng.random() < 0.05:
        texts[rng.choice(sorted(texts))] = "[" * 100_000
    onnx.helper.set_model_props(model, texts | {SEAL_KEY: UNSEALED})
    content = model.SerializeToString()
    if rng.random() < 0.5:
        content = mutated(content, rng)
    try:
        return seal(content)
    except ValueError:
        return content


def sidecar_seeds(parts, folder, tmp):
    (tmp / "x.engine").write_bytes(b"plan")
    return {
        "class_names": ["a"],
        "runtime": "tensorrt",
        "runtime_version": "10",
        "compute_capabilities": ["8.6"],
        "batch": [1, 2, 3],
        "engine_sha256": hashlib.sha256(b"plan").hexdigest(),
    }


def sidecar_input(seeds, rng):
    values = twisted(seeds, rng)
    if isinstance(values, dict) and rng.random() < 0.9:
        values = values | {"sidecar_sha256": sidecar_sha256(values)}
    content = json.dumps(values).encode()
    return mutated(content, rng) if rng.random() < 0.3 else content


def split_seeds(parts, folder, tmp):
    return {name: [["a/1.jpg", 0, "a"], ["b/2.jpg", 1, "b"]] for name in ("train", "val", "test")}


def split_input(seeds, rng):
    content = json.dumps(twisted(seeds, rng)).encode()
    if rng.random() < 0.02:
        return b"[" * 100_000
    return mutated(content, rng) if rng.random() < 0.5 else content


def image_seeds(parts, folder, tmp):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    found = []
    for kind in FORMATS:
        stored = io.BytesIO()
        image.save(stored, kind)
        found.append(stored.getvalue())
    return found


def image_input(seeds, rng):
    return mutated(rng.choice(seeds), rng)


def cache_seeds(parts, folder, tmp):
    stored = io.BytesIO()
    np.save(stored, np.zeros((2, 3, 4, 4), np.uint8))
    return stored.getvalue()


def cache_input(seeds, rng):
    return mutated(seeds, rng)


def engine(sidecar):
    return sidecar.with_name("x.engine")


def decode_fuzzed(content):
    preprocess = Preprocess(32, (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest")
    return decode_image(content, "fuzz", preprocess)


READERS = {
    "checkpoint": (checkpoint_seeds, checkpoint_input, "c.safetensors", load_checkpoint),
    "head": (head_seeds, checkpoint_input, "head.safetensors", read_head),
    "task": (task_seeds, checkpoint_input, "x.task", load_task),
    "state": (state_seeds, checkpoint_input, "last.safetensors", read_state),
    "onnx": (onnx_seeds, onnx_input, "x.onnx", describe_onnx),
    "sidecar": (sidecar_seeds, sidecar_input, "x.engine.json", lambda p: read_sidecar(engine(p))),
    "split": (split_seeds, split_input, "split.json", read_split),
    "image": (image_seeds, image_input, None, decode_fuzzed),
    "cache": (cache_seeds, cache_input, "x.npy", opened),
}  # fmt: skip


def fuzz(name, parts, folder, tmp, count, seed):
    """Feed a reader; return how many inputs it took and refused."""
    seeds_of, make, file, reader = READERS[name]
    seeds, rng, taken = seeds_of(parts, folder, tmp), random.Random(seed), 0
    refusals = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        content = make(seeds, rng)
        if file is not None:
            (tmp / file).write_bytes(content)
        began = time.perf_counter()
        try:
            reader(content if file is None else tmp / file)
            taken += 1
        except (ValueError, OSError) as error:
            refusals.append(str(error))
        except BaseException as error:
            (tmp / "found").write_bytes(content)
            raise AssertionError(f"{name}, input {number}: {error!r} ({tmp / 'found'})") from error
        assert time.perf_counter() - began < 5, f"input {number} hangs"
    assert all(refusals), "an error without words"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500_000, f"memory grew by {grown} kB"
    return taken, count - taken


def test_cases_found_before_stay_found():
    values = asdict(Preprocess(32, (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest"))
    with pytest.raises(ValueError, match="mean contains a number that is too large"):
        read(Preprocess, values | {"mean": [10**400, 0.5, 0.5]})
    colours = read(Preprocess, values | {"mean": [1e306, -1e306, 0.5], "margin": 8}).pixels()
    assert colours(Image.new("RGB", (9, 9)))[:, 0, 0].tolist() == [255, 0, 128]


@pytest.mark.parametrize("name", READERS)
def test_no_input_gets_past_the_readers_errors(parts, folder, tmp_path, name):
    _, refused = fuzz(name, parts, folder, tmp_path, INPUTS, seed=1)
    assert refused > INPUTS // 10


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", READERS)
def test_30000_inputs_each(parts, folder, tmp_path, name):
    fuzz(name, parts, folder, tmp_path, 30_000, seed=2)
