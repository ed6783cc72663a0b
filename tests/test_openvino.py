"""OpenVINO gives the answers of every other runtime, and `auto` follows its rule."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from open_clip.transformer import VisionTransformer
from PIL import Image

from adavipro_fast import AdaViPro, PromptConfig, evaluate, open_artifact, predict, serve
from adavipro_fast.artifact import openvino as runner
from adavipro_fast.artifact.artifact import NotRunnableError
from adavipro_fast.artifact.openvino import OpenVinoArtifact, openvino_obstacle, preferred
from adavipro_fast.artifact.torch import TorchArtifact
from adavipro_fast.data.sets import DataConfig
from adavipro_fast.evaluate import EvaluateConfig
from adavipro_fast.export import comparison, onnx_export
from adavipro_fast.export.onnx_export import OnnxConfig
from adavipro_fast.export.open_tasks import folded_task
from adavipro_fast.files.about import OpenFor
from adavipro_fast.files.checkpoint import checkpoint_of, load_checkpoint
from adavipro_fast.files.sealed import describe_onnx
from adavipro_fast.method.encoder import FrozenEncoder
from adavipro_fast.method.preprocess import Preprocess
from adavipro_fast.predict import PredictConfig
from adavipro_fast.serve import ServeConfig

openvino = pytest.importorskip("openvino")

CPU = torch.device("cpu")
EDGES = {"edge": "laplacian-magnitude", "edge_padding": "replicate"}
KINDS = {
    "a": {**EDGES, "prompt_size": 16, "generator_init": "avoid-edges"},
    "b": {"method": "vp", "prompt_size": 20},
    "c": {"edge": "sobel", "prompt_size": 28, "head": "linear", "head_input": "features"},
}


@pytest.fixture(scope="module")
def small_encoder():
    """A tower of two layers: its graphs are exported in a second or two."""
    torch.manual_seed(1)
    visual = VisionTransformer(56, 14, width=32, layers=2, heads=2, mlp_ratio=2, output_dim=16)
    for parameter in visual.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    preprocess = Preprocess(56, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "bicubic", "shortest")
    return FrozenEncoder(visual, preprocess, name="small", pretrained="", logit_scale=20.0)


@pytest.fixture(scope="module")
def references(small_encoder, folder, tmp_path_factory):
    """A checkpoint of each kind, and PyTorch's own runner."""
    names = tuple(sorted(path.name for path in (folder / "train").iterdir()))
    made = {}
    for name, settings in KINDS.items():
        config = PromptConfig(embed_dim=3, region_size=14, **settings)
        width = 32 if config.head_input == "features" else 16
        rows = torch.nn.functional.normalize(torch.randn(len(names), width), dim=-1)
        bias = torch.randn(len(names)) if config.head == "linear" else None
        model = AdaViPro(small_encoder, rows, config, class_bias=bias, kernel="plain").eval()
        if name == "a":
            sample = torch.cat(comparison.sample_batches(small_encoder.preprocess))
            model.prompt.initialise(sample)
            model.prompt.generator.policy.bias.data *= 0.5
        checkpoint = checkpoint_of(model, names)
        path = tmp_path_factory.mktemp(name) / name / "checkpoint.safetensors"
        checkpoint.save(path)
        made[name] = path, TorchArtifact.of(checkpoint, model, CPU)
    return made


@pytest.fixture(scope="module")
def exported(small_encoder, references, folder, tmp_path_factory):
    """Export once for each set of options."""
    place, done = tmp_path_factory.mktemp("onnx"), {}

    def export(kinds="a", **options):
        key = str((kinds, options))
        if key not in done:
            first, *more = [references[kind][0] for kind in kinds]
            path = place / f"{len(done)}.onnx"
            if options.get("precision") in ("int8", "fp8"):
                options |= {"images": (folder,), "largest_loss": 100.0}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(onnx_export, "encoder_of", lambda *_: small_encoder)
                onnx_export.export(OnnxConfig(first, path, tuple(more), **options))
            done[key] = path
        return done[key]

    return export


@pytest.fixture
def pixels(small_encoder):
    return torch.cat(comparison.sample_batches(small_encoder.preprocess))


# Each form is exported anew: seconds. Tests of tasks, resizing and heads open theirs by `auto`.
FORMS = [
    {"input": "uint8"},
    pytest.param({}, marks=pytest.mark.slow),
    pytest.param({"graph": "pixel", "input": "uint8"}, marks=pytest.mark.slow),
    pytest.param({"input": "any"}, marks=pytest.mark.slow),
    pytest.param({"precision": "fp16", "input": "uint8"}, marks=pytest.mark.slow),
    pytest.param({"precision": "bf16"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_openvino_passes_the_gate_that_exported_files_pass(exported, references, pixels, options):
    reference = references["a"][1]
    artifact = open_artifact(exported(**options), device="cpu", runtime="openvino")
    assert (artifact.backend, artifact.provider) == ("openvino", "CPU, fp32")
    batches = comparison.sample_batches(reference.about.preprocess)
    compared = comparison.compare(reference.model, reference, artifact, batches)
    assert compared.complaint(options.get("precision", "fp32")) is None
    assert 0.2 < reference(pixels).mask.mean() < 0.9
    if "precision" not in options:
        torch.testing.assert_close(
            artifact(pixels).logits, reference(pixels).logits, rtol=0, atol=1e-4
        )


@pytest.mark.slow
def test_a_baseline_has_a_closed_mask(exported, references, pixels):
    file = exported(baseline=True)
    artifact = open_artifact(file, device="cpu", runtime="openvino")
    alone = references["a"][1].unprompted()(pixels)
    torch.testing.assert_close(artifact(pixels).embedding, alone.embedding, rtol=0, atol=1e-5)
    assert not artifact(pixels).mask.any()


@pytest.mark.slow
def test_int8_is_what_was_judged_in_onnx_runtime(exported, pixels):
    path = exported(precision="int8", input="uint8")
    artifact = open_artifact(path, device="cpu", runtime="openvino")
    judged = open_artifact(path, device="cpu")
    assert (artifact.provider, judged.backend) == ("CPU, int8", "onnxruntime")
    got, expected = artifact(pixels), judged(pixels)
    assert torch.equal(got.mask, expected.mask)
    assert torch.cosine_similarity(got.embedding, expected.embedding).min() > 0.9999


@pytest.mark.slow
def test_each_image_gets_its_own_tasks_answer(exported, references):
    path = exported("abc", input="uint8")
    artifact = open_artifact(path, device="cpu", runtime="openvino")
    own = [reference for _, reference in references.values()]
    batches = comparison.sample_batches(own[0].about.preprocess)
    compared = comparison.compare_tasks(own, list(references), artifact, batches)
    assert compared.complaint("fp32") is None
    alone = open_artifact(path, device="cpu", runtime="openvino", task="c")
    assert alone.backend == "openvino"


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 9), (56, 56), (300, 97)])
def test_images_of_any_size_are_resized_alike(exported, size):
    path = exported(input="any")
    image = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    got, expected = (
        open_artifact(path, device="cpu", runtime=runtime).run(image)
        for runtime in ("openvino", "onnxruntime")
    )
    torch.testing.assert_close(got["embedding"], expected["embedding"], rtol=0, atol=1e-5)
    assert torch.equal(got["mask"], expected["mask"])


def test_fp32_is_fp32_where_the_cpu_has_bf16(exported):
    request = open_artifact(exported(input="uint8"), device="cpu", runtime="openvino").request
    kind = request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT")
    assert kind == openvino.Type.f32


def test_threads_share_an_artifact(exported, pixels):
    artifact = open_artifact(exported(input="uint8"), device="cpu", runtime="openvino")
    parts = [pixels[start : start + 1 + start % 4] for start in range(16)]
    expected = [artifact(part) for part in parts]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(artifact, parts * 4))
    for got, alone in zip(answers, expected * 4, strict=True):
        torch.testing.assert_close(got.embedding, alone.embedding, rtol=0, atol=1e-6)
        assert torch.equal(got.mask, alone.mask)


def test_an_answer_stays_as_it_is_when_the_next_call_comes(exported, pixels):
    artifact = open_artifact(exported(input="uint8"), device="cpu", runtime="openvino")
    first = artifact(pixels[:2])
    kept = first.embedding.clone()
    artifact(pixels[2:4])
    assert torch.equal(first.embedding, kept)


def test_auto_takes_openvino_on_a_cpu_for_what_is_not_quantised(exported, monkeypatch):
    path = exported(input="uint8")
    about = describe_onnx(path)
    assert preferred(about, CPU)
    assert not preferred(about, torch.device("cuda", 0))
    assert not preferred(replace(about, precision="int8"), CPU)
    assert open_artifact(path, device="cpu").backend == "openvino"
    assert open_artifact(path, device="cpu", runtime="onnxruntime").backend == "onnxruntime"
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert not preferred(about, CPU)
    assert open_artifact(path, device="cpu").backend == "onnxruntime"


@pytest.mark.slow
def test_tasks_as_data_stay_with_onnx_runtime_unless_openvino_is_asked_for(
    exported, references, small_encoder, pixels
):
    path = exported(tasks="open")
    auto = open_artifact(path, device="cpu")
    asked = open_artifact(path, device="cpu", runtime="openvino")
    assert (auto.backend, asked.backend) == ("onnxruntime", "openvino")
    checkpoint = load_checkpoint(references["a"][0])
    model = checkpoint.model(small_encoder)
    for artifact in (auto, asked):
        for name in ("a", "b"):
            artifact.add(folded_task(name, checkpoint, model))
    for tasks in ("a", (["a", "b"] * len(pixels))[: len(pixels)]):
        expected, got = auto(pixels, tasks), asked(pixels, tasks)
        assert torch.equal(expected.mask, got.mask)
        assert (expected.embedding - got.embedding).abs().max() < 1e-5


def test_a_tensor_of_several_names_is_known_by_ours():
    class Part:
        def get_names(self):
            return {"add_61", "image", "sub"}

    assert runner.name_of(Part()) == "image"


def test_what_openvino_does_not_run_is_told_in_one_line(exported, tmp_path, monkeypatch):
    path = exported(input="uint8")
    about = describe_onnx(path)
    assert "fp8 rounding does not follow" in openvino_obstacle(replace(about, precision="fp8"), CPU)
    open_for = OpenFor("0" * 64, "laplacian", "zero")
    assert not preferred(replace(about, open_for=open_for), CPU)
    with pytest.raises(ValueError, match="gives logits the shape .* export it again"):
        OpenVinoArtifact.of(path, replace(about, class_names=("x",)))
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged|is truncated"):
        open_artifact(damaged, device="cpu", runtime="openvino")
    with pytest.raises(NotRunnableError, match="OpenVINO cannot run .*; use runtime onnxruntime"):
        OpenVinoArtifact.of(damaged, about, "cpu")
    monkeypatch.setattr(runner, "torch_device", torch.device)
    with pytest.raises(ValueError, match="CPU, not on cuda:0; use runtime onnxruntime"):
        open_artifact(path, device="cuda:0", runtime="openvino")


def test_a_missing_package_names_its_extra(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"'adavipro_fast\[openvino\]', or use runtime onnx"):
        open_artifact(exported(input="uint8"), device="cpu", runtime="openvino")


def test_a_checkpoint_has_no_choice_of_runtime(references):
    with pytest.raises(
        ValueError, match=r"openvino only runs .onnx files, and .* is not one; leave"
    ):
        open_artifact(references["a"][0], runtime="openvino")


def test_commands_take_the_runtime(exported, folder, cache, tmp_path):
    path, data = exported(input="uint8"), DataConfig(str(folder), cache_dir=cache)
    theirs, ours = (
        evaluate.command(EvaluateConfig(path, data, device="cpu", runtime=runtime))
        for runtime in ("onnxruntime", "openvino")
    )
    assert (theirs["backend"], ours["backend"]) == ("onnxruntime", "openvino")
    same = ("top1", "n", "mask_density", "mask_adaptivity")
    assert [ours[key] for key in same] == [theirs[key] for key in same]
    image = tmp_path / "image.png"
    Image.new("RGB", (70, 60), "olive").save(image)
    first, second = (
        predict.command(PredictConfig(path, (image,), runtime=runtime, device="cpu"))
        for runtime in ("onnxruntime", "openvino")
    )
    assert first["predictions"][0]["answer"] == second["predictions"][0]["answer"]
    (served,) = serve.opened(ServeConfig((str(path),), runtime="openvino"), ("cpu",))
    assert served.now.artifacts[0].backend == "openvino"
