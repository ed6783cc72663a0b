"""The Hub's address, card and errors, against a Hub on the loopback; nothing leaves the machine."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from runpy import run_path

import pytest
import torch
from huggingface_hub import ModelCard, close_session, constants

from adavipro_fast import AdaViPro, PromptConfig, cli, open_artifact, predict, push
from adavipro_fast.evaluate import EvaluateConfig
from adavipro_fast.files import hub as addresses
from adavipro_fast.files.card import Run, model_card, source_of
from adavipro_fast.files.checkpoint import checkpoint_of, load_checkpoint
from adavipro_fast.files.whole import read_safetensors
from adavipro_fast.method.config import EncoderIdentity
from adavipro_fast.serve import named
from adavipro_fast.training.run import start_run

Hub = run_path(str(Path(__file__).with_name("hub_stub.py")))["Hub"]
TOKEN = "hf_" + "secret" * 5


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    return output / "checkpoint.safetensors", start_run(small(output, epochs=1))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.close()
    close_session()


@pytest.fixture
def model(encoder):
    embeddings = torch.nn.functional.normalize(torch.randn(3, 64), dim=-1)
    return AdaViPro(encoder, embeddings, PromptConfig(embed_dim=4)).eval()


@pytest.fixture
def checkpoint(model):
    return checkpoint_of(model, ("a", "b_c", "d"))


@pytest.fixture
def published(hub, checkpoint, tmp_path):
    checkpoint.save(tmp_path / "checkpoint.safetensors")
    hub.repositories["owner/name"] = {
        "README.md": str(model_card(checkpoint)).encode(),
        "checkpoint.safetensors": (tmp_path / "checkpoint.safetensors").read_bytes(),
    }
    return hub


def pixels(count=2):
    return torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8)


def call(module, capsys, monkeypatch, *arguments):
    """Run a command in this process: its exit code, JSON and stderr."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    code = 0
    try:
        module.main()
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    return code, json.loads(lines[-1]) if lines else None, captured.err


def refused(module, capsys, monkeypatch, *arguments):
    """Return the one line of a command that fails as a bad request."""
    code, printed, complaint = call(module, capsys, monkeypatch, *arguments)
    assert (code, printed) == (2, None)
    assert complaint.count("\n") == 1
    return complaint


def test_push_sends_the_file_itself_and_the_address_opens_it(
    hub, trained, folder, capsys, monkeypatch
):
    path, _ = trained
    code, result, _ = call(push, capsys, monkeypatch, path, "owner/name")
    assert code == 0
    assert result["address"] == "hub:owner/name"
    assert result["files"] == ["README.md", "checkpoint.safetensors", "curves.png", "masks.png"]
    sent = hub.repositories["owner/name"]
    assert sorted(sent) == result["files"]
    for name in result["files"][1:]:
        assert sent[name] == path.with_name(name).read_bytes()
    images = sorted((folder / "test").rglob("*.*"))[:3]
    here = call(predict, capsys, monkeypatch, path, *images)
    there = call(predict, capsys, monkeypatch, "hub:owner/name", *images)
    assert there[:2] == here[:2]
    pinned = open_artifact(f"hub:owner/name@{result['commit']}", device="cpu")
    x = pixels()
    assert torch.equal(pinned(x).logits, open_artifact(path, device="cpu")(x).logits)


def test_a_token_is_used_and_stands_in_no_file_and_no_line(
    hub, trained, tmp_path, folder, capsys, monkeypatch, caplog
):
    hub.may_write = hub.may_read = TOKEN
    caplog.set_level("DEBUG")
    monkeypatch.setattr(cli, "fail", lambda message, code=2: print("error:", message))
    image = next((folder / "test").rglob("*.jpg"))
    monkeypatch.chdir(tmp_path)
    for module, *arguments in (
        (push, trained[0], "owner/name"),
        (predict, "hub:owner/name", image),
        (predict, "hub:owner/other", image),
    ):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        module.main()
    captured = capsys.readouterr()
    assert "pushed" in captured.err
    assert TOKEN not in captured.out + captured.err + caplog.text
    roots = (tmp_path, trained[0].parent)
    files = [file for root in roots for file in root.rglob("*") if file.is_file()]
    assert len(files) > 3
    assert not [file for file in files if TOKEN.encode() in file.read_bytes()]
    assert not [n for n, c in hub.repositories["owner/name"].items() if TOKEN.encode() in c]


def test_what_was_fetched_once_opens_offline(published, monkeypatch):
    online = open_artifact("hub:owner/name", device="cpu")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    count, x = len(published.requests), pixels()
    offline = open_artifact("hub:owner/name", device="cpu")
    assert torch.equal(offline(x).logits, online(x).logits)
    assert len(published.requests) == count


@pytest.mark.parametrize(
    ("address", "line"),
    [
        (
            "hub:owner/nothing",
            "owner/nothing does not exist on the Hub, or you have no access to it; check",
        ),
        ("hub:owner/name@no", "owner/name has no such revision; use a branch, a tag or a commit"),
        ("hub:owner/empty", "owner/empty has no checkpoint.safetensors; choose another file with"),
        ("hub:owner/name/x.onnx", "owner/name has no x.onnx; choose another file with"),
        ("hub:owner/name/x.engine", "x.engine of owner/name: only .safetensors and .onnx files"),
        ("hub:name", "hub:name is not a Hub address; use hub:owner/name"),
        ("hub:owner/na--me", "Cannot have -- or .. in repo_id"),
    ],
)
def test_what_is_not_there_is_named_in_one_line(
    published, folder, address, line, capsys, monkeypatch
):
    published.repositories["owner/empty"] = {}
    image = next((folder / "test").rglob("*.jpg"))
    assert line in refused(predict, capsys, monkeypatch, address, image)


def damaged(content):
    return content[:-100]


def other_format(content):
    return content.replace(b"adavipro-fast/1", b"adavipro-slow/1")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (damaged, "is truncated or not a safetensors file of adavipro_fast"),
        (other_format, "has format 'adavipro-slow/1'; expected 'adavipro-fast/1'"),
        (lambda _: b"<html>", "is truncated or not a safetensors file of adavipro_fast"),
    ],
)
def test_a_file_that_is_not_ours_is_refused(published, change, line):
    files = published.repositories["owner/name"]
    files["checkpoint.safetensors"] = change(files["checkpoint.safetensors"])
    with pytest.raises(ValueError, match=line):
        open_artifact("hub:owner/name", device="cpu")


def test_another_encoder_is_refused_by_its_hash(hub, checkpoint, tmp_path):
    strange, path = (
        replace(checkpoint, encoder=EncoderIdentity("demo", "", "0" * 64)),
        tmp_path / "f",
    )
    strange.save(path)
    hub.repositories["owner/name"] = {"checkpoint.safetensors": path.read_bytes()}
    with pytest.raises(ValueError, match="is not the one this checkpoint was trained on"):
        open_artifact("hub:owner/name", device="cpu")


@pytest.mark.parametrize(("token", "status"), [(TOKEN, 403), (None, 401)])
def test_who_may_not_write_is_told_so(hub, trained, token, status, capsys, monkeypatch):
    hub.may_write = "another"
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nothing")
    line = refused(push, capsys, monkeypatch, trained[0], "owner/name")
    assert f"no permission to write to owner/name ({status}); log in with `hf auth login`" in line
    assert not hub.repositories


def test_without_a_network_the_way_out_is_named(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.close()
    with pytest.raises(FileNotFoundError, match="not in the cache, and the Hub cannot be reached"):
        open_artifact("hub:owner/name")
    with pytest.raises(ConnectionError, match="owner/name: the Hub cannot be reached; check netwo"):
        addresses.send(tmp_path, "owner/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="not in the cache, and HF_HUB_OFFLINE is set"):
        open_artifact("hub:owner/name")
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set; unset it to access owner/n"):
        addresses.send(tmp_path, "owner/name")


def test_private_means_private(hub, trained, capsys, monkeypatch):
    call(push, capsys, monkeypatch, trained[0], "owner/mine", "--private")
    assert hub.private == {"owner/mine"}
    hub.repositories["owner/public"] = {}
    line = refused(push, capsys, monkeypatch, trained[0], "owner/public", "--private")
    assert "owner/public exists and is public; make it private, or choose another" in line
    assert not hub.repositories["owner/public"]


def test_a_card_that_the_hub_does_not_take_is_told_with_its_reason(
    hub, trained, capsys, monkeypatch
):
    arguments = (trained[0], "owner/name", "--license", "nonsense")
    line = refused(push, capsys, monkeypatch, *arguments)
    assert '"license" must be one of' in line
    assert not hub.repositories["owner/name"]


def test_a_hub_in_trouble_is_told_by_its_answer(hub, tmp_path):
    hub.repositories["owner/name"] = {}
    hub.trouble = 418
    with pytest.raises(ConnectionError, match="the Hub answered 418 for owner/name: in trouble"):
        addresses.send(tmp_path, "owner/name")


@pytest.mark.parametrize("name", ["name", "hub:owner/name", "a/b/c", "a/b@c", ""])
def test_a_name_that_is_no_repository_is_refused_before_anything_is_sent(
    hub, trained, name, capsys, monkeypatch
):
    line = refused(push, capsys, monkeypatch, trained[0], name)
    assert f"{name!r} is not a repository name; use OWNER/NAME" in line
    assert not hub.requests


def test_every_command_takes_the_address_and_an_output_is_left_alone(published, tmp_path):
    config = EvaluateConfig(Path("hub:owner/name"))
    assert (
        cli.on_disk(config).artifact.read_bytes()
        == (published.repositories["owner/name"]["checkpoint.safetensors"])
    )
    name, path = named("hub:owner/name")
    assert name == "name"
    assert path.is_file()
    assert addresses.run_name(path) == "name"
    assert addresses.run_name(tmp_path / "runs" / "mine" / "checkpoint.safetensors") == "mine"


def test_an_exported_file_is_fetched_by_its_name(published):
    published.repositories["owner/name"]["graphs/mine.onnx"] = b"graph"
    path = addresses.on_disk(Path("hub:owner/name@main/graphs/mine.onnx"))
    assert path.name == "mine.onnx"
    assert path.read_bytes() == b"graph"


def test_a_graph_s_second_file_of_weights_is_fetched_with_it(published):
    files = published.repositories["owner/name"]
    files["large.onnx"], files["large.onnx.data"] = b"graph with data_sha256", b"weights"
    path = addresses.on_disk(Path("hub:owner/name/large.onnx"))
    assert path.with_name("large.onnx.data").read_bytes() == b"weights"
    del files["large.onnx.data"]
    files["alone.onnx"] = b"another graph with data_sha256"
    with pytest.raises(FileNotFoundError, match="owner/name has no alone.onnx.data"):
        addresses.on_disk(Path("hub:owner/name/alone.onnx"))


def card_of(hub):
    return ModelCard(hub.repositories["owner/name"]["README.md"].decode())


def test_the_card_tells_the_runs_figures_with_split_and_seed(hub, trained, capsys, monkeypatch):
    path, result = trained
    call(push, capsys, monkeypatch, path, "owner/name", "--license", "apache-2.0")
    card = card_of(hub)
    assert card.data.library_name == "adavipro_fast"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.license == "apache-2.0"
    (measured,) = card.data.eval_results
    assert measured.dataset_split == "test"
    assert measured.metric_name == "top-1 accuracy, seed 0"
    assert measured.metric_value == round(result["test_top1"] / 100, 4)
    assert f"| This model | 9 validation | {result['val_top1']:.1f} |" in card.text
    assert f"| This model | 12 test | {result['test_top1']:.1f} |" in card.text
    assert f"| 12 test | {result['zero_shot_top1']:.1f} |" in card.text
    assert "(30 training images), with seed 0; another seed gives another accuracy" in card.text
    for name in load_checkpoint(path).class_names:
        assert f"`{name}`" in card.text
    assert "](masks.png)" in card.text
    assert "`--reject 0.05`" in card.text
    assert 'open_artifact("hub:owner/name")' in card.text
    assert "its licence is apache-2.0" in card.text
    assert str(path.parent) not in str(card)


def test_a_card_without_a_run_invents_no_figure(hub, trained, tmp_path, capsys, monkeypatch):
    path = tmp_path / "alone.safetensors"
    path.write_bytes(trained[0].read_bytes())
    _, _, complaint = call(push, capsys, monkeypatch, path, "owner/name")
    assert "no finished run beside the checkpoint" in complaint
    card = card_of(hub)
    assert not card.data.eval_results
    assert "model" not in card.data.to_yaml()
    assert "No accuracy is known" in card.text
    assert "its author stated no licence" in card.text
    assert card.data.license is None


def test_the_cards_python_runs_as_it_stands(published, folder, tmp_path, monkeypatch, capsys):
    code = card_of(published).text.split("```python\n")[1].split("```")[0]
    (tmp_path / "photo.jpg").symlink_to(next((folder / "test").rglob("*.jpg")))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.split()[0] in ("a", "b_c", "d")


@pytest.mark.parametrize(
    ("name", "tag", "what", "repository", "licence"),
    [
        (
            *("ViT-B-32", "openai", "`ViT-B-32` of open_clip, weights `openai`"),
            *("timm/vit_base_patch32_clip_224.openai", None),
        ),
        ("ViT-B-32", "secret/w.pt", "`ViT-B-32` of open_clip, weights from the a", None, None),
        ("hf-hub:owner/clip", "", "`hf-hub:owner/clip` of open_clip", "owner/clip", None),
        ("local-dir:secret/clip", "", "one from the author", None, None),
        (
            *("timm:vit_small_patch14_dinov2", "lvd142m"),
            "`timm:vit_small_patch14_dinov2` of timm, weights `lvd142m`",
            *("timm/vit_small_patch14_dinov2.lvd142m", "apache-2.0"),
        ),
        ("timm:vit_small_patch14_dinov2", "unknown", "of timm, weights `unknown`", None, None),
        (
            "timm:vit_small_patch14_dinov2.lvd142m",
            "",
            "`timm:vit_small_patch14_dinov2.lvd142m` of",
            "timm/vit_small_patch14_dinov2.lvd142m",
            "apache-2.0",
        ),
        ("ViT-B-32", "", "`ViT-B-32` of open_clip, with random weights", None, None),
        ("demo", "", "in the package `adavipro_fast`", None, None),
    ],
)
def test_the_card_names_the_encoder_and_no_path(checkpoint, name, tag, what, repository, licence):
    identity = EncoderIdentity(name, tag, "0" * 64)
    source = source_of(identity)
    assert what in source.what
    assert (source.repository, source.licence) == (repository, licence)
    card = model_card(replace(checkpoint, encoder=identity))
    assert card.data.base_model == repository
    assert "secret" not in str(card)
    assert ("see the encoder" in card.text) == (name != "demo")


def test_names_of_classes_cannot_write_the_card(checkpoint):
    names = ("`</code><script>", "a\n# b", "[x](y)")
    text = model_card(replace(checkpoint, class_names=names)).text
    assert r"`'</code><script>`, `a\n# b`, `[x](y)`" in text


@pytest.mark.parametrize("method", ["vp", "zero_shot", "linear_probe", "full_finetune"])
def test_every_method_has_a_card(checkpoint, method):
    config = PromptConfig(method, head="linear" if method == "linear_probe" else "text")
    figures = {"val_top1": 50.0, "test_top1": 40.0, "zero_shot_top1": 40.0, "mask_density": 1.0}
    run = Run("cifar10", {}, 3, figures)
    card = model_card(replace(checkpoint, config=config, class_names=("a", "b")), run=run)
    assert card.data.datasets == "cifar10"
    assert card.data.tags[-1] == method
    assert "| This model | test | 40.0 |" in card.text
    assert ("Zero-shot: the encoder" in card.text) == (method != "zero_shot")
    assert ("As it was before this training" in card.text) == (method == "full_finetune")


def test_a_card_without_a_test_split_has_validations_figure(checkpoint):
    figures = {"val_top1": 50.0, "test_top1": None, "zero_shot_top1": None, "mask_density": 1.0}
    run = Run("cifar10", {"train": 9, "val": 3, "test": 0, "left_out": 1}, 3, figures)
    card = model_card(checkpoint, run=run)
    (result,) = card.data.eval_results
    assert (result.dataset_split, result.metric_value) == ("validation", 0.5)
    assert "| This model | 3 validation | 50.0 |" in card.text
    assert "test |" not in card.text
    assert "average over the validation images" in card.text


def test_an_encoder_of_ones_own_is_warned_of(hub, checkpoint, tmp_path, capsys, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    replace(checkpoint, encoder=EncoderIdentity("local-dir:own", "", "0" * 64)).save(path)
    _, _, complaint = call(push, capsys, monkeypatch, path, "owner/name")
    assert "the encoder is a local file (local-dir:own, no tag)" in complaint
    assert 'open_artifact("hub:owner/name", model="local-dir:FOLDER")' in card_of(hub).text


@pytest.mark.slow
def test_processes_push_export_and_predict_by_the_environment_alone(trained, folder, tmp_path):
    hub = Hub()
    hub.may_write = TOKEN
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
    }
    graph, image = tmp_path / "mine.onnx", next((folder / "test").rglob("*.jpg"))
    answers = []
    for module, *arguments in (
        ("push", trained[0], "owner/name"),
        ("predict", "hub:owner/name", image),
        ("export.to_onnx", "hub:owner/name", "--output", graph),
        ("predict", "hub:owner/name/mine.onnx", image),
    ):
        if graph.exists():
            hub.repositories["owner/name"]["mine.onnx"] = graph.read_bytes()
        done = subprocess.run(
            [sys.executable, "-m", f"adavipro_fast.{module}", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        answers.append(json.loads(done.stdout.splitlines()[-1]))
    hub.close()
    assert answers[2]["verified"]
    assert read_safetensors(trained[0])[1]["class_names"]
    chosen = [answer["predictions"][0]["answer"] for answer in (answers[1], answers[3])]
    assert chosen[0] == chosen[1]
    assert not [
        file
        for file in tmp_path.rglob("*")
        if file.is_file() and TOKEN.encode() in file.read_bytes()
    ]
