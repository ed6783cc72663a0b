"""The page: answers equal to `predict`'s, errors in one line, and what a browser shows of it."""

import base64
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from adavipro_fast import AdaViPro, PromptConfig, app, cli, open_artifact, predict
from adavipro_fast.app import AppConfig
from adavipro_fast.artifact.torch import TorchArtifact
from adavipro_fast.data.images import read_pixels
from adavipro_fast.export import onnx_export
from adavipro_fast.export.comparison import Unprompted
from adavipro_fast.export.onnx_export import OnnxConfig
from adavipro_fast.files.checkpoint import checkpoint_of
from adavipro_fast.method.calibration import Calibration
from adavipro_fast.predict import PredictConfig

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
        paths[task] = root / task / "checkpoint.safetensors"
        checkpoint.save(paths[task])
    both = root / "both.onnx"
    settings = {"input": "uint8", "graph": "pixel"}
    onnx_export.export(OnnxConfig(paths["shapes"], both, (paths["signs"],), **settings))
    bare = AdaViPro(encoder, torch.eye(3, 64), PromptConfig(method="zero_shot"))
    checkpoint_of(bare, NAMES["shapes"]).save(root / "zero_shot.safetensors")
    return {**paths, "both": both, "bare": root / "zero_shot.safetensors"}


@pytest.fixture(scope="module")
def image(folder) -> Path:
    return min((folder / "test").rglob("*.jpg"))


@pytest.fixture
def page_of():
    """Return a client of the page of a file, as `app` makes it."""
    made = []

    def make(path, **settings):
        server = app.prepared(AppConfig(path, port=0, device="cpu", **settings))
        client = TestClient(server.uvicorn.config.app, base_url=server.address)
        made.append((server, client))
        return client.__enter__()

    yield make
    for server, client in made:
        client.__exit__(None, None, None)
        server.listening.close()


def viewed(client, image, **chosen):
    return client.post("/view", params=chosen, content=image.read_bytes())


def size_of(address):
    header, content = address.split(",")
    assert header == "data:image/png;base64"
    return Image.open(BytesIO(base64.b64decode(content))).size


def predicted(path, image, **settings):
    config = PredictConfig(path, (image,), device="cpu", **settings)
    return predict.command(config)["predictions"][0]


SHARED = ("answer", "rejected", "classes", "mask")


@pytest.mark.parametrize("reject", [None, 0.999])
def test_the_page_answers_as_predict_does(files, page_of, image, reject):
    client = page_of(files["shapes"], reject=reject)
    chosen = {} if reject is None else {"reject": reject}
    seen = viewed(client, image, **chosen).json()
    expected = predicted(files["shapes"], image, reject=reject)
    assert {name: seen[name] for name in SHARED} == {name: expected[name] for name in SHARED}
    assert seen["answer"] == ("unknown" if reject else seen["classes"][0]["name"])
    assert size_of(seen["prompted"]) == (224, 224)
    assert min(size_of(seen["picture"])) > 400
    assert seen["milliseconds"] > 0
    told = client.get("/page.json").json()
    assert told["reject"] == reject
    (model,) = told["models"]
    assert model["beside"] == "Without the prompt, not calibrated"
    assert model["calibrated"]


def test_each_task_of_a_file_is_answered_and_an_exported_file_has_no_prompted_picture(
    files, page_of, image
):
    client = page_of(files["both"], beside=files["bare"])
    (model,) = client.get("/page.json").json()["models"]
    assert model["tasks"] == list(NAMES)
    assert not model["prompted_picture"]
    for task, names in NAMES.items():
        seen = viewed(client, image, task=task).json()
        expected = predicted(files["both"], image, task=task)
        assert {name: seen[name] for name in SHARED} == {name: expected[name] for name in SHARED}
        assert {row["name"] for row in seen["classes"]} == set(names)
        assert seen["prompted"] is None
        assert seen["beside"]["classes"] == predicted(files["bare"], image)["classes"]
    assert viewed(page_of(files["both"]), image, task="signs").json()["beside"] is None
    assert viewed(client, image).status_code == 400


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


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_file_that_is_no_picture_is_one_line(files, page_of, tmp_path):
    client, bad, huge = page_of(files["shapes"]), tmp_path / "<b>.jpg", tmp_path / "huge.png"
    bad.write_text("no picture")
    told = viewed(client, bad, name=bad.name)
    assert told.status_code == 400
    assert told.json()["error"].startswith("cannot read image '<b>.jpg': it is damaged")
    # Its size is in the header; nothing of it is decoded.
    Image.new("1", (12_000, 12_000)).save(huge)
    assert "12000x12000 is more than" in viewed(client, huge).json()["error"]


def test_names_of_other_hosts_are_refused_and_the_page_asks_nobody_else(files, page_of):
    client = page_of(files["shapes"])
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert "http" not in page.text
    for path in ("/", "/page.json"):
        assert client.get(path, headers={"Host": "rebound.example"}).status_code == 400


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"host": "0.0.0.0"}, "0.0.0.0 is reachable from other machines; use adavipro-serve"),
        ({"host": "example.org"}, "example.org is reachable from other machines"),
        ({"beside": "both"}, "both.onnx holds several tasks; --beside needs a file with one"),
        ({"reject": 1.5}, "reject is 1.5"),
        ({"task": "cats"}, "one task without a name, not 'cats'"),
    ],
)
def test_what_cannot_be_shown_is_refused(files, flags, message):
    if "beside" in flags:
        flags = {"beside": files[flags["beside"]]}
    with pytest.raises(ValueError, match=message):
        app.command(AppConfig(files["shapes"], port=0, device="cpu", **flags))


def test_without_a_web_server_the_extra_is_named(files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: app.command(AppConfig(files["shapes"], port=0, device="cpu")))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: serving needs more packages: pip install 'adavipro_fast[serve]'")


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
        assert "press Ctrl-C to stop" in line, line + process.stderr.read()
        address = line.split(" at ")[1].split(";")[0]
        yield address
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (0, "")
    assert json.loads(out.splitlines()[-1]) == {"address": address, "pictures": 3}


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_browser_shows_classes_masks_errors_and_tasks(address, files, image, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    (tmp_path / "notes.txt").write_text("no picture")
    asked, complaints = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        answer, drop = page.get_by_test_id("answer"), page.get_by_label("Picture")
        expect(page.get_by_label("Task")).to_be_visible()
        drop.set_input_files(image)
        best = predicted(files["both"], image, task="shapes")["answer"]
        expect(answer).to_have_text(best)
        expect(page.get_by_test_id("beside")).to_be_visible()
        expect(page.get_by_role("listitem")).to_have_count(6)
        expect(page.get_by_alt_text("Where the prompt is added")).to_be_visible()
        expect(page.get_by_text("An exported file cannot show the prompted image")).to_be_visible()
        expect(page.get_by_alt_text("The prompted picture")).not_to_be_visible()
        # The place is empty again, for the next one.
        drop.set_input_files(tmp_path / "notes.txt")
        expect(page.get_by_role("alert")).to_contain_text("cannot read image 'notes.txt'")
        expect(answer).not_to_be_visible()
        drop.set_input_files(image)
        expect(answer).to_have_text(best)
        page.get_by_label("Task").select_option("signs")
        expect(answer).to_have_text(predicted(files["both"], image, task="signs")["answer"])
        assert not complaints
        # The page is left open: it must not keep the command from ending.
        browser.close()
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)
