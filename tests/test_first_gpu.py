"""What the first GPU would find, by the smallest test that a CPU can run."""

import ctypes
import hashlib
import json
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from adavipro_fast.artifact import onnx as artifact
from adavipro_fast.artifact import tensorrt as engine
from adavipro_fast.artifact.artifact import NotRunnableError
from adavipro_fast.artifact.open import open_onnx
from adavipro_fast.artifact.open_tasks import OpenArtifact
from adavipro_fast.data.sets import Dataset
from adavipro_fast.data.split import Split
from adavipro_fast.device import PRODUCTS, full_fp32, torch_device
from adavipro_fast.export import onnx_export
from adavipro_fast.export.network import Network
from adavipro_fast.export.onnx_export import OnnxConfig
from adavipro_fast.files import sealed
from adavipro_fast.files.about import Description, OpenFor
from adavipro_fast.files.checkpoint import checkpoint_of
from adavipro_fast.files.task import TaskFile
from adavipro_fast.method.config import EncoderIdentity, PromptConfig
from adavipro_fast.method.encoder import FrozenEncoder
from adavipro_fast.method.model import AdaViPro
from adavipro_fast.method.preprocess import Preprocess
from adavipro_fast.training.batches import Batch
from adavipro_fast.training.config import OptimiserConfig
from adavipro_fast.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def two_gpus(monkeypatch):
    """torch as on a machine with two GPUs, of which the second is the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


def test_a_cuda_device_has_its_number_from_the_start(two_gpus):
    assert torch_device("auto") == torch_device("cuda") == torch.device("cuda", 1)
    assert torch_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="'cuda:2' does not exist; PyTorch finds 2 CUDA devices"):
        torch_device("cuda:2")


@pytest.mark.parametrize("name", ["mps", "meta", "cpu:x", "tpu"])
def test_other_devices_are_refused(name):
    with pytest.raises(ValueError, match="use auto, cpu or cuda"):
        torch_device(name)


class Watching(torch.nn.Module):
    """An image tower that notes how exact its products may be."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(3, 8), []

    def forward(self, images):
        self.seen.append([product.fp32_precision for product in PRODUCTS])
        return self.layer(images.mean((2, 3)))


def model_of(visual, side=16, **config):
    preprocess = Preprocess(side, (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest")
    encoder = FrozenEncoder(visual, preprocess, name="test", pretrained="", logit_scale=1.0)
    config = {"prompt_size": 4, "region_size": 8, "embed_dim": 2} | config
    return AdaViPro(encoder, F.normalize(torch.randn(5, 8), dim=-1), PromptConfig(**config))


@pytest.fixture
def allowed_tf32():
    """A caller who allows TF32 for other work."""
    before = [product.fp32_precision for product in PRODUCTS]
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield [product.fp32_precision for product in PRODUCTS]
    for product, precision in zip(PRODUCTS, before, strict=True):
        product.fp32_precision = precision


def test_masks_and_encoder_run_without_tf32_and_the_callers_settings_stay(
    allowed_tf32, monkeypatch
):
    visual, seen = Watching(), []
    model = model_of(visual)
    collapsed = model.prompt.generator.collapsed

    def watched():
        seen.append([product.fp32_precision for product in PRODUCTS])
        return collapsed()

    monkeypatch.setattr(model.prompt.generator, "collapsed", watched)
    model(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert visual.seen == seen == [["ieee"] * len(PRODUCTS)]
    assert [product.fp32_precision for product in PRODUCTS] == allowed_tf32
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


PROBE = """
import torch
from adavipro_fast.device import PRODUCTS, full_fp32

def look():
    older = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    return (*older, torch.get_float32_matmul_precision(), *(p.fp32_precision for p in PRODUCTS))

{}
before = look()
with full_fp32():
    inside = look()
    assert inside == (False, False, "highest", *["ieee"] * len(PRODUCTS)), inside
    # As torch.export does.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert look()[0] is False
    assert look()[0] is False
assert look() == before, (before, look())
"""


@pytest.mark.parametrize(
    "setting",
    [
        "",
        "torch.set_float32_matmul_precision('high')",
        pytest.param("torch.backends.cudnn.allow_tf32 = False", marks=pytest.mark.slow),
        pytest.param("torch.backends.cuda.matmul.allow_tf32 = True", marks=pytest.mark.slow),
        "torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    ],
)
def test_older_settings_can_be_read_inside_and_are_the_callers_after(setting):
    subprocess.run([sys.executable, "-c", PROBE.format(setting)], check=True)


def test_an_error_inside_restores_the_callers_settings(allowed_tf32):
    with pytest.raises(ZeroDivisionError), full_fp32():
        raise ZeroDivisionError
    assert [product.fp32_precision for product in PRODUCTS] == allowed_tf32


def test_threads_inside_together_restore_the_settings_when_the_last_one_leaves(allowed_tf32):
    first, second = full_fp32(), full_fp32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert {product.fp32_precision for product in PRODUCTS} == {"ieee"}
    second.__exit__(None, None, None)
    assert [product.fp32_precision for product in PRODUCTS] == allowed_tf32


def trainer(tmp_path, model, count=4):
    images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8)
    split = Split(images, torch.arange(count) % 5, torch.arange(count))
    dataset = Dataset(tuple("abcde"), split, split, split, "")
    config = OptimiserConfig(epochs=1, batch_size=count, precision="fp32")
    return Trainer(model, dataset, config, output=tmp_path, settings={})


class Operators(TorchDispatchMode):
    """Records the operators that run, and how exact backward passes may be."""

    def __init__(self):
        super().__init__()
        self.names, self.backward = set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        if "backward" in str(function):
            self.backward.append([product.fp32_precision for product in PRODUCTS])
        return function(*args, **(kwargs or {}))


def test_a_step_waits_for_the_device_once(tmp_path):
    run = trainer(tmp_path, model_of(Watching()))
    images, labels = run.dataset.train.batch(torch.arange(4), CPU)
    with Operators() as operators:
        run._step(Batch(images, labels, torch.arange(4), 4), 1.0)
    # An index by a mask asks the device how long its result is.
    waits = ("aten.index.Tensor", "aten.nonzero", "aten._local_scalar_dense", "aten.item")
    assert not [name for name in operators.names if name.startswith(waits)]


def test_a_steps_density_is_that_of_the_frames_regions(tmp_path):
    run = trainer(tmp_path, model_of(Watching(), side=32, method="vp"))
    model = run.model
    run.inside[:] = False
    run.inside[0, 1:] = True
    run.weights = run.inside / run.inside.sum()
    masks = torch.zeros(2, 4, 4)
    masks[0, 0, 1] = masks[1, 0, :3] = 1
    model.prompted = lambda *_, **__: SimpleNamespace(images=None, mask=masks)
    run._logits = lambda *_: model.prompt.template.values[:10].view(2, 5)
    run.config = replace(run.config, batch_size=2)
    labels = torch.zeros(2, dtype=torch.long)
    density = run._step(Batch(torch.zeros(2), labels, torch.arange(2), 2), 1.0)[2]
    assert density == pytest.approx((1 / 3 + 2 / 3) / 2)


def test_training_runs_backward_without_tf32_too(tmp_path, allowed_tf32):
    run = trainer(
        tmp_path, model_of(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 8)))
    )
    with Operators() as operators:
        run.run()
    assert operators.backward
    assert all(seen == ["ieee"] * len(PRODUCTS) for seen in operators.backward)
    assert [product.fp32_precision for product in PRODUCTS] == allowed_tf32


@pytest.fixture(scope="module")
def checkpoint(demo_clip, tmp_path_factory):
    """Checkpoints of the demo's encoder: adavipro and vp."""
    encoder, text = demo_clip
    folder = tmp_path_factory.mktemp("checkpoints")
    classes = text.class_embeddings(["disc", "ring"], ["{}"])
    paths = {}
    for method in ("adavipro", "vp"):
        torch.manual_seed(0)
        model = AdaViPro(encoder, classes, PromptConfig(method=method, embed_dim=3))
        paths[method] = folder / f"{method}.safetensors"
        checkpoint_of(model, ("disc", "ring")).save(paths[method])
    return paths


def test_onnx_runtimes_cuda_provider_is_told_to_leave_tf32(checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "f.onnx"
    onnx_export.export(OnnxConfig(checkpoint["adavipro"], path))
    asked = []

    def session(_, options, providers):
        asked.append((providers, options.get_session_config_entry(NO_FALLBACK)))
        raise RuntimeError("no GPU here")

    monkeypatch.setattr(artifact, "torch_device", lambda _: torch.device("cuda", 1))
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(NotRunnableError, match="no GPU here"):
        open_onnx(path, "cuda", "onnxruntime")
    provider = ("CUDAExecutionProvider", {"device_id": 1, "use_tf32": "0"})
    assert asked == [([provider], "1")]


NO_FALLBACK = "session.disable_cpu_ep_fallback"


def test_bf16_is_left_unverified_where_torch_sees_cuda_and_onnx_runtime_cannot_load_it(
    checkpoint, tmp_path, monkeypatch
):
    verdict = onnx_export.Trial.verdict

    def with_a_gpu(trial):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "device_count", lambda: 1)
            patch.setattr(torch.cuda, "current_device", lambda: 0)
            return verdict(trial)

    monkeypatch.setattr(onnx_export.Trial, "verdict", with_a_gpu)
    config = OnnxConfig(checkpoint["adavipro"], tmp_path / "f.onnx", precision="bf16")
    result = onnx_export.export(config)
    assert result["verified"] is False
    assert "ONNX Runtime cannot run bf16 here" in result["reason"]
    assert config.output.exists()


@pytest.mark.parametrize("method", ["adavipro", "vp"])
@pytest.mark.parametrize("graph", ["folded", "pixel"])
def test_no_node_computes_shapes_which_onnx_runtime_would_put_on_the_host(
    checkpoint, tmp_path, method, graph
):
    path = tmp_path / "f.onnx"
    result = onnx_export.export(OnnxConfig(checkpoint[method], path, graph=graph, input="uint8"))
    assert result["verified"]
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert not kinds & {"Shape", "Expand", "ConstantOfShape", "Range", "Size", "Concat"}


def rtx():
    try:
        return engine.runtime_module("tensorrt-rtx")
    except ImportError as error:
        pytest.skip(str(error))


def test_engines_are_built_without_tf32(checkpoint, tmp_path):
    trt, path = rtx(), tmp_path / "f.onnx"
    onnx_export.export(OnnxConfig(checkpoint["adavipro"], path, precision="fp16"))
    network = Network(trt, "tensorrt-rtx", path)
    fresh = network.builder.create_builder_config()
    assert fresh.get_flag(trt.BuilderFlag.TF32), "off by default: the line that clears it can go"
    options = network.options({"batch": (1, 2, 4)}, ["8.6"], 3)
    assert not options.get_flag(trt.BuilderFlag.TF32)


class Context:
    """An execution context that computes on the CPU: logits are each image's sum."""

    def __init__(self):
        self.addresses = {}

    def set_input_shape(self, _, shape):
        self.shape = shape

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def get_tensor_shape(self, name):
        return (self.shape[0], *{"logits": (2,), "mask": (1, 1), "embedding": (1,)}[name])

    def execute_async_v3(self, _):
        count, size = self.shape[0], self.shape[1] * self.shape[2] * self.shape[3]
        pixels = (ctypes.c_uint8 * (count * size)).from_address(self.addresses["image"])
        logits = (ctypes.c_float * (2 * count)).from_address(self.addresses["logits"])
        for image in range(count):
            logits[2 * image] = sum(pixels[image * size : (image + 1) * size])
            logits[2 * image + 1] = count
        return True


class FakeEngine:
    """An engine whose contexts work; `strategy` is what TensorRT-RTX was asked for."""

    num_io_tensors = 4

    def __init__(self):
        self.contexts, self.strategies = [], []

    def get_tensor_name(self, index):
        return ("image", "logits", "mask", "embedding")[index]

    def create_runtime_config(self):
        return SimpleNamespace(dynamic_shapes_kernel_specialization_strategy=None)

    def create_execution_context(self, options=None):
        if options is not None:
            self.strategies.append(options.dynamic_shapes_kernel_specialization_strategy)
        self.contexts.append(Context())
        return self.contexts[-1]


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs that run their context again when they are replayed."""

    class Graph:
        def replay(self):
            self.context.execute_async_v3(0)

    stream = SimpleNamespace(cuda_stream=0, wait_stream=lambda _: None, synchronize=lambda: None)
    enqueue, captured = engine.EngineArtifact._enqueue, []

    def watched(self, context, stream):
        captured.append(context)
        enqueue(self, context, stream)

    class Capture(nullcontext):
        def __init__(self, graph, stream, capture_error_mode):
            assert capture_error_mode == "thread_local"
            super().__init__()
            self.graph = graph

        def __exit__(self, *_):
            self.graph.context = captured[-1]

    monkeypatch.setattr(engine.EngineArtifact, "_enqueue", watched)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)


def engine_artifact(backend="tensorrt-rtx"):
    preprocess = Preprocess(8, (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest")
    config = PromptConfig(prompt_size=2, region_size=8)
    about = Description(("a", "b"), preprocess, config, "fp32", "uint8", False)
    strategies = SimpleNamespace(EAGER="eager", LAZY="lazy")
    trt = SimpleNamespace(DynamicShapesKernelSpecializationStrategy=strategies)
    return engine.EngineArtifact(trt, FakeEngine(), about, (1, 4, 16), CPU, backend, "")


def sums(pixels):
    return pixels.flatten(1).sum(1, dtype=torch.float32)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_batches_of_sizes_a_b_a_replay_what_was_captured_for_them(graphs, backend):
    run = engine_artifact(backend)
    for count in (3, 9, 3, 4, 1, 40, 9):
        pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)
        assert torch.equal(run(pixels).logits[:, 0], sums(pixels)), count
    # 3 and 4 share a size, 40 is three parts of 16, 16 and 8.
    assert sorted(run.replays) == [1, 4, 8, 16]
    assert len({id(replay.context) for replay in run.replays.values()}) == 4
    assert set(run.engine.strategies) == ({"eager"} if backend == "tensorrt-rtx" else set())


def test_a_profile_of_256_images_keeps_nine_sizes():
    sizes = {engine.padded_size(count, (1, 16, 256)) for count in range(1, 257)}
    assert sorted(sizes) == [2**power for power in range(9)]
    assert engine.padded_size(5, (3, 4, 10)) == 6
    assert engine.padded_size(9, (3, 4, 10)) == 10


def test_threads_share_an_engine(graphs):
    run, wrong = engine_artifact(), []

    def call(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(10):
            count = int(torch.randint(1, 9, (), generator=generator))
            pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
            if not torch.equal(run(pixels).logits[:, 0], sums(pixels)):
                wrong.append(seed)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class DataContext(Context):
    """Of tasks as data: logits are the image's sum and the biases of its task."""

    def __init__(self, largest):
        super().__init__()
        self.largest, self.shapes = largest, {}

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return name not in self.largest or shape[0] <= self.largest[name]

    def get_tensor_shape(self, name):
        count, classes = self.shapes["image"][0], self.shapes["biases"][1]
        return (count, *{"logits": (classes,), "mask": (1, 1), "embedding": (1,)}[name])

    def of(self, name, kind):
        shape = self.shapes.get(name) or self.get_tensor_shape(name)
        count = int(np.prod(shape))
        values = (kind * count).from_address(self.addresses[name])
        return np.frombuffer(values, kind).reshape(shape)

    def execute_async_v3(self, _):
        totals = self.of("image", ctypes.c_uint8).reshape(self.shapes["image"][0], -1).sum(1)
        own = self.of("biases", ctypes.c_float)[self.of("task", ctypes.c_int64)]
        self.of("logits", ctypes.c_float)[:] = totals[:, None] + own
        return True


class DataEngine(FakeEngine):
    """An engine whose tasks are data; it has no kernels, as without a mask path."""

    shapes: ClassVar = {
        "image": (-1, 3, 8, 8), "task": (-1,), "constants": (-1, 1), "rows": (-1, 1, 1, 2),
        "classes": (-1, -1, 4), "biases": (-1, -1), "logits": (-1, -1), "mask": (-1, 1, 1),
        "embedding": (-1, 1),
    }  # fmt: skip
    num_io_tensors = len(shapes)

    def get_tensor_name(self, index):
        return list(self.shapes)[index]

    def get_tensor_shape(self, name):
        return self.shapes[name]

    def get_tensor_mode(self, name):
        outputs = ("logits", "mask", "embedding")
        return SimpleNamespace(name="OUTPUT" if name in outputs else "INPUT")

    def create_execution_context(self, options=None):
        self.contexts.append(DataContext({"biases": 2}))
        return self.contexts[-1]


def test_an_engine_takes_tasks_as_data_in_parts_of_its_profile(monkeypatch):
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    run = engine_artifact("tensorrt")
    about = replace(run.about, open_for=OpenFor("0" * 64, None, "zero"), tasks=())
    run = replace(run, engine=DataEngine(), about=about, batch=(2, 4, 8))
    artifact = OpenArtifact(run)
    biases = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0, 5.0])}
    for name, values in (*biases.items(), ("c", torch.zeros(1))):
        count = len(values)
        tables = {
            "kernels": torch.zeros(3, 10, 10), "constants": torch.ones(1),
            "rows": torch.zeros(1, 1, 2), "classes": torch.zeros(count, 4), "biases": values,
        }  # fmt: skip
        identity = EncoderIdentity("x", "", "0" * 64)
        config = PromptConfig(method="vp", prompt_size=2, region_size=8)
        names = tuple("uvw"[:count])
        artifact.add(TaskFile(name, tables, names, config, identity, about.preprocess))
    for count in (1, 5, 19):
        pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)
        asked = (["a", "b", "b"] * count)[:count]
        logits = artifact(pixels, asked).logits
        for row, name in enumerate(asked):
            expected = sums(pixels[row : row + 1]) + biases[name]
            assert torch.equal(logits[row, : len(expected)], expected), (count, row)
    # The tables lie where they were, and one context serves all calls.
    assert len(run.engine.contexts) == 1
    with pytest.raises(ValueError, match=r"biases of shape \(3, 3\) is outside the engine's range"):
        artifact(pixels[:3], ["a", "b", "c"])


def test_an_engine_opens_on_the_default_device(monkeypatch, tmp_path, two_gpus):
    values = {
        "runtime": "tensorrt", "runtime_version": "1", "compute_capabilities": ["9.0"],
        "batch": [1, 2, 4],
    }  # fmt: skip
    run, chosen = engine_artifact("tensorrt"), []
    shapes = {"image": (-1, 3, 8, 8), "logits": (-1, 2), "mask": (-1, 1, 1), "embedding": (-1, 1)}
    run.engine.get_tensor_shape = shapes.__getitem__
    loaded = SimpleNamespace(deserialize_cuda_engine=lambda _: run.engine)
    trt = SimpleNamespace(
        __version__="1", Runtime=lambda _: loaded, Logger=SimpleNamespace(ERROR=0)
    )
    trt.Logger = type("Logger", (), {"ERROR": 0, "__init__": lambda self, _: None})
    monkeypatch.setattr(engine, "read_sidecar", lambda _: values)
    monkeypatch.setattr(engine, "runtime_module", lambda _: trt)
    monkeypatch.setattr(engine.Description, "of", lambda *_: run.about)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    # As torch itself refuses a device without a number.
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index + 0))
    (tmp_path / "f.engine").write_bytes(b"")
    opened = engine.EngineArtifact.open(tmp_path / "f.engine")
    assert chosen == [1]
    assert opened.device == torch.device("cuda", 1)
    shapes["logits"] = (-1, 3)
    with pytest.raises(ValueError, match=r"gives logits the shape \[2\], but the graph has \[3\]"):
        engine.EngineArtifact.open(tmp_path / "f.engine")


class TimingOptions:
    def __init__(self, takes=True):
        self.takes, self.known = takes, None

    def create_timing_cache(self, known):
        self.known = known
        return SimpleNamespace(serialize=lambda: known + b"+")

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        return self.takes

    def get_timing_cache(self):
        return self.cache


def test_timings_are_kept_whole_and_refused_where_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU 1")
    network = Network.__new__(Network)
    network.trt, network.runtime, network.definition = SimpleNamespace(__version__="11"), "t", None
    network.builder = SimpleNamespace(build_serialized_network=lambda *_: b"plan")
    for known in (b"", b"+", b"++"):
        options = TimingOptions()
        assert network._build_with_timings(options, tmp_path) == b"plan"
        assert options.known == known
    (path,) = tmp_path.iterdir()
    assert path.name == "11-GPU-1.timings"
    content = path.read_bytes()
    assert content == hashlib.sha256(b"+++").digest() + b"+++"
    for damaged in (content[:-1], content[:5], b"", content + b"!"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="timing cache .* is damaged; remove it"):
            network._build_with_timings(TimingOptions(), tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="rejects the timing cache"):
        network._build_with_timings(TimingOptions(takes=False), tmp_path)


def test_no_bench_has_the_name_of_a_package(monkeypatch):
    folder = Path(__file__).parents[1] / "bench"
    ours = {path.stem for path in folder.iterdir()}
    # A script's folder comes first on the path: transformers would import bench/kernels.py.
    assert not ours & ({"kernels"} | set(metadata.packages_distributions()))


def test_metadata_of_another_graph_is_refused(checkpoint, tmp_path):
    path = tmp_path / "f.onnx"
    onnx_export.export(OnnxConfig(checkpoint["adavipro"], path))
    model = onnx.load(path)
    about = {p.key: json.loads(p.value) for p in model.metadata_props if p.key != sealed.SEAL_KEY}
    for change, message in (
        ({"class_names": ["disc"]}, r"gives logits the shape \[1\], but the graph has \[2\]"),
        ({"config": about["config"] | {"region_size": 3000}}, "region size 3000 does not divide"),
        ({"config": about["config"] | {"region_size": 16}}, r"gives mask the shape \[14, 14\]"),
        (
            {"preprocess": about["preprocess"] | {"size": 4096}},
            r"image the shape \[3, 4096, 4096\], but the",
        ),
        ({"config": about["config"] | {"prompt_size": 200}}, "prompt size 200 does not fit"),
    ):
        texts = {key: json.dumps(value) for key, value in (about | change).items()}
        onnx.helper.set_model_props(model, texts | {sealed.SEAL_KEY: sealed.UNSEALED})
        bad = tmp_path / "bad.onnx"
        bad.write_bytes(sealed.seal(model.SerializeToString()))
        with pytest.raises(ValueError, match=message):
            open_onnx(bad, "cpu", "onnxruntime")


def write_sealed(path, model, about):
    texts = {key: json.dumps(value) for key, value in about.items()}
    onnx.helper.set_model_props(model, texts | {sealed.SEAL_KEY: sealed.UNSEALED})
    path.write_bytes(sealed.seal(model.SerializeToString()))


def test_weights_from_elsewhere_are_refused_wherever_they_are_named(tmp_path):
    outside = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=1)
    outside.external_data.add(key="location", value="../secret")
    value = [onnx.helper.make_tensor_value_info(n, 1, [1]) for n in "xy"]
    constant = onnx.helper.make_node("Constant", [], ["y"], value=outside)
    inner = onnx.helper.make_graph([constant], "inner", [], value[1:])
    branch = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    graphs = {
        "initializer": onnx.helper.make_graph([], "g", [], value[:1], [outside]),
        "constant": onnx.helper.make_graph([constant], "g", [], value[1:]),
        "subgraph": onnx.helper.make_graph([branch], "g", [], value[1:]),
    }
    for name, graph in graphs.items():
        path = tmp_path / f"{name}.onnx"
        write_sealed(path, onnx.helper.make_model(graph), {"format": "adavipro-fast/1"})
        with pytest.raises(ValueError, match=f"refers to weights outside {name}.onnx.data"):
            sealed.describe_onnx(path)
    # The right name without its hash is not enough.
    outside.external_data[0].value = "own.onnx.data"
    graph = onnx.helper.make_graph([], "g", [], value[:1], [outside])
    write_sealed(
        tmp_path / "own.onnx", onnx.helper.make_model(graph), {"format": "adavipro-fast/1"}
    )
    with pytest.raises(ValueError, match="refers to weights outside"):
        sealed.describe_onnx(tmp_path / "own.onnx")
