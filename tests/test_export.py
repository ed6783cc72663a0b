import json
import re
import resource
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib import metadata, util
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from PIL import Image

from adavipro_fast import evaluate, train
from adavipro_fast.artifact import tensorrt as engine
from adavipro_fast.artifact.open import open_artifact
from adavipro_fast.data.sets import DataConfig
from adavipro_fast.errors import VerificationError
from adavipro_fast.export import (
    comparison,
    fold,
    network,
    onnx_export,
    onnx_file,
    to_onnx,
    to_tensorrt,
)
from adavipro_fast.export import encoder as encoder_of
from adavipro_fast.export.fold import FILTERS
from adavipro_fast.export.graph import Form, deployed
from adavipro_fast.export.onnx_export import OnnxConfig
from adavipro_fast.export.patches import folding_obstacle
from adavipro_fast.export.to_tensorrt import TensorRtConfig
from adavipro_fast.files import sealed
from adavipro_fast.files.checkpoint import checkpoint_of
from adavipro_fast.files.sealed import describe_onnx
from adavipro_fast.method.clip import load_clip, load_encoder
from adavipro_fast.method.config import PromptConfig
from adavipro_fast.method.encoder import FrozenEncoder
from adavipro_fast.method.functional import Edge, normalise
from adavipro_fast.method.model import AdaViPro
from adavipro_fast.method.preprocess import Preprocess

SHARED = Path(__file__).parents[2] / "shared"
KEYS = {
    "path", "graph", "precision", "input", "opset", "verified", "reason", "max_abs_error",
    "min_cosine", "top1_agreement", "mask_agreement", "bytes",
}  # fmt: skip
SIDECAR_KEYS = {
    "class_names", "preprocess", "config", "runtime", "runtime_version", "compute_capabilities",
    "precision", "tensor_dtypes", "batch", "onnx_sha256", "engine_sha256", "verified", "reason",
}  # fmt: skip


def tower(side=56, patch=14, **options):
    visual = VisionTransformer(
        side, patch, width=32, layers=2, heads=2, mlp_ratio=2, output_dim=16, **options
    )
    for parameter in visual.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    preprocess = Preprocess(side, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "bicubic", "shortest")
    return FrozenEncoder(visual, preprocess, name="test", pretrained="", logit_scale=20.0)


def prompted(encoder, **config):
    classes = encoder(torch.zeros(1, 3, *[encoder.preprocess.size] * 2)).shape[1]
    embeddings = F.normalize(torch.randn(5, classes), dim=-1)
    model = AdaViPro(encoder, embeddings, PromptConfig(embed_dim=3, **config), kernel="plain")
    return model.eval()


# encoder, region size, prompt size, other options
FOLDS = [
    ({}, 14, 14, {}),
    ({}, 8, 11, {"edge": "laplacian-magnitude", "edge_padding": "replicate"}),
    ({}, 28, 28, {"edge": "laplacian-magnitude"}),
    ({}, 8, 11, {}),
    ({}, 28, 9, {"edge": "sobel"}),
    ({"patch": 28}, 7, 9, {"edge": "sobel"}),
    ({"patch": 8, "no_ln_pre": True}, 14, 20, {"edge": "sobel", "edge_padding": "replicate"}),
    ({"pool_type": "avg"}, 14, 5, {"edge": "none"}),
    ({"ls_init_value": 0.1, "final_ln_after_pool": True}, 56, 14, {"edge_padding": "replicate"}),
    ({}, 14, 14, {"activation": "relu", "edge": "laplacian-magnitude"}),
    ({}, 14, 14, {"method": "vp"}),
]


@pytest.mark.parametrize("uint8", [False, True])
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("case", FOLDS, ids=str)
def test_the_deployed_module_is_the_model(case, folded, uint8):
    options, region, prompt, rest = case
    model = prompted(tower(**options), region_size=region, prompt_size=prompt, **rest)
    pixels = torch.randint(0, 256, (5, 3, 56, 56), dtype=torch.uint8)
    image = pixels if uint8 else normalise(pixels, model.prompt.mean, model.prompt.std)
    with torch.inference_mode():
        expected = model(pixels)
        form = Form("folded" if folded else "pixel", input="uint8" if uint8 else "float32")
        got = deployed([model], form)(image)
    assert torch.equal(got[1], expected.mask.int())
    assert got[1].dtype == torch.int32
    torch.testing.assert_close(got[2], expected.embedding, rtol=0, atol=2e-6)
    torch.testing.assert_close(got[0], expected.logits, rtol=0, atol=1e-4)
    if region == 14:
        assert 0 < expected.mask.mean() <= 1


def overlapping():
    encoder = tower()
    encoder.visual.conv1.stride = (7, 7)
    return encoder


@pytest.mark.parametrize(
    ("visual", "reason"),
    [
        (lambda: load_encoder("timm:test_resnet"), "ResNet has no patch embedding"),
        (overlapping, "its patches overlap"),
    ],
)
def test_a_tower_without_patches_is_not_folded(visual, reason):
    encoder = visual()
    assert reason in folding_obstacle(encoder.visual)
    config = PromptConfig(region_size=encoder.preprocess.size // 4, prompt_size=3)
    model = AdaViPro(encoder, torch.randn(5, 16), config)
    with pytest.raises(
        ValueError, match=f"cannot be folded into this encoder: {reason}.* use --graph pixel"
    ):
        deployed([model], Form())


@pytest.fixture(scope="session")
def checkpoint(demo_clip, tmp_path_factory):
    """A checkpoint of the demo whose masks are neither open nor closed."""
    torch.manual_seed(5)
    encoder, text = demo_clip
    names = ("disc", 'a "quoted"\nname')
    classes = text.class_embeddings(names, ["{}"])
    config = PromptConfig(
        embed_dim=4, edge="laplacian-magnitude", edge_padding="replicate",
        generator_init="avoid-edges", prompt_size=40,
    )  # fmt: skip
    model = AdaViPro(encoder, classes, config)
    sample = torch.cat(comparison.sample_batches(encoder.preprocess))
    model.prompt.initialise(sample)
    model.prompt.generator.policy.bias.data *= 0.5
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.safetensors"
    checkpoint_of(model, names).save(path)
    return path


@pytest.fixture(scope="session")
def exported(checkpoint, tmp_path_factory):
    """Export once for each set of options."""
    done = {}
    folder = tmp_path_factory.mktemp("onnx")

    def export(**options):
        key = json.dumps(options)
        if key not in done:
            path = folder / f"{len(done)}.onnx"
            result = onnx_export.export(OnnxConfig(checkpoint, path, **options))
            done[key] = path, result
        return done[key]

    return export


VARIANTS = [
    {},
    {"precision": "fp16", "input": "uint8"},
    {"graph": "pixel", "input": "uint8"},
    {"graph": "pixel", "precision": "fp16"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_an_exported_file_is_verified_and_says_so(exported, options):
    path, result = exported(**options)
    assert set(result) >= KEYS
    assert result["verified"] is True
    assert result["graph"] == options.get("graph", "folded")
    assert result["mask_agreement"] == 1
    assert result["top1_agreement"] == 100
    assert result["min_cosine"] >= 0.9999
    if "precision" not in options:
        assert result["max_abs_error"] <= 1e-5
    assert result["bytes"] == path.stat().st_size
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_the_mask_of_the_checkpoint_is_neither_open_nor_closed(checkpoint):
    pixels = torch.cat(comparison.sample_batches(open_artifact(checkpoint).about.preprocess))
    assert 0.2 < open_artifact(checkpoint)(pixels).mask.mean() < 0.9


def test_the_graph_is_lean_and_tells_nothing_of_the_machine(exported):
    path, result = exported()
    baseline, told = exported(baseline=True)
    assert result["nodes"] - told["nodes"] <= 15
    assert path.stat().st_size < 1.05 * baseline.stat().st_size
    assert told["mask_agreement"] is None
    model = onnx.load(path)
    used = {name for node in model.graph.node for name in node.input}
    assert {t.name for t in model.graph.initializer} <= used
    assert str(Path.cwd()).encode() not in path.read_bytes()
    assert b"site-packages" not in path.read_bytes()
    assert "Shape" not in Counter(node.op_type for node in model.graph.node)


def test_bf16_is_checked_in_structure_where_no_backend_runs_it(exported):
    path, result = exported(precision="bf16")
    if not torch.cuda.is_available():
        assert result["verified"] is False
        assert "bf16" in result["reason"]
    with pytest.raises(VerificationError, match="expected fp16"):
        onnx_file.check_dtypes(path, "fp16")


def test_a_reader_that_knows_only_the_contract_gets_the_same_predictions(
    exported, checkpoint, folder, tmp_path
):
    session = onnxruntime.InferenceSession(str(exported(input="uint8")[0]))
    about = session.get_modelmeta().custom_metadata_map
    size = json.loads(about["preprocess"])["size"]
    assert json.loads(about["class_names"]) == ["disc", 'a "quoted"\nname']
    assert json.loads(about["config"])["prompt_size"] == 40
    assert re.fullmatch("[0-9a-f]{64}", json.loads(about["checkpoint_sha256"]))
    artifact = open_artifact(checkpoint)
    for file in sorted(folder.rglob("*.png"))[:4]:
        image = Image.open(file).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        pixels = np.asarray(image).transpose(2, 0, 1)[None]
        logits, mask, embedding = session.run(["logits", "mask", "embedding"], {"image": pixels})
        expected = artifact(torch.from_numpy(pixels.copy()))
        np.testing.assert_allclose(logits, expected.logits, atol=1e-4)
        np.testing.assert_array_equal(mask, expected.mask)
        np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-6)
        assert (logits.dtype, mask.dtype, embedding.dtype) == ("float32", "int32", "float32")


@pytest.mark.parametrize("margin", [0, 25])
@pytest.mark.slow
def test_evaluate_gives_the_same_for_checkpoint_and_file(small, tmp_path, folder, cache, margin):
    trained = small(tmp_path / "run", epochs=1)
    trained = train.start_run(replace(trained, prompt=replace(trained.prompt, margin=margin)))
    path = tmp_path / "run" / "checkpoint.safetensors"
    onnx_export.export(OnnxConfig(path, tmp_path / "model.onnx"))
    onnx_export.export(OnnxConfig(path, tmp_path / "baseline.onnx", baseline=True))
    data = DataConfig(str(folder), cache_dir=cache)
    results = [
        evaluate.command(evaluate.EvaluateConfig(p, data=data, device="cpu"))
        for p in (path, tmp_path / "model.onnx", tmp_path / "baseline.onnx")
    ]
    assert (results[1]["backend"], results[1]["provider"]) in (
        ("onnxruntime", "CPUExecutionProvider"),
        ("openvino", "CPU, fp32"),
    )
    same = ("top1", "n", "per_class", "mask_density", "mask_adaptivity", "mask_placement")
    assert [results[0][k] for k in same] == [results[1][k] for k in same]
    assert results[0]["top1"] == trained["test_top1"]
    assert results[2]["top1"] == trained["zero_shot_top1"]
    assert describe_onnx(tmp_path / "model.onnx").preprocess.margin == margin


def test_a_prompt_that_is_always_open_is_exported(encoder, tmp_path):
    model = prompted(encoder, method="vp")
    checkpoint_of(model, tuple("abcde")).save(tmp_path / "checkpoint.safetensors")
    config = OnnxConfig(tmp_path / "checkpoint.safetensors", tmp_path / "f.onnx")
    # The test's class embeddings belong to the demo's encoder.
    assert onnx_export.export(replace(config, model="demo"))["verified"] is True
    assert open_artifact(config.output)(torch.zeros(3, 3, 224, 224).byte()).mask.all()


def test_what_torch_cannot_export_is_told_in_one_line(checkpoint, tmp_path, monkeypatch):
    def forward(self, x):
        raise AssertionError("no such luck\nat all")

    monkeypatch.setattr(encoder_of.Trunk, "forward", forward)
    with pytest.raises(ValueError, match="torch.onnx cannot export this encoder: .*no such luck"):
        onnx_export.export(OnnxConfig(checkpoint, tmp_path / "f.onnx"))
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_computes_something_else_is_red_and_leaves_no_file(
    checkpoint, tmp_path, monkeypatch
):
    head = fold.MaskHead.forward
    monkeypatch.setattr(fold.MaskHead, "forward", lambda self, x: ~head(self, x))
    with pytest.raises(VerificationError, match="masks agree on"):
        onnx_export.export(OnnxConfig(checkpoint, tmp_path / "model.onnx"))
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_one_file_lie_beside_it(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "ONE_FILE_BYTES", 1000)
    path = tmp_path / "model.onnx"
    result = onnx_export.export(OnnxConfig(checkpoint, path))
    data = tmp_path / "model.onnx.data"
    assert sorted(tmp_path.iterdir()) == [path, data]
    assert result["bytes"] == path.stat().st_size + data.stat().st_size
    model = onnx.load(path, load_external_data=False)
    assert (model.ir_version, model.opset_import[0].version) == (9, 20)
    renamed = [file.rename(tmp_path / file.name.replace("model", "mine")) for file in (path, data)]
    with pytest.raises(ValueError, match="exported as model.onnx with its weights in model.onnx.d"):
        open_artifact(renamed[0])
    renamed[0].rename(path)
    with pytest.raises(
        FileNotFoundError, match="model.onnx.data is missing; it contains the weights"
    ):
        open_artifact(path)
    data.write_bytes(renamed[1].read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="is damaged"):
        open_artifact(path)


def test_every_edge_detector_has_its_own_filters():
    assert set(FILTERS) == set(get_args(Edge))


def one_line(error):
    errors = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in error
    return errors[0]


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_behind(checkpoint, tmp_path):
    script = Path(to_onnx.__file__)
    done = subprocess.run(
        [sys.executable, script, checkpoint, "--output", tmp_path / "model.onnx"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )
    assert done.returncode == 2
    one_line(done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no.safetensors", "--output", "f.onnx"], "no such file"),
        (["{checkpoint}", "--output", "f.txt"], "must end in .onnx"),
        (
            ["{checkpoint}", "--output", "f.onnx", "--precision", "fp16", "--opset", "20"],
            "opset 20",
        ),
        (["{checkpoint}", "--output", "f.onnx", "--precision", "int4"], "int4"),
        (["{checkpoint}", "--output", "f.onnx", "--model", "{other}"], "is not the one"),
        (["{checkpoint}", "--output", "{checkpoint}/f.onnx"], "checkpoint.safetensors"),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line(
    checkpoint, tmp_path, monkeypatch, capsys, arguments, words
):
    other = f"local-dir:{SHARED}/models/vit-tiny-16-aligned"
    if "{other}" in arguments and not SHARED.is_dir():
        pytest.skip("../shared is absent")
    filled = [
        a.replace("{checkpoint}", str(checkpoint)).replace("{other}", other) for a in arguments
    ]
    monkeypatch.setattr(sys, "argv", ["to_onnx.py", *filled])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        to_onnx.main()
    assert stop.value.code == 2
    assert words in one_line(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[: len(c) // 2], "is truncated or was not exported"),
        (lambda c: c[:5000] + bytes([c[5000] ^ 1]) + c[5001:], "is damaged"),
        (lambda c: c.replace(b'"prompt_size": 40', b'"prompt_size": 41'), "is damaged"),
        (lambda _: b"", "is truncated or was not exported"),
    ],
)
def test_a_tampered_onnx_file_is_refused(exported, tmp_path, change, message):
    path = tmp_path / "bad.onnx"
    path.write_bytes(change(exported()[0].read_bytes()))
    with pytest.raises(ValueError, match=message):
        open_artifact(path)


def test_a_foreign_onnx_file_is_refused(tmp_path):
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    value = [onnx.helper.make_tensor_value_info(n, 1, [1]) for n in "xy"]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", value[:1], value[1:]))
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match="was not exported by adavipro_fast"):
        open_artifact(tmp_path / "foreign.onnx")


@pytest.fixture(scope="session")
def built(checkpoint, tmp_path_factory):
    """Build once for each set of options."""
    pytest.importorskip("tensorrt_rtx")
    done = {}
    folder = tmp_path_factory.mktemp("engines")

    def build(**options):
        key = json.dumps(options)
        if key not in done:
            path = folder / f"{len(done)}.engine"
            result = to_tensorrt.command(
                TensorRtConfig(checkpoint, path, runtime="tensorrt-rtx", **options)
            )
            done[key] = path, result
        return done[key]

    return build


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_real_engines_are_built_for_three_gpus_and_their_types_proven(
    built, exported, precision, tmp_path
):
    path, result = built(precision=precision, compute_capability=("8.6", "8.9", "12.0"))
    told = json.loads(sealed.sidecar_path(path).read_text())
    assert set(told) >= SIDECAR_KEYS
    assert set(result) >= (SIDECAR_KEYS - {"class_names"}) | {"path", "build_seconds", "bytes"}
    assert told["compute_capabilities"] == ["8.6", "8.9", "12.0"]
    assert told["batch"] == [1, 16, 256]
    stored = describe_onnx(exported()[0]).preprocess.stored()
    assert told["preprocess"] == json.loads(json.dumps(stored))
    kinds = told["tensor_dtypes"]
    if precision == "fp16":
        assert kinds["float16"] > kinds["float32"]
    else:
        assert "float16" not in kinds
    if not torch.cuda.is_available():
        assert told["verified"] is False
        assert "could not be run" in told["reason"]
    assert result["bytes"] > 1_000_000


@pytest.mark.slow
def test_an_engine_costs_hardly_more_than_its_baseline(built):
    options = {"precision": "fp16", "compute_capability": ("8.6",)}
    sizes = [built(**options, baseline=b)[1]["bytes"] for b in (False, True)]
    # The demo's encoder is so small that the mask head's convolutions count.
    assert sizes[0] < 1.15 * sizes[1]


def test_a_fake_fp16_engine_is_an_error(exported):
    trt = pytest.importorskip("tensorrt_rtx")
    parsed = network.Network(trt, "tensorrt-rtx", exported()[0])
    with pytest.raises(VerificationError, match="expected fp16"):
        network.prove_precision(parsed.types()["products"], "fp16")


def test_an_engine_is_refused_where_it_cannot_run(built):
    path, _ = built(precision="fp16", compute_capability=("8.6",))
    values = sealed.read_sidecar(path)
    version = values["runtime_version"]
    engine.check_runs_here(values, version, "8.6")
    with pytest.raises(
        ValueError, match=r"built for compute capability 8\.6, but this GPU has 9\.0"
    ):
        engine.check_runs_here(values, version, "9.0")
    with pytest.raises(ValueError, match=r"but 0\.1 is installed; build it again"):
        engine.check_runs_here(values, "0.1", "8.6")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            open_artifact(path)


def test_tampered_engines_and_sidecars_are_refused(built, tmp_path):
    source, _ = built(precision="fp16", compute_capability=("8.6",))
    content, text = source.read_bytes(), sealed.sidecar_path(source).read_text()
    path = tmp_path / "f.engine"
    with pytest.raises(FileNotFoundError, match="no such file"):
        sealed.read_sidecar(path)
    path.write_bytes(content[:-100])
    with pytest.raises(FileNotFoundError, match="json"):
        sealed.read_sidecar(path)
    sealed.sidecar_path(path).write_text(text)
    with pytest.raises(ValueError, match="describes another engine than"):
        sealed.read_sidecar(path)
    path.write_bytes(content)
    assert sealed.read_sidecar(path)["precision"] == "fp16"
    for damaged in (text.replace("fp16", "fp32"), text[:300], "[]", "{}", ""):
        sealed.sidecar_path(path).write_text(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            sealed.read_sidecar(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": "4,2,8"}, "out of order"),
        ({"batch": "1,2"}, "is not MIN,OPT,MAX"),
        ({"compute_capability": ("9.9",)}, "'9.9' is unknown to tensorrt-rtx"),
        ({"output": Path("f.onnx")}, "must end in .engine"),
        ({"source": Path("no.onnx")}, "no such file"),
        ({"runtime": "tensorrt"}, "tensorrt"),
    ],
)
def test_what_cannot_be_built_is_told(checkpoint, tmp_path, monkeypatch, options, message):
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.chdir(tmp_path)
    config = TensorRtConfig(
        checkpoint, Path("f.engine"), runtime="tensorrt-rtx", compute_capability=("8.6",)
    )
    with pytest.raises((ValueError, OSError, ImportError), match=re.escape(message)):
        to_tensorrt.command(replace(config, **options))
    assert list(tmp_path.iterdir()) == []


def test_an_onnx_files_precision_is_not_rewritten(exported, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    config = TensorRtConfig(
        exported()[0], tmp_path / "f.engine", runtime="tensorrt-rtx",
        compute_capability=("8.6",), precision="fp16",
    )  # fmt: skip
    with pytest.raises(ValueError, match="is fp32, but --precision is fp16"):
        to_tensorrt.command(config)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_installed_says_how_to_get_it():
    if util.find_spec("tensorrt"):
        pytest.skip("tensorrt is installed here")
    with pytest.raises(ImportError, match="pip install tensorrt"):
        engine.runtime_module("tensorrt")


def test_every_name_of_tensorrts_api_exists_in_its_newest_bindings():
    try:
        files = metadata.files("tensorrt-cu13-bindings")
    except metadata.PackageNotFoundError:
        pytest.skip("tensorrt-cu13-bindings is not installed")
    library = next(f for f in files if f.name.startswith("tensorrt.") and f.suffix == ".so")
    names = set(re.findall(rb"[A-Za-z_][A-Za-z0-9_]+", library.locate().read_bytes()))
    sources = "".join(Path(module.__file__).read_text() for module in (engine, network))
    owners = "trt|self.builder|self.definition|self.parser|options|profile|layer|runtime|context"
    used = set(re.findall(rf"\b(?:{owners}|self.engine)\.([a-zA-Z_]\w+)", sources))
    used |= set(re.findall(r"\btrt\.\w+\.(\w+)", sources))
    assert {"build_serialized_network", "execute_async_v3", "STRONGLY_TYPED"} <= used
    rtx_only = {
        *("num_compute_capabilities", "set_compute_capability", "ComputeCapability"),
        *("create_runtime_config", "dynamic_shapes_kernel_specialization_strategy"),
        *("DynamicShapesKernelSpecializationStrategy", "EAGER"),
    }
    assert {name for name in used if name.encode() not in names} <= rtx_only
    rtx = pytest.importorskip("tensorrt_rtx")
    owners = (rtx, rtx.IBuilderConfig, rtx.ICudaEngine, rtx.IRuntimeConfig)
    owners += (rtx.DynamicShapesKernelSpecializationStrategy,)
    assert all(any(hasattr(owner, name) for owner in owners) for name in rtx_only)


@pytest.mark.real
@pytest.mark.slow
def test_real_images_and_a_real_encoder_agree_through_every_file(tmp_path):
    encoder, text = load_clip(f"local-dir:{SHARED}/models/vit-tiny-16-aligned")
    model = AdaViPro(
        encoder,
        text.class_embeddings(["banded", "dotted", "woven"], ["a photo of a {}"]),
        PromptConfig(edge="laplacian-magnitude", edge_padding="replicate", prompt_size=60),
    ).eval()
    path = tmp_path / "checkpoint.safetensors"
    checkpoint_of(model, ("banded", "dotted", "woven")).save(path)
    subprocess.run(
        ["tar", "xf", SHARED / "data" / "dtd10.tar", "-C", tmp_path, "dtd10/test"], check=True
    )
    for options in ({}, {"precision": "fp16", "input": "uint8"}):
        result = onnx_export.export(
            OnnxConfig(path, tmp_path / "f.onnx", images=(tmp_path / "dtd10",), **options)
        )
        assert result["verified"] is True
        assert result["mask_agreement"] == 1
