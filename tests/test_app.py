"""The page: answers equal to `predict`'s, errors in one line, and what a browser shows of it."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gradio
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from adavipro_fast import AdaViPro, PromptConfig, app, cli, open_artifact, predict
from adavipro_fast.app import AppConfig
from adavipro_fast.artifact.torch import TorchArtifact
from adavipro_fast.data.images import read_pixels
from adavipro_fast.export import to_onnx
from adavipro_fast.export.to_onnx import OnnxConfig
from adavipro_fast.export.verify import Unprompted
from adavipro_fast.files.checkpoint import checkpoint_of
from adavipro_fast.method.calibration import Calibration
from adavipro_fast.predict import PredictConfig
from adavipro_fast.serving.page import Page
from adavipro_fast.serving.viewer import Viewer

NAMES = {"shapes": ("disc", "ring", "star"), "signs": ("yes", "no")}
CHROMIUM = shutil.which("chromium") or shutil.which("/usr/bin/chromium")
# A browser of this test alone, which asks nobody for anything.
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def files(demo_clip, tmp_path_factory):
    """A checkpoint a task, one file of both tasks, and an encoder alone."""
    root, (encoder, text) = tmp_path_factory.mktemp("page"), demo_clip
    torch.manual_seed(5)
    paths = {}
    for task, names in NAMES.items():
        config = PromptConfig(embed_dim=4, edge="laplacian-magnitude", edge_padding="replicate")
        model = AdaViPro(encoder, text.class_embeddings(names, ["{}"]), config)
        quantiles = tuple(torch.linspace(0.3, 1, 101).tolist())
        checkpoint = replace(checkpoint_of(model, names), calibration=Calibration(2.0, quantiles))
        paths[task] = root / task / checkpoint.file_name
        checkpoint.save(paths[task])
    both = root / "both.onnx"
    settings = {"input": "uint8", "graph": "pixel"}
    to_onnx.command(OnnxConfig(paths["shapes"], both, (paths["signs"],), **settings))
    bare = AdaViPro(encoder, torch.eye(3, 64), PromptConfig(method="zero_shot"))
    checkpoint_of(bare, NAMES["shapes"]).save(root / "zero_shot.safetensors")
    return {**paths, "both": both, "bare": root / "zero_shot.safetensors"}


@pytest.fixture(autouse=True)
def uploads(tmp_path_factory, monkeypatch):
    """Uploads lie apart from the pictures of the test, as they do under the command."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))


@pytest.fixture(scope="module")
def image(folder) -> Path:
    return min((folder / "test").rglob("*.jpg"))


def viewed(path, image, *, beside=None, task=None, reject=None):
    viewer = Viewer(
        open_artifact(path, device="cpu"),
        beside and open_artifact(beside, device="cpu"),
        reject,
    )
    return viewer.view(image.read_bytes(), image.name, task)


def predicted(path, image, **settings):
    config = PredictConfig(path, (image,), device="cpu", **settings)
    return predict.command(config)["predictions"][0]


@pytest.mark.parametrize("reject", [None, 0.999])
def test_the_page_answers_as_predict_does(files, image, reject):
    view = viewed(files["shapes"], image, reject=reject)
    assert {"path": str(image)} | view.answer == predicted(files["shapes"], image, reject=reject)
    assert view.answer["answer"] == ("unknown" if reject else view.answer["classes"][0]["name"])
    assert view.mask.size == view.prompted.size
    assert view.latency_ms > 0


def test_each_task_of_a_file_is_answered_and_an_exported_file_has_no_prompted_picture(files, image):
    for task, names in NAMES.items():
        view = viewed(files["both"], image, task=task, beside=files["bare"])
        assert {"path": str(image)} | view.answer == predicted(files["both"], image, task=task)
        assert {row["name"] for row in view.answer["classes"]} == set(names)
        assert view.prompted is None
        assert view.beside["classes"] == predicted(files["bare"], image)["classes"]
    assert viewed(files["both"], image, task="signs").beside is None


def test_without_the_prompt_it_is_the_closed_mask_s_prediction(files, image):
    artifact = open_artifact(files["shapes"], device="cpu")
    alone = artifact.unprompted()
    pixels = read_pixels((image,), alone.about.preprocess)
    for got, expected in zip(alone(pixels), Unprompted(artifact.model)(pixels), strict=True):
        assert torch.equal(got, expected)
    assert alone.about.baseline
    assert alone.model.encoder is artifact.model.encoder


@pytest.mark.parametrize(
    "settings", [{"margin": 20}, {"method": "vp"}, {"head": "linear", "head_input": "embedding"}]
)
def test_no_prompt_has_a_margin_and_heads_stay(encoder, settings):
    rows = torch.nn.functional.normalize(torch.randn(3, 64), dim=-1)
    bias = torch.randn(3) if "head" in settings else None
    model = AdaViPro(encoder, rows, PromptConfig(embed_dim=4, **settings), class_bias=bias)
    checkpoint = checkpoint_of(model, tuple("abc"))
    artifact = TorchArtifact.of(checkpoint, model.eval(), torch.device("cpu"))
    alone, pixels = artifact.unprompted(), torch.randint(0, 256, (2, 3, 224, 224)).byte()
    assert alone.about.preprocess.margin == 0
    with torch.no_grad():
        expected = model.classify(model.prompt.normalised(pixels), torch.zeros(2, 7, 7))
    assert torch.equal(alone(pixels).logits, expected.logits)


def test_the_prompted_picture_differs_where_the_mask_is_open_and_nowhere_else(files):
    artifact = open_artifact(files["shapes"], device="cpu")
    pixels = torch.randint(0, 256, (5, 3, 224, 224), dtype=torch.uint8)
    opened = artifact(pixels).mask.bool()
    opened = opened.repeat_interleave(32, 1).repeat_interleave(32, 2)
    opened[:, 30:-30, 30:-30] = False
    differs = (artifact.prompted(pixels) != pixels).any(1)
    assert not (differs & ~opened).any()
    assert differs[opened].float().mean() > 0.9


def page_of(path):
    return Page(Viewer(open_artifact(path, device="cpu")), title="t", beside="Without the prompt")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_file_that_is_no_picture_is_one_line(files, tmp_path):
    page = page_of(files["shapes"])
    bad = tmp_path / "<b>.jpg"
    bad.write_text("no picture")
    with pytest.raises(gradio.Error) as told:
        page.drop(str(bad), None)
    assert told.value.message.startswith("cannot read image &lt;b&gt;.jpg: it is damaged")
    assert not told.value.print_exception
    # Its size is in the header; nothing of it is decoded.
    Image.new("1", (12_000, 12_000)).save(tmp_path / "huge.png")
    with pytest.raises(gradio.Error, match="12000x12000 is more than"):
        page.drop(str(tmp_path / "huge.png"), None)
    assert page.shown == 0


def test_paths_of_this_machine_are_not_read_and_other_hosts_are_refused(files, image):
    page = page_of(files["shapes"])
    client = TestClient(page.application("127.0.0.1"), base_url="http://127.0.0.1:7860")
    named = {"path": str(image), "meta": {"_type": "gradio.FileData"}}
    refused = client.post("/gradio_api/run/drop", json={"data": [named, None]})
    assert refused.status_code == 500
    assert page.shown == 0
    assert client.get(f"/gradio_api/file={image}").status_code == 403
    with image.open("rb") as content:
        (uploaded,) = client.post("/gradio_api/upload", files={"files": content}).json()
    taken = client.post("/gradio_api/run/drop", json={"data": [{**named, "path": uploaded}, None]})
    assert taken.status_code == 200
    assert page.shown == 1
    assert client.get("/", headers={"Host": "rebound.example"}).status_code == 400


def test_a_picture_is_kept_for_other_tasks(files, image):
    page = page_of(files["both"])
    assert page.show(None, "signs") == [None] * 5
    kept, *first = page.drop(str(image), "shapes")
    second = page.show(kept, "signs")
    assert (set(first[0]), set(second[0])) == tuple(set(names) for names in NAMES.values())
    assert "ms (onnxruntime, CPU" in second[-1]
    assert page.shown == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"host": "0.0.0.0"}, "0.0.0.0 can be reached by others; .*adavipro_fast.serve"),
        ({"host": "example.org"}, "example.org can be reached by others"),
        ({"beside": "both"}, "both.onnx is of several tasks; --beside takes a file of one"),
        ({"reject": 1.5}, "reject is 1.5"),
        ({"task": "cats"}, "one task without a name, not 'cats'"),
    ],
)
def test_what_cannot_be_shown_is_refused(files, flags, message):
    if "beside" in flags:
        flags = {"beside": files[flags["beside"]]}
    with pytest.raises(ValueError, match=message):
        app.command(AppConfig(files["shapes"], port=0, device="cpu", **flags))


def test_without_gradio_the_extra_is_named(files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "adavipro_fast.serving.page")
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: app.command(AppConfig(files["shapes"], port=0, device="cpu")))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the page needs its extra: pip install 'adavipro_fast[app]'")


@pytest.fixture
def address(files):
    """Start the command, and stop it as a terminal or a service would."""
    flags = ["--port", "0", "--device", "cpu", "--beside", str(files["bare"])]
    process = subprocess.Popen(
        [sys.executable, "-m", "adavipro_fast.app", str(files["both"]), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stderr.readline()
        assert "Ctrl-C ends it" in line, line + process.stderr.read()
        address = line.split(" at ")[1].split(";")[0]
        yield address
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert err == ""
    assert json.loads(out.splitlines()[-1]) == {"address": address, "pictures": 1}


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_browser_shows_classes_masks_errors_and_tasks(address, files, image, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    (tmp_path / "notes.txt").write_text("no picture")
    asked = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        answer = page.get_by_test_id("label-output-value")
        drop = page.get_by_test_id("file-upload")
        drop.set_input_files(image)
        best = predicted(files["both"], image, task="shapes")["classes"][0]["name"]
        expect(answer.first).to_have_text(best)
        expect(answer).to_have_count(2)
        expect(page.get_by_alt_text("Where the prompt is added")).to_be_visible()
        expect(page.get_by_text("An exported file gives no prompted image")).to_be_visible()
        expect(page.get_by_text("The prompted picture")).not_to_be_visible()
        # The place is empty again, for the next one.
        drop.set_input_files(tmp_path / "notes.txt")
        expect(page.get_by_test_id("toast-body")).to_contain_text("cannot read image notes.txt")
        expect(drop).to_be_attached()
        page.get_by_label("Task").click()
        page.get_by_role("option", name="signs").click()
        best = predicted(files["both"], image, task="signs")["classes"][0]["name"]
        expect(answer.first).to_have_text(best)
        # The page is left open: it must not keep the command from ending.
        browser.close()
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)
