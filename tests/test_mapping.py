"""Mapped heads: the assignment, a small classifier trained here, prompts behind it, every file."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from adavipro_fast import compare, evaluate, open_artifact, predict
from adavipro_fast.data.sets import DataConfig, load_test
from adavipro_fast.data.split import Split
from adavipro_fast.evaluate import EvaluateConfig
from adavipro_fast.export import relabel, to_onnx
from adavipro_fast.export.relabel import RelabelConfig
from adavipro_fast.export.to_onnx import OnnxConfig
from adavipro_fast.files.checkpoint import load_checkpoint
from adavipro_fast.method.clip import load_encoder
from adavipro_fast.method.config import PromptConfig
from adavipro_fast.method.encoder import Classifier
from adavipro_fast.method.functional import normalise
from adavipro_fast.method.model import AdaViPro
from adavipro_fast.predict import PredictConfig
from adavipro_fast.training.group import Group
from adavipro_fast.training.mapping import assigned, counted, map_classes, unprompted
from adavipro_fast.training.start import build, load, resume_run, start_run

NAME, SIDE, COLOURS = "timm:test_vit", 160, 8
# The classes, in their order, are these colours of the classifier's.
PERMUTATION = (6, 1, 4, 7, 2)
CPU = torch.device("cpu")


def coloured(labels, generator, shift=0.0):
    """Draw images of one hue each, (N, 3, S, S) uint8; the shift is in steps between colours."""
    turn = labels + shift + 0.3 * (torch.rand(len(labels), generator=generator) - 0.5)
    phases = torch.arange(3) * 2 * math.pi / 3
    hue = 0.5 + 0.35 * torch.cos(turn[:, None] * 2 * math.pi / COLOURS - phases)
    patches = 0.1 * torch.randn(len(labels), 3, SIDE // 16, SIDE // 16, generator=generator)
    noise = patches.repeat_interleave(16, 2).repeat_interleave(16, 3)
    return ((hue[:, :, None, None] + noise).clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Train a small classifier of eight colours for a few seconds."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=COLOURS)
    mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        labels = torch.randint(0, COLOURS, (16,), generator=generator)
        images = normalise(coloured(labels, generator), mean, std)
        loss = F.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    path = tmp_path_factory.mktemp("classifier") / "weights.safetensors"
    save_file(model.state_dict(), path)
    return path


def written(root, shift):
    generator = torch.Generator().manual_seed(1)
    for split, count in {"train": 12, "val": 8, "test": 8}.items():
        for number, colour in enumerate(PERMUTATION):
            folder = root / split / f"class {number}"
            folder.mkdir(parents=True)
            images = coloured(torch.full((count,), float(colour)), generator, shift)
            for i, image in enumerate(images):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def renamed(tmp_path_factory):
    """Some of the classifier's colours, in another order and by other names."""
    return written(tmp_path_factory.mktemp("renamed"), shift=0.0)


@pytest.fixture(scope="module")
def shifted(tmp_path_factory):
    """Colours between the classifier's."""
    return written(tmp_path_factory.mktemp("shifted"), shift=0.5)


@pytest.fixture(scope="module")
def settings(small, weights, cache):
    def of(output, data, method="adavipro", epochs=2, mapping="iterative"):
        config = small(output, epochs=epochs, precision="fp32", lr_prompt=500.0, mapping=mapping)
        prompt = {"head": "mapped", "prompt_init": "zero"}
        return replace(
            config,
            model=NAME,
            pretrained=str(weights),
            data=DataConfig(str(data), cache_dir=cache),
            prompt=replace(config.prompt, method=method, region_size=32, **prompt),
        )

    return of


@pytest.fixture(scope="module")
def run(settings, shifted, tmp_path_factory):
    """Train a prompt with the iterative mapping, once."""
    config = settings(tmp_path_factory.mktemp("run"), shifted)
    return config, start_run(config)


def rows_of(encoder, mapping):
    return encoder.classifier.weight[list(mapping)]


def test_the_largest_counts_are_assigned_first_and_no_source_class_twice():
    # Both classes are seen most often as source class 1; the surer one has it.
    assert assigned(torch.tensor([[0.0, 3], [9, 7], [1, 0]])).tolist() == [1, 0]
    counts = torch.randint(0, 4, (9, 6)).float()
    before = counts.clone()
    mapping = assigned(counts)
    assert len(set(mapping.tolist())) == 6
    assert torch.equal(counts, before)
    assert torch.equal(mapping, assigned(counts))


def test_ties_go_to_the_first_and_what_is_never_predicted_takes_what_is_left():
    assert assigned(torch.tensor([[2.0, 2], [2, 2], [2, 2]])).tolist() == [0, 1]
    counts = torch.tensor([[0.0, 5, 0], [0, 0, 0], [0, 0, 4], [0, 0, 0]])
    assert assigned(counts).tolist() == [1, 0, 2]
    # As many source classes as there are.
    assert assigned(torch.tensor([[0.0, 1, 5], [0, 0, 6], [3, 0, 0]])).tolist() == [2, 0, 1]


def test_more_classes_than_the_classifiers_are_refused(weights):
    with pytest.raises(ValueError, match="9 classes cannot be mapped one to one: .* has 8; use"):
        unprompted(load_encoder(NAME, str(weights)), 9, 32)


def test_the_classifier_reads_the_features_and_is_no_part_of_the_hash(weights, tmp_path):
    encoder = load_encoder(NAME, str(weights))
    whole = timm.create_model("test_vit", num_classes=COLOURS).eval()
    state = load_file(weights)
    whole.load_state_dict(state)
    images = torch.randn(2, 3, SIDE, SIDE)
    assert isinstance(encoder.classifier, Classifier)
    with torch.no_grad():
        logits = encoder.classifier(encoder.embed(images)[1])
        torch.testing.assert_close(logits, whole(images), rtol=0, atol=1e-4)
    twin, thawed = encoder.with_(precision="bf16"), encoder.thawed()
    assert torch.equal(twin.classifier.weight, encoder.classifier.weight)
    assert torch.equal(thawed.classifier.weight, encoder.classifier.weight)
    assert not any("classifier" in name for name, _ in thawed.named_parameters())
    # The same weights without the classifier's are the same encoder.
    features = {name: value for name, value in state.items() if "head." not in name}
    save_file(features, tmp_path / "features.safetensors")
    alone = load_encoder(NAME, str(tmp_path / "features.safetensors"))
    assert alone.sha256 == encoder.sha256
    with pytest.raises(ValueError, match="no classifier to map classes from: its weights come"):
        unprompted(alone, 5, 32)
    # With a classifier, a file that leaves weights out would leave them random.
    del state["norm.weight"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r'cannot be loaded: .*Missing key.*"norm\.weight"'):
        load_encoder(NAME, str(tmp_path / "part.safetensors"))


def test_zero_shot_finds_the_classes_by_other_names(settings, renamed, weights, tmp_path):
    config = settings(tmp_path / "run", renamed, "zero_shot")
    result = start_run(config)
    assert result["test_top1"] == result["zero_shot_top1"] > 90
    assert result["trainable_params"] == 0
    tensors = load_file(result["checkpoint"])
    encoder = load_encoder(NAME, str(weights))
    assert torch.equal(tensors["class_embeddings"], rows_of(encoder, PERMUTATION))
    assert torch.equal(tensors["class_bias"], encoder.classifier.bias[list(PERMUTATION)])
    checkpoint = load_checkpoint(Path(result["checkpoint"]))
    assert (checkpoint.config.head, checkpoint.config.head_input) == ("mapped", "features")
    assert "the encoder's own classifier" in str(checkpoint.generate_model_card())
    other = RelabelConfig(
        Path(result["checkpoint"]), tmp_path / "o.safetensors", classes=("a", "b")
    )
    with pytest.raises(ValueError, match="has a mapped head, no names to embed"):
        relabel.command(other)


def test_another_prompt_has_another_mapping_and_processes_count_together(weights):
    encoder, generator = load_encoder(NAME, str(weights)), torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat(30)
    images = coloured(torch.tensor(PERMUTATION)[labels], generator)
    split = Split(images, labels, torch.arange(len(labels)))
    alone = unprompted(encoder, 5, 32)
    assert map_classes(alone, split, Group()) == 5
    assert torch.equal(alone.class_embeddings, rows_of(encoder, PERMUTATION))
    assert map_classes(alone, split, Group()) == 0
    config = PromptConfig("vp", prompt_size=60, head="mapped", head_input="features")
    prompted = AdaViPro(encoder, alone.class_embeddings, config, class_bias=alone.class_bias)
    prompted.prompt.template.load(F.pad(torch.zeros(3, 40, 40), (60,) * 4, value=4.0))
    assert map_classes(prompted.train(), split, Group()) > 0
    assert prompted.prompt.training

    class Part(Group):
        def sum(self, value):
            return value

    parts = [counted(prompted, split, Part(rank, 2)) for rank in range(2)]
    assert torch.equal(sum(parts), counted(prompted, split, Group()))
    assert sum(parts).sum() == len(split)


def test_a_prompt_finds_better_classes_on_its_way(run):
    _, result = run
    assert 25 < result["zero_shot_top1"] < 80
    assert result["val_top1"] > 90
    assert result["test_top1"] > result["zero_shot_top1"]


def test_a_resumed_run_has_the_mapping_of_one_that_was_never_stopped(run, tmp_path):
    config, _ = run
    again = replace(config, output=tmp_path / "run")
    stopped = build(again, load(again)).trainer
    stopped.run(until=1)
    untrained = stopped.model.class_embeddings.clone()
    stopped.stop()
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    # It was stopped in the middle of an epoch that began with another mapping.
    assert stopped.progress.step == 1
    assert not torch.equal(stopped.model.class_embeddings, untrained)
    resume_run(tmp_path / "run")
    for name in ("checkpoint.safetensors", "last.safetensors"):
        ours, theirs = (load_file(folder / name) for folder in (tmp_path / "run", config.output))
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@pytest.mark.parametrize("graph", ["folded", pytest.param("pixel", marks=pytest.mark.slow)])
def test_every_file_gives_the_same_answers(run, graph, tmp_path):
    config, result = run
    path, file = Path(result["checkpoint"]), tmp_path / "f.onnx"
    exported = to_onnx.command(OnnxConfig(path, file, graph=graph, input="uint8"))
    assert exported["verified"]
    _, test, _ = load_test(config.data, load_checkpoint(path).preprocess)
    pixels, _ = test.batch(torch.arange(len(test)), CPU)
    ours, theirs = (open_artifact(p, device="cpu")(pixels) for p in (path, file))
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-3)
    assert torch.equal(ours.mask, theirs.mask)
    alone = open_artifact(path, device="cpu").unprompted()
    assert alone.about.config.method == "zero_shot"
    assert alone(pixels).logits.shape == (len(test), 5)
    figures = evaluate.command(EvaluateConfig(file, data=config.data, device="cpu"))
    assert figures["top1"] == result["test_top1"]
    image = next((Path(config.data.data) / "test" / "class 2").iterdir())
    said = predict.command(PredictConfig(file, (image,)))
    assert said["predictions"][0]["classes"][0]["name"] == "class 2"


def test_what_cannot_be_mapped_is_told_in_one_line(small, settings, renamed, tmp_path):
    config = settings(tmp_path / "run", renamed)

    def refused(message, config):
        with pytest.raises(ValueError, match=message) as told:
            start_run(config)
        assert "\n" not in str(told.value)

    clip = replace(config, model="demo", pretrained="")
    refused("encoder 'demo' has no classifier .* it is a CLIP; use --head text", clip)
    distilled = replace(config, model="timm:deit_tiny_distilled_patch16_224", pretrained="")
    refused("no classifier .* is not one linear layer", distilled)
    refused("add --head linear", replace(config, head_from=tmp_path / "head.safetensors"))
    refused("are no part of a mapped head", replace(config, class_embeddings=tmp_path / "rows"))
    once = small(tmp_path / "other", mapping="frequency")
    refused("--mapping frequency is of --head mapped; add that", once)
    for method in ("linear_probe", "full_finetune"):
        with pytest.raises(ValueError, match=f"{method} learns a head of its own; --head mapped"):
            PromptConfig(method, head="mapped")
    with pytest.raises(ValueError, match="a mapped head reads features"):
        PromptConfig(head="mapped", head_input="embedding")
    with pytest.raises(ValueError, match="compare tries text and linear heads"):
        compare.candidates(config, tmp_path, [])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vp", "adavipro"])
def test_the_iterative_mapping_is_ahead_of_the_first_one(settings, shifted, tmp_path, method):
    results = {}
    for mapping in ("frequency", "iterative"):
        config = settings(tmp_path / mapping, shifted, method, mapping=mapping)
        results[mapping] = start_run(config)
    before = results["frequency"]
    assert before["zero_shot_top1"] == results["iterative"]["zero_shot_top1"]
    assert before["last_test_top1"] < results["iterative"]["last_test_top1"] - 10
