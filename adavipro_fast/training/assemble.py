"""Assemble a run: load encoder and data, build the model and its trainer."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from adavipro_fast.data.sets import Dataset, load_dataset
from adavipro_fast.device import fast_precision, slow_precision
from adavipro_fast.errors import counted
from adavipro_fast.files.checkpoint import checkpoint_of, load_checkpoint
from adavipro_fast.method.clip import TextTower, check_templates, load_clip
from adavipro_fast.method.config import PROMPTED, HeadInput, PromptConfig
from adavipro_fast.method.encoder import FrozenEncoder
from adavipro_fast.method.head import HeadRows
from adavipro_fast.method.model import AdaViPro
from adavipro_fast.training import group as distributed
from adavipro_fast.training.class_names import (
    check_embeddings,
    class_embeddings,
    needs_text,
    templates_of,
)
from adavipro_fast.training.config import TrainConfig, stored
from adavipro_fast.training.data_record import keep_data
from adavipro_fast.training.folds import FoldHeads, folded
from adavipro_fast.training.log import say
from adavipro_fast.training.probe import Features, fit_head, frozen_features, softened
from adavipro_fast.training.trainer import Trainer

CALIBRATION_IMAGES = 512
START = "start.safetensors"


@dataclass(frozen=True)
class Run:
    """A trainer, and what it starts from."""

    trainer: Trainer
    frozen: FrozenEncoder
    """in fp32"""
    embeddings: Tensor | None
    """(K, E) of the class names; none of an encoder without text"""
    config: TrainConfig


@dataclass(frozen=True)
class Loaded:
    """What runs of one encoder on one data set have in common."""

    frozen: FrozenEncoder
    """in fp32, on the device"""
    embeddings: Tensor | None
    """(K, E) of the class names; none of an encoder without text"""
    dataset: Dataset
    device: torch.device

    @cached_property
    def val_features(self) -> Features:
        """The frozen encoder's features of the validation images."""
        return frozen_features(self.frozen, self.dataset.val, self.device)


def load(config: TrainConfig) -> Loaded:
    """Load encoder and data.

    Raises:
        FileNotFoundError: data are missing.
        ValueError: encoder, prompt, data and device do not go together.
    """
    _, device = distributed.join(config.device)
    check_templates(config.template)
    if config.head_from is not None and config.prompt.head != "linear":
        raise ValueError("--head-from needs --head linear")
    frozen, text = load_clip(config.model, config.pretrained)
    frozen = frozen.with_(
        preprocess=replace(frozen.preprocess, white_level=config.white_level, decode=config.decode)
    )
    torch.manual_seed(config.optimiser.seed)
    # Wrong sizes are reported before images are decoded.
    bare = AdaViPro(frozen, torch.zeros(1, 1), config.prompt, kernel=config.kernel)
    bare.prompt.path(device)
    dataset = load_dataset(config.data, bare.preprocess, seed=config.optimiser.seed)
    embeddings = None
    if isinstance(text, TextTower) or needs_text(config):
        embeddings = class_embeddings(config, text, dataset.class_names)
        check_embeddings(config, text, dataset.class_names, embeddings)
    side = frozen.preprocess.size
    threads = counted(torch.get_num_threads(), "thread")
    say(f"encoder {config.model} on {device}, {side} px, frozen; {threads}")
    say("data: {train} train, {val} val, {test} test images".format(**dataset.counts))
    for note in dataset.facts.notes:
        say(f"warning: {note}")
    return Loaded(frozen.to(device), embeddings, dataset, device)


def with_precision(
    config: TrainConfig, group: distributed.Group, device: torch.device
) -> TrainConfig:
    """Choose the precision where it is `auto`; all processes use the leading one's choice."""
    if config.optimiser.precision != "auto":
        return config
    bf16 = group.agreed(fast_precision(device), device) == "bf16"
    return replace(
        config, optimiser=replace(config.optimiser, precision="bf16" if bf16 else "fp32")
    )


def build(config: TrainConfig, loaded: Loaded) -> Run:
    """Build the model and its trainer."""
    group, device = distributed.join(config.device)
    config = with_precision(config, group, device)
    frozen, dataset, embeddings = loaded.frozen, loaded.dataset, loaded.embeddings
    model = _model(config, loaded)
    assert config.output is not None
    if group.leads:
        keep_data(dataset, config.data.data, config.output)
    trainer = Trainer(
        model,
        replace(dataset, train=dataset.train.resident(device)),
        config.optimiser,
        output=config.output,
        settings=stored(config),
        identity={
            "data": dataset.sha256,
            "encoder": frozen.sha256,
            "embeddings": ""
            if embeddings is None
            else hashlib.sha256(embeddings.numpy().tobytes()).hexdigest(),
        },
        templates=templates_of(config),
        group=group,
        folds=_folds(config, loaded, model),
    )
    precision = config.optimiser.known_precision
    if complaint := slow_precision(precision, device):
        say(f"warning: {complaint}")
    say(f"{model.trainable_params} trainable parameters, {precision}; output {config.output}")
    if trainer.folds is not None:
        say("5 folds: each training image is scored by a head that was fitted without it")
    if config.prompt.method in PROMPTED:
        say(f"prompt kernel: {model.prompt.path(device)} (--kernel {config.kernel})")
    return Run(trainer, frozen, embeddings, config)


def _folds(config: TrainConfig, loaded: Loaded, model: AdaViPro) -> FoldHeads | None:
    """Return the fold heads of a prompt whose head starts from a probe, where the data allow it."""
    train, classes = loaded.dataset.train, len(loaded.dataset.class_names)
    head, prompt = model.head, model.config
    if not head.learns or prompt.method not in PROMPTED or not folded(len(train), classes):
        return None
    if head.bias is None or not bool(head.bias.any()):
        # It starts from the text embeddings.
        return None
    return FoldHeads(
        train.labels[train.rows],
        classes,
        head.reads,
        epochs=config.optimiser.epochs,
        seed=config.optimiser.seed,
        balanced=config.optimiser.balanced,
        device=loaded.device,
    )


def _model(config: TrainConfig, loaded: Loaded) -> AdaViPro:
    """Build what the method trains."""
    frozen, dataset, device = loaded.frozen, loaded.dataset, loaded.device
    prompt, encoder = config.prompt, frozen
    rows, bias = loaded.embeddings, None
    if prompt.head == "linear" or prompt.method == "linear_probe":
        head = _head(config, loaded)
        prompt = replace(prompt, head="linear", head_input=head.reads)
        if prompt.method in PROMPTED:
            head = softened(head, frozen, loaded.val_features)
        rows, bias = head.rows, head.bias
    assert rows is not None
    torch.manual_seed(config.optimiser.seed)
    if prompt.method == "full_finetune":
        encoder = frozen.thawed(config.optimiser.known_precision)
    elif prompt.method in PROMPTED:
        encoder = frozen.with_(precision=config.optimiser.known_precision)
    model = AdaViPro(encoder, rows, prompt, class_bias=bias, kernel=config.kernel).to(device)
    sample = torch.linspace(0, len(dataset.train) - 1, min(CALIBRATION_IMAGES, len(dataset.train)))
    model.prompt.initialise(dataset.train.batch(sample.long(), device)[0])
    return model


def _head(config: TrainConfig, loaded: Loaded) -> HeadRows:
    """Find where a linear head starts; the leading process fits it once, for all and for good."""
    frozen, dataset, device = loaded.frozen, loaded.dataset, loaded.device
    asked, output = config.prompt.head_input, config.output
    balanced = config.optimiser.balanced
    if config.prompt.method == "linear_probe":
        return fit_head(
            frozen,
            dataset,
            device,
            (asked or "features",),
            val=loaded.val_features,
            balanced=balanced,
        )
    assert output is not None
    group, _ = distributed.join(config.device)
    source = config.head_from or output / START
    # A start without a state is of a run that did not begin.
    begun = source.exists() and (output / "last.safetensors").exists()
    if config.head_from is None and group.leads and not begun:
        inputs: tuple[HeadInput, ...] = (asked,) if asked else ("features", "embedding")
        text = None if asked == "features" else loaded.embeddings
        fitted = fit_head(
            frozen, dataset, device, inputs, text, val=loaded.val_features, balanced=balanced
        )
        settings = PromptConfig("linear_probe", head="linear", head_input=fitted.reads)
        settings = replace(settings, region_size=config.prompt.region_size)
        start = AdaViPro(frozen, fitted.rows, settings, class_bias=fitted.bias)
        checkpoint_of(start, dataset.class_names).save(source)
        group.wait()
        return fitted
    group.wait()
    probe = load_checkpoint(source)
    if probe.class_names != dataset.class_names or probe.encoder.sha256 != frozen.sha256:
        raise ValueError(
            f"{source} was trained for other classes or another encoder; leave --head-from out to "
            "fit a new probe"
        )
    if probe.config.head_input is None or asked not in (None, probe.config.head_input):
        raise ValueError(
            f"{source} contains no linear head for {asked}; leave --head-input or --head-from out"
        )
    return probe.head
