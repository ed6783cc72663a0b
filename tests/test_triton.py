"""Triton's model repository: configurations that parse, and answers of the real server."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.grpc
import tritonclient.http
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from adavipro_fast import AdaViPro, PromptConfig, evaluate, predict
from adavipro_fast.data.sets import DataConfig
from adavipro_fast.evaluate import EvaluateConfig
from adavipro_fast.export import onnx_export, to_triton
from adavipro_fast.export.onnx_export import OnnxConfig
from adavipro_fast.export.to_triton import TritonConfig
from adavipro_fast.files.checkpoint import checkpoint_of
from adavipro_fast.method.calibration import Calibration
from adavipro_fast.predict import PredictConfig

TASKS = {"shapes": ("circle", "cross", "crescent"), "signs": ("yes", "no")}
HOME = os.environ.get("ADAVIPRO_TRITON")


@pytest.fixture(scope="module")
def files(demo_clip, tmp_path_factory):
    """A file of one task, and one of two."""
    root, (encoder, text) = tmp_path_factory.mktemp("files"), demo_clip
    torch.manual_seed(5)
    paths = []
    for task, names in TASKS.items():
        config = PromptConfig(embed_dim=4, edge="laplacian-magnitude", edge_padding="replicate")
        model = AdaViPro(encoder, text.class_embeddings(names, ["{}"]), config)
        stored = replace(checkpoint_of(model, names), calibration=Calibration(2.0))
        paths.append(root / task / "checkpoint.safetensors")
        stored.save(paths[-1])
    onnx_export.export(OnnxConfig(paths[0], root / "shapes.onnx", input="uint8"))
    onnx_export.export(OnnxConfig(paths[0], root / "many.onnx", (paths[1],), input="uint8"))
    return root


def parsed(repository, model):
    text = (repository / model / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.mark.parametrize("name", ["shapes", "many"])
def test_configurations_are_tritons(files, tmp_path, name):
    result = to_triton.command(TritonConfig(files / f"{name}.onnx", tmp_path / "r", batch=24))
    assert (result["version"], result["max_batch_size"]) == (1, 24)
    repository = tmp_path / "r"
    graph = parsed(repository, name)
    assert (graph.backend, graph.max_batch_size) == ("onnxruntime", 24)
    assert list(graph.dynamic_batching.preferred_batch_size) == [8, 16, 24]
    assert not graph.response_cache.enable
    assert [warm.batch_size for warm in graph.model_warmup] == [1, 24]
    outputs = {each.name: list(each.dims) for each in graph.output}
    assert outputs == {"logits": [3], "mask": [7, 7], "embedding": [64]}
    assert [each.name for each in graph.input] == ["image", "task"][: 1 + (name == "many")]
    steps = parsed(repository, f"{name}_classify").ensemble_scheduling.step
    assert [step.model_name for step in steps] == [
        f"{name}_preprocess",
        name,
        f"{name}_postprocess",
    ]
    if name == "shapes":
        labels = (repository / name / "labels.txt").read_text().splitlines()
        assert labels == list(TASKS["shapes"])
    assert (repository / name / "1" / "model.onnx").read_bytes() == (
        files / f"{name}.onnx"
    ).read_bytes()


def test_another_export_is_the_next_version(files, tmp_path):
    config = TritonConfig(files / "shapes.onnx", tmp_path / "r", name="m")
    before = None
    for version in (1, 2, 3):
        assert to_triton.command(config)["version"] == version
        status = (tmp_path / "r" / "m" / "config.pbtxt").stat()
        assert before in (None, status.st_mtime_ns)
        before = status.st_mtime_ns
    other = TritonConfig(files / "many.onnx", tmp_path / "r", name="m")
    with pytest.raises(ValueError, match="m exists with other tasks; choose another --name"):
        to_triton.command(other)


def test_what_triton_cannot_serve_is_refused(files, tmp_path):
    checkpoint = files / "shapes" / "checkpoint.safetensors"
    with pytest.raises(ValueError, match=r"is not an .onnx or .engine file; export it"):
        to_triton.command(TritonConfig(checkpoint, tmp_path / "r"))
    onnx_export.export(OnnxConfig(checkpoint, tmp_path / "f.onnx"))
    with pytest.raises(ValueError, match="needs normalised floats; export it with --input uint8"):
        to_triton.command(TritonConfig(tmp_path / "f.onnx", tmp_path / "r"))
    with pytest.raises(ValueError, match="is not a valid model name"):
        to_triton.command(TritonConfig(files / "shapes.onnx", tmp_path / "r", name="a/b"))
    with pytest.raises(ValueError, match="batch is 0"):
        TritonConfig(files / "shapes.onnx", tmp_path / "r", batch=0)
    assert not (tmp_path / "r").exists()


@pytest.fixture(scope="module")
def serving(files, tmp_path_factory):
    """The real server with both files."""
    if HOME is None:
        pytest.skip("ADAVIPRO_TRITON names no folder made by tests/triton/setup.sh")
    sys.path.insert(0, str(Path(__file__).parent / "triton"))
    import tritonserver

    repository = tmp_path_factory.mktemp("served") / "repository"
    for name in ("shapes", "many"):
        to_triton.command(TritonConfig(files / f"{name}.onnx", repository, device="cpu"))
    with tritonserver.running(Path(HOME), repository, poll=True) as ports:
        yield repository, ports


def texts(name, values, module=tritonclient.http):
    array = np.array(values, dtype=object).reshape(-1, 1)
    tensor = module.InferInput(name, list(array.shape), "BYTES")
    tensor.set_data_from_numpy(array)
    return tensor


@pytest.mark.server
@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_the_server_answers_like_predict(serving, files, folder, kind):
    _, ports = serving
    module = getattr(tritonclient, kind)
    client = module.InferenceServerClient(f"127.0.0.1:{getattr(ports, kind)}")
    images = sorted((folder / "test").rglob("*.*"))
    expected = predict.command(PredictConfig(files / "shapes.onnx", tuple(images), device="cpu"))
    encoded = texts("encoded", [image.read_bytes() for image in images], module)
    result = client.infer("shapes_classify", [encoded])
    for got, probability, own in zip(
        result.as_numpy("class")[:, 0],
        result.as_numpy("probability")[:, 0],
        expected["predictions"],
        strict=True,
    ):
        assert got.decode() == own["answer"]
        assert probability == pytest.approx(own["classes"][0]["probability"], abs=1e-4)
    # A file of several tasks is asked by name.
    names = [list(TASKS)[n % 2].encode() for n in range(len(images))]
    result = client.infer("many_classify", [encoded, texts("task", names, module)])
    for got, task in zip(result.as_numpy("class")[:, 0], names, strict=True):
        assert got.decode() in TASKS[task.decode()]


@pytest.mark.server
def test_labels_batches_errors_and_versions_of_the_server(serving, files, folder):
    repository, ports = serving
    address = f"127.0.0.1:{ports.http}"
    client = tritonclient.http.InferenceServerClient(address, concurrency=32)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 224, 224), np.uint8)
    tensor = tritonclient.http.InferInput("image", [1, 3, 224, 224], "UINT8")
    tensor.set_data_from_numpy(pixels)
    top = tritonclient.http.InferRequestedOutput("logits", class_count=1)
    label = client.infer("shapes", [tensor], outputs=[top]).as_numpy("logits")[0, 0]
    assert label.decode().split(":")[2] in TASKS["shapes"]

    def runs():
        (stats,) = client.get_inference_statistics("shapes")["model_stats"]
        return stats["inference_count"], stats["execution_count"]

    before = runs()
    image = sorted((folder / "test").rglob("*.*"))[0].read_bytes()
    contents = [image] * 32
    contents[7] = b"no image"
    sent = [client.async_infer("shapes_classify", [texts("encoded", [c])]) for c in contents]
    answers = []
    for number, request in enumerate(sent):
        if number == 7:
            with pytest.raises(tritonclient.utils.InferenceServerException, match="cannot read"):
                request.get_result()
        else:
            answers.append(request.get_result().as_numpy("class")[0, 0])
    assert len(answers) == 31
    assert len(set(answers)) == 1
    images, calls = (now - then for now, then in zip(runs(), before, strict=True))
    assert images == 31
    assert calls < 31
    with pytest.raises(
        tritonclient.utils.InferenceServerException, match="unknown task 'x'; use one of"
    ):
        client.infer("many_classify", [texts("encoded", [image]), texts("task", [b"x"])])
    to_triton.command(TritonConfig(files / "shapes.onnx", repository, device="cpu"))
    end = time.monotonic() + 60
    while not client.is_model_ready("shapes", "2") and time.monotonic() < end:
        assert client.infer("shapes_classify", [texts("encoded", [image])]).as_numpy("class")
        time.sleep(0.1)
    assert client.is_model_ready("shapes", "2")
    client.close()


@pytest.mark.server
@pytest.mark.real
@pytest.mark.slow
def test_the_server_is_as_right_as_evaluate_on_flowers(serving, tmp_path):
    shared = Path(__file__).parents[2] / "shared"
    data = tmp_path / "data"
    shutil.unpack_archive(shared / "data" / "flowers5.tar", data)
    command = [sys.executable, "-m", "adavipro_fast.train", "--method", "linear_probe"]
    model = f"local-dir:{shared / 'models' / 'vit-tiny-16-aligned'}"
    flags = ["--model", model, "--data", str(data / "flowers5"), "--output", str(tmp_path / "run")]
    subprocess.run([*command, *flags, "--cache-dir", str(tmp_path)], check=True)
    path = tmp_path / "flowers.onnx"
    onnx_export.export(OnnxConfig(tmp_path / "run" / "head.safetensors", path, input="uint8"))
    own = evaluate.command(
        EvaluateConfig(path, DataConfig(str(data / "flowers5"), cache_dir=tmp_path), device="cpu")
    )
    repository, ports = serving
    to_triton.command(TritonConfig(path, repository, device="cpu"))
    client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{ports.http}", concurrency=8)
    end = time.monotonic() + 90
    while not client.is_model_ready("flowers_classify") and time.monotonic() < end:
        time.sleep(0.2)
    images = sorted((data / "flowers5" / "test").rglob("*.jpg"))

    def right(image):
        encoded = texts("encoded", [image.read_bytes()])
        local = tritonclient.http.InferenceServerClient(f"127.0.0.1:{ports.http}")
        found = local.infer("flowers_classify", [encoded]).as_numpy("class")[0, 0].decode()
        return found == image.parent.name

    with ThreadPoolExecutor(8) as pool:
        top1 = 100 * np.mean(list(pool.map(right, images)))
    print(json.dumps({"server": top1, "evaluate": own["top1"]}))
    assert top1 == pytest.approx(own["top1"], abs=0.01)
