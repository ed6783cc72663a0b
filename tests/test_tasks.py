"""Many tasks in one file: each image gets its own task's answer, whatever stands beside it."""

import json
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from adavipro_fast import AdaViPro, PromptConfig, open_artifact, predict, tasks
from adavipro_fast.export import onnx_export, to_task, to_tensorrt
from adavipro_fast.export.graph import Form, deployed
from adavipro_fast.export.onnx_export import OnnxConfig
from adavipro_fast.export.to_task import TaskConfig
from adavipro_fast.files.checkpoint import checkpoint_of
from adavipro_fast.files.sealed import describe_onnx
from adavipro_fast.files.task import ABSENT, load_task
from adavipro_fast.predict import PredictConfig
from adavipro_fast.tasks import TasksConfig

KINDS = {
    "flowers": (3, {"edge": "laplacian-magnitude", "edge_padding": "replicate"}),
    "dtd": (5, {"method": "vp", "prompt_size": 60}),
    "bare": (2, {"method": "zero_shot"}),
    "far": (
        7,
        {
            "head": "linear",
            "head_input": "features",
            "prompt_size": 112,
            "edge": "laplacian-magnitude",
            "edge_padding": "replicate",
        },
    ),
    "near": (4, {"head": "linear", "head_input": "embedding", "edge": "sobel"}),
    "probe": (6, {"method": "linear_probe", "head": "linear", "head_input": "features"}),
}


@pytest.fixture(scope="module")
def checkpoints(demo_clip, tmp_path_factory):
    """Checkpoints of every kind of prompt and head, each in a folder of its task's name."""
    torch.manual_seed(0)
    paths = {}
    for name, (count, settings) in KINDS.items():
        config = PromptConfig(embed_dim=4, **settings)
        width = 160 if config.head_input == "features" else 64
        rows = torch.nn.functional.normalize(torch.randn(count, width), dim=-1)
        bias = torch.randn(count) if config.head == "linear" else None
        model = AdaViPro(demo_clip[0], rows, config, class_bias=bias)
        checkpoint = checkpoint_of(model, tuple(f"{name} {i}" for i in range(count)))
        paths[name] = tmp_path_factory.mktemp(name) / name / "checkpoint.safetensors"
        checkpoint.save(paths[name])
    return paths


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory):
    """Export all tasks once for each of some flags."""
    folder, done = tmp_path_factory.mktemp("many"), {}

    def export(**flags):
        key = json.dumps(flags, sort_keys=True)
        if key not in done:
            first, *more = checkpoints.values()
            path = folder / f"{len(done)}.onnx"
            done[key] = path, onnx_export.export(OnnxConfig(first, path, tuple(more), **flags))
        return done[key]

    return export


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (12, 3, 224, 224), dtype=torch.uint8)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        pytest.param({"graph": "pixel", "input": "uint8"}, marks=pytest.mark.slow),
        {"precision": "fp16", "input": "uint8"},
    ],
)
def test_a_mixed_batch_gets_the_answers_of_each_tasks_own_checkpoint(
    exported, checkpoints, pixels, flags
):
    path, result = exported(**flags)
    assert result["verified"]
    assert result["tasks"] == list(KINDS)
    names = [list(KINDS)[i % len(KINDS)] for i in (5, 3, 0, 1, 2, 4, 0, 0, 5, 1, 3, 2)]
    mixed = open_artifact(path, device="cpu")(pixels, task=names)
    near = 1e-5 if result["precision"] == "fp32" else 3e-3
    for row, name in enumerate(names):
        own = open_artifact(checkpoints[name], device="cpu")(pixels[row : row + 1])
        count = KINDS[name][0]
        torch.testing.assert_close(mixed.embedding[row], own.embedding[0], rtol=0, atol=near)
        torch.testing.assert_close(mixed.logits[row, :count], own.logits[0], rtol=1e-2, atol=0.3)
        assert (mixed.logits[row, count:] == np.float32(ABSENT)).all()
        assert torch.equal(mixed.mask[row].int(), own.mask[0].int())


def test_a_reader_of_the_contract_finds_task_and_metadata(exported, pixels):
    path, _ = exported(input="uint8")
    session = onnxruntime.InferenceSession(path)
    inputs = {i.name: (i.type, i.shape) for i in session.get_inputs()}
    assert inputs["task"] == ("tensor(int64)", ["batch"])
    feeds = {"image": pixels[:2].numpy(), "task": np.array([1, 4])}
    logits, mask = session.run(["logits", "mask"], feeds)
    assert logits.shape == (2, 7)
    assert mask.dtype == np.int32
    listed = json.loads(session.get_modelmeta().custom_metadata_map["tasks"])
    assert [entry["name"] for entry in listed] == list(KINDS)
    assert [len(entry["class_names"]) for entry in listed] == [count for count, _ in KINDS.values()]
    assert listed[3]["config"]["head_input"] == "features"


def test_no_node_computes_shapes(exported):
    path, _ = exported(input="uint8")
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert not kinds & {"Shape", "Expand", "ConstantOfShape", "NonZero", "Loop", "If"}


def test_the_commands_take_a_task(exported, tmp_path, folder, capsys):
    path, _ = exported(input="uint8")
    listed = tasks.command(TasksConfig(path))["tasks"]
    assert [(task["name"], task["classes"]) for task in listed] == [
        (name, count) for name, (count, _) in KINDS.items()
    ]
    assert all(10_000 < task["bytes"] < 200_000 for task in listed)
    image = next((folder / "test").rglob("*.*"))
    answer = predict.command(PredictConfig(path, (image,), task="dtd", device="cpu"))
    assert answer["predictions"][0]["classes"][0]["name"].startswith("dtd ")
    with pytest.raises(
        ValueError, match="holds the tasks flowers, dtd, .*; choose one with --task"
    ):
        predict.command(PredictConfig(path, (image,), device="cpu"))
    with pytest.raises(ValueError, match="requests 'cats'; the file holds flowers, dtd"):
        predict.command(PredictConfig(path, (image,), task="cats", device="cpu"))


def test_a_call_names_a_task_for_every_image(exported, checkpoints, pixels):
    artifact = open_artifact(exported(input="uint8")[0], device="cpu")
    for task in (None, ["dtd"], ["dtd"] * 13):
        with pytest.raises(ValueError, match="one for each of 12 images"):
            artifact(pixels, task)
    with pytest.raises(ValueError, match="the file holds one task"):
        open_artifact(checkpoints["dtd"], device="cpu")(pixels, "dtd")
    alone = open_artifact(exported(input="uint8")[0], device="cpu", task="near")
    assert alone(pixels).logits.shape == (12, 4)
    assert alone.about.class_names == tuple(f"near {i}" for i in range(4))


def test_names_are_given_or_are_the_folders(checkpoints, tmp_path):
    first, second = checkpoints["flowers"], checkpoints["dtd"]
    config = OnnxConfig(first, tmp_path / "f.onnx", (second,), input="uint8")
    onnx_export.export(replace(config, task=("a", "b")))
    assert [task.name for task in describe_onnx(config.output).tasks] == ["a", "b"]
    with pytest.raises(ValueError, match="got 2 checkpoints and 1 --task"):
        onnx_export.export(replace(config, task=("a",)))
    with pytest.raises(ValueError, match="task name 'flowers' is repeated"):
        onnx_export.export(replace(config, more=(first,)))
    with pytest.raises(ValueError, match="--baseline needs exactly one checkpoint"):
        onnx_export.export(replace(config, baseline=True))
    with pytest.raises(ValueError, match="--task needs several checkpoints"):
        onnx_export.export(replace(config, more=(), task=("a",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"region_size": 16}, "region sizes differ"),
     ({"margin": 8}, "preprocessing differs"),
     ({"activation": "relu"}, "activation relu is not supported")],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused(checkpoints, demo_clip, tmp_path, settings, message):
    model = AdaViPro(demo_clip[0], torch.eye(3, 64), PromptConfig(embed_dim=4, **settings))
    checkpoint_of(model, tuple("abc")).save(tmp_path / "checkpoint.safetensors")
    config = OnnxConfig(
        checkpoints["flowers"], tmp_path / "f.onnx", (tmp_path / "checkpoint.safetensors",)
    )
    with pytest.raises(ValueError, match=message):
        onnx_export.export(config)
    assert not config.output.exists()


@pytest.mark.parametrize("seed", range(4))
def test_any_mix_of_tasks_gets_the_answers_of_each_alone(demo_clip, pixels, seed):
    """Few tasks and many, which take other forms: kinds, classes, sizes and orders at random."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    models = []
    for _ in range(draw.choice((2, 5, 40)) if seed % 2 else draw.randint(97, 130)):
        reads = draw.choice((None, "embedding", "features"))
        head = {"head": "linear", "head_input": reads} if reads else {}
        method = draw.choice(("adavipro", "vp", "linear_probe" if reads else "zero_shot"))
        config = PromptConfig(
            method=method,
            prompt_size=draw.choice((1, 30, 112)),
            edge=draw.choice(("laplacian-magnitude", "sobel")),
            embed_dim=2,
            **head,
        )
        rows = torch.randn(draw.randint(1, 9), 160 if reads == "features" else 64)
        bias = torch.randn(len(rows)) if reads else None
        models.append(AdaViPro(demo_clip[0], rows, config, class_bias=bias).eval())
    graph = "folded" if draw.random() < 0.5 else "pixel"
    many = deployed(models, Form(graph, input="uint8", tasks="baked"))
    asked = [draw.randrange(len(models)) for _ in pixels]
    with torch.no_grad():
        logits, mask, embedding = many(pixels, torch.tensor(asked))
        for row, number in enumerate(asked):
            own = models[number](pixels[row : row + 1])
            count = own.logits.shape[1]
            torch.testing.assert_close(embedding[row], own.embedding[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(logits[row, :count], own.logits[0], rtol=1e-4, atol=2e-3)
            assert (logits[row, count:] == np.float32(ABSENT)).all()
            assert torch.equal(mask[row], own.mask[0].int())


@pytest.mark.parametrize("number", [len(KINDS), 2**40, -1, -len(KINDS)])
def test_a_number_of_no_task_is_an_error(exported, pixels, number):
    session = onnxruntime.InferenceSession(exported(input="uint8")[0])
    feeds = {"image": pixels[:2].numpy(), "task": np.array([1, number])}
    with pytest.raises(Exception, match="out of data bounds"):
        session.run(None, feeds)


@pytest.fixture(scope="module")
def opened(checkpoints, tmp_path_factory):
    """A file whose tasks are data, and the tasks."""
    folder = tmp_path_factory.mktemp("open")
    some = {name: checkpoints[name] for name in ("flowers", "dtd", "bare", "far", "probe")}
    first, *more = some.values()
    config = OnnxConfig(first, folder / "open.onnx", tuple(more), tasks="open", input="uint8")
    assert onnx_export.export(config)["verified"]
    for name, path in some.items():
        to_task.command(TaskConfig(path, folder / f"{name}.task"))
    return folder


def test_a_checkpoint_is_not_an_exported_file(checkpoints):
    with pytest.raises(ValueError, match="checkpoint.safetensors is not an .onnx or .engine file"):
        tasks.command(TasksConfig(checkpoints["flowers"]))


def test_tasks_come_and_go_and_are_answered_like_their_checkpoints(opened, checkpoints, pixels):
    artifact = open_artifact(opened / "open.onnx", device="cpu")
    with pytest.raises(ValueError, match="the file holds no task yet"):
        artifact(pixels, "dtd")
    for name in ("far", "dtd", "probe"):
        assert artifact.add(opened / f"{name}.task") == name
    names = ["dtd", "far", "probe", "far"] * 3
    mixed = artifact(pixels, names)
    for row, name in enumerate(names):
        own = open_artifact(checkpoints[name], device="cpu")(pixels[row : row + 1])
        torch.testing.assert_close(mixed.embedding[row], own.embedding[0], rtol=0, atol=1e-5)
        count = KINDS[name][0]
        torch.testing.assert_close(mixed.logits[row, :count], own.logits[0], rtol=1e-4, atol=1e-3)
        assert (mixed.logits[row, count:] <= ABSENT).all()
        assert torch.equal(mixed.mask[row].int(), own.mask[0].int())
    artifact.remove("far")
    with pytest.raises(ValueError, match="requests 'far'; the file holds dtd, probe"):
        artifact(pixels, names)
    with pytest.raises(ValueError, match="requests 'far'"):
        artifact.remove("far")
    with pytest.raises(ValueError, match="task 'dtd' already exists; remove it first"):
        artifact.add(opened / "dtd.task")


def resident_bytes():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


def test_adding_and_removing_disturbs_no_running_call(opened, pixels):
    artifact = open_artifact(opened / "open.onnx", device="cpu")
    artifact.add(opened / "dtd.task")
    expected, stop, calls = artifact(pixels, "dtd").logits, threading.Event(), []

    def call():
        while not stop.is_set():
            calls.append(torch.equal(artifact(pixels, "dtd").logits, expected))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    task, longest, added = load_task(opened / "far.task"), 0.0, 0
    while added < 1000 or len(calls) < 6:
        added += 1
        began = time.perf_counter()
        artifact.add(task)
        longest = max(longest, time.perf_counter() - began)
        artifact.remove("far")
    stop.set()
    for thread in threads:
        thread.join()
    assert all(calls)
    assert longest < 0.1
    assert [known.name for known in artifact.about.tasks] == ["dtd"]


def test_a_thousand_tasks_that_came_and_went_leave_no_memory_behind(opened, pixels):
    artifact = open_artifact(opened / "open.onnx", device="cpu")
    for number in range(1100):
        artifact.add(opened / "far.task")
        if number % 100 == 0:
            artifact(pixels[:1], "far")
        artifact.remove("far")
        if number == 100:
            settled = resident_bytes()
    # Of a thousand tasks not the room of a hundred.
    assert resident_bytes() - settled < 100 * load_task(opened / "far.task").bytes


def test_a_task_that_does_not_fit_is_refused(opened, checkpoints, tmp_path):
    artifact = open_artifact(opened / "open.onnx", device="cpu")
    task = load_task(opened / "flowers.task")
    wrong = {
        "was trained on another encoder": {"encoder": replace(task.encoder, sha256="0" * 64)},
        "task 'flowers' preprocesses images differently": {
            "preprocess": replace(task.preprocess, margin=3)
        },
        "regions of 16 pixels; the file needs 32": {"config": replace(task.config, region_size=16)},
        "uses edges sobel": {"config": replace(task.config, edge="sobel")},
        "table 'rows' .* does not fit": {
            "tables": task.tables | {"rows": task.tables["rows"][:, :3]}
        },
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            artifact.add(replace(task, **change))
    assert not artifact.about.tasks
    for damage in (lambda c: c[:-1], lambda c: c.replace(b"kernels", b"kernelz")):
        path = tmp_path / "damaged.task"
        path.write_bytes(damage((opened / "flowers.task").read_bytes()))
        with pytest.raises(ValueError, match="damaged.task"):
            artifact.add(path)
    with pytest.raises(ValueError, match="must end in .task"):
        to_task.command(TaskConfig(checkpoints["dtd"], tmp_path / "dtd.bin"))
    near = OnnxConfig(
        checkpoints["flowers"], tmp_path / "f.onnx", (checkpoints["near"],), tasks="open"
    )
    with pytest.raises(ValueError, match="needs checkpoints with the same edge detector"):
        onnx_export.export(near)


def test_a_file_without_a_mask_path_takes_no_task_that_decides(opened, checkpoints, tmp_path):
    config = OnnxConfig(checkpoints["dtd"], tmp_path / "open.onnx", tasks="open", input="uint8")
    assert onnx_export.export(config)["mask_agreement"] == 1
    artifact = open_artifact(config.output, device="cpu")
    artifact.add(opened / "dtd.task")
    with pytest.raises(ValueError, match="uses edges .*; the file computes none"):
        artifact.add(opened / "flowers.task")


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_an_engine_has_a_profile_of_tasks_and_classes(checkpoints, tmp_path, precision):
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path / "open.onnx"
    onnx_export.export(
        OnnxConfig(
            checkpoints["flowers"], path, (checkpoints["probe"],), tasks="open", input="uint8",
            precision=precision,
        )
    )  # fmt: skip
    built = to_tensorrt.command(
        to_tensorrt.TensorRtConfig(
            path, tmp_path / "f.engine", compute_capability=("8.6",), builder_level=0,
            batch="1,2,4", tasks="1,2,3", classes="1,4,9",
        )
    )  # fmt: skip
    assert (built["tasks_in_call"], built["classes_in_call"]) == ([1, 2, 3], [1, 4, 9])
    assert built["precision"] == precision


def test_the_commands_take_a_task_file(opened, folder):
    image = next((folder / "test").rglob("*.*"))
    flags = {"task": str(opened / "dtd.task"), "device": "cpu"}
    answer = predict.command(PredictConfig(opened / "open.onnx", (image,), **flags))
    assert answer["predictions"][0]["classes"][0]["name"].startswith("dtd ")
    with pytest.raises(ValueError, match="needs a task; add --task F.task"):
        predict.command(PredictConfig(opened / "open.onnx", (image,), device="cpu"))
