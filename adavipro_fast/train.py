"""Train a prompt for a frozen CLIP encoder: `python -m adavipro_fast.train`.

Without arguments it trains the embedded demo.
"""

import hashlib
import json
import signal
import statistics
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from adavipro_fast import checkpoint, cli, distributed, pictures
from adavipro_fast.baselines import run_baseline
from adavipro_fast.clip import (
    DEFAULT_TEMPLATE,
    TextTower,
    check_templates,
    fingerprint,
    load_clip,
)
from adavipro_fast.data import DataConfig, load_dataset, load_test
from adavipro_fast.device import slow_precision
from adavipro_fast.folder import held, make_folder
from adavipro_fast.metrics import Evaluation, mask_figures
from adavipro_fast.prompt import PROMPTED, AdaViPro, Kernel, PromptConfig
from adavipro_fast.training import UNTRAINED, OptimiserConfig, Trainer, read_state

CALIBRATION_IMAGES = 512
PICTURED = 8
SAME_MASK = 0.01


@dataclass(frozen=True)
class TrainConfig:
    """Train an adaptive visual prompt for a frozen CLIP encoder; no arguments: the demo."""

    recipe: Literal["paper", "best"] = "best"
    """sets the defaults of the flags below; explicit flags win"""
    model: str = "demo"
    """open_clip model name, local-dir:PATH, or demo"""
    pretrained: str = ""
    """open_clip tag or path of the weights"""
    template: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """text with {} for the name; several make an ensemble (default: This is a photo of a {})"""
    class_embeddings: Path | None = None
    """safetensors file with class_embeddings (K, E) instead of the text tower"""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    margin: int = 0
    """shrink images by this many pixels on each side; the prompt has the margin for itself"""
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    kernel: Kernel = "auto"
    """fused (Triton) or plain (PyTorch); auto: fused on CUDA devices where it can run"""
    output: Path | None = None
    """folder of the run (default: a new one under runs/)"""
    resume: Path | None = None
    """folder of a run to go on with, under its own settings"""
    accept_change: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """with --resume: a flag, data, encoder or embeddings that may differ; repeatable"""


def recipe(name: str, prompt_size: int = PromptConfig.prompt_size) -> TrainConfig:
    """Return a recipe's defaults; `best`'s template rate falls as the frame covers the object."""
    if name == "paper":
        return TrainConfig(recipe="paper", optimiser=OptimiserConfig(batch_size=256))
    return TrainConfig(
        prompt=PromptConfig(
            prompt_size=prompt_size,
            edge="laplacian-magnitude",
            edge_padding="replicate",
            prompt_init="zero",
            generator_init="avoid-edges",
        ),
        optimiser=OptimiserConfig(
            batch_size=32,
            lr_prompt=round(40 * min(1.0, 30 / prompt_size) ** 1.5, 1),
            clip_prompt=0.05,
            lr_generator=1e-5,
            generator_optimiser="adam",
            generator_start=0.3,
        ),
    )


def main() -> None:
    """Parse, train, print."""
    arguments, quiet = sys.argv[1:], not distributed.leading()
    if resume := cli.peek(arguments, "--resume"):
        cli.run(lambda: resume_run(Path(resume)), quiet=quiet)
        return
    cli.run(lambda: start_run(_parse(arguments)), quiet=quiet)


def _parse(arguments: list[str]) -> TrainConfig:
    """Parse the flags, whose defaults depend on two of them."""
    size = cli.peek(arguments, "--prompt-size") or ""
    sized = [int(size)] if size.isdecimal() else []
    return cli.parse(TrainConfig, recipe(cli.peek(arguments, "--recipe") or "best", *sized))


def start_run(config: TrainConfig) -> dict[str, Any]:
    """Train from the beginning and return the result; torchrun's restarts go on.

    Raises:
        ValueError: a setting is wrong, or the output folder already holds a run.
    """
    group, device = distributed.join(config.device)
    with ExitStack() as stack:
        folder = config.output or group.kept_folder()
        made: list[Path] = []
        if group.leads:
            if folder is None:
                name = f"{Path(config.data.data).name}-{config.prompt.method}"
                folder, made = make_folder(name)
                group.keep_folder(folder)
            stack.enter_context(held(folder, made))
        config = replace(config, output=group.agreed(folder or Path(), device))
        return _begin(config, device)


def _begin(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """Train in a folder that this run holds."""
    output = config.output
    assert output is not None
    state_path = output / "last.safetensors"
    if state_path.exists():
        stored = _from_json(read_state(state_path)[1].settings, state_path)
        if distributed.restarts() and not _diff(replace(stored, output=output), config):
            return _go_on(config)
        raise ValueError(
            f"{output} already holds a run; go on with --resume {output} or choose another --output"
        )
    if config.prompt.method not in PROMPTED:
        if config.margin:
            raise ValueError(f"{config.prompt.method} has no prompt to leave a --margin for")
        for name in ("head.safetensors", "encoder.safetensors"):
            if (output / name).exists():
                raise ValueError(f"{output} already holds {name}; choose another --output")
        return _run_baseline(config, device)
    return _finish(_prepare(config), config)


def _run_baseline(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """Run a method without a prompt; one process does it."""
    if distributed.launched():
        raise ValueError(f"{config.prompt.method} runs in one process; start it without torchrun")
    check_templates(config.template)
    encoder, text = load_clip(config.model, config.pretrained)
    dataset = load_dataset(config.data, encoder.preprocess, seed=config.optimiser.seed)
    torch.manual_seed(config.optimiser.seed)
    assert config.output is not None
    result = run_baseline(
        encoder,
        _class_embeddings(config, text, dataset.class_names),
        dataset,
        config.prompt,
        config.optimiser,
        device=device,
        output=config.output,
    )
    _log(f"{result['trainable_params']} trainable parameters")
    return result


def resume_run(folder: Path) -> dict[str, Any]:
    """Go on with an interrupted run; a finished one returns its result again.

    Raises:
        ValueError: flags differ from the run's, or its state cannot be read.
        FileNotFoundError: the folder holds no run.
    """
    path = folder / "last.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no last.safetensors; start with --output {folder}")
    _, state = read_state(path)
    stored = _from_json(state.settings, path)
    parsed = cli.parse(TrainConfig, stored)
    accepted = parsed.accept_change
    asked = replace(parsed, resume=None, output=stored.output, accept_change=())
    changed = _diff(stored, asked)
    refused = {k: v for k, v in changed.items() if k not in {a.lstrip("-") for a in accepted}}
    if refused:
        raise ValueError(
            f"--resume keeps a run's settings; asked otherwise: {', '.join(refused.values())}; "
            f"to change one, add --accept-change {next(iter(refused))}"
        )
    if state.progress.result and not changed and not accepted:
        return state.progress.result
    with held(folder) if distributed.leading() else nullcontext():
        return _go_on(replace(asked, output=folder), accepted)


def _go_on(config: TrainConfig, accepted: tuple[str, ...] = ()) -> dict[str, Any]:
    """Take up the state in the output folder and train on."""
    trainer = _prepare(config)
    trainer.restore(accepted)
    _log(f"going on in {config.output} at epoch {trainer.progress.epoch + 1}")
    return _finish(trainer, config)


def _prepare(config: TrainConfig) -> Trainer:
    """Load encoder and data, build the model and its trainer."""
    group, device = distributed.join(config.device)
    check_templates(config.template)
    encoder, text = load_clip(config.model, config.pretrained)
    encoder.prepare_by(replace(encoder.preprocess, margin=config.margin))
    torch.manual_seed(config.optimiser.seed)
    # Wrong sizes are told before images are decoded.
    AdaViPro(encoder, torch.zeros(1, 1), config.prompt, kernel=config.kernel).prompt.path(device)
    dataset = load_dataset(config.data, encoder.preprocess, seed=config.optimiser.seed)
    embeddings = _class_embeddings(config, text, dataset.class_names)
    torch.manual_seed(config.optimiser.seed)
    model = AdaViPro(encoder, embeddings, config.prompt, kernel=config.kernel).to(device)
    path = model.prompt.path(device)
    sample = torch.linspace(0, len(dataset.train) - 1, min(CALIBRATION_IMAGES, len(dataset.train)))
    model.prompt.initialise(dataset.train.batch(sample.long(), device)[0])
    dataset = replace(dataset, train=dataset.train.resident(device))
    assert config.output is not None
    trainer = Trainer(
        model,
        dataset,
        config.optimiser,
        output=config.output,
        settings=_to_json(config),
        identity={
            "data": dataset.sha256,
            "encoder": encoder.sha256,
            "embeddings": hashlib.sha256(embeddings.numpy().tobytes()).hexdigest(),
        },
        group=group,
    )
    _log(f"encoder {config.model} on {device}, {encoder.preprocess.size} px, frozen")
    if complaint := slow_precision(config.optimiser.precision, device):
        _log(f"warning: {complaint}")
    _log(
        f"data: {len(dataset.train)} train, {len(dataset.val)} val, {len(dataset.test)} test images"
    )
    _log(f"{trainable(model)} trainable parameters; output {config.output}")
    _log(f"prompt by the {path} path (--kernel {config.kernel})")
    return trainer


def trainable(model: AdaViPro) -> int:
    """Count the trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _class_embeddings(
    config: TrainConfig, text: TextTower, class_names: tuple[str, ...]
) -> torch.Tensor:
    if config.class_embeddings is None:
        return text.class_embeddings(class_names, config.template or (DEFAULT_TEMPLATE,))
    tensors, _ = checkpoint.read_safetensors(config.class_embeddings)
    rows = tensors.get("class_embeddings")
    if rows is None or rows.ndim != 2 or len(rows) != len(class_names):
        raise ValueError(
            f"{config.class_embeddings} needs a tensor class_embeddings with {len(class_names)} "
            f"rows, in the order {', '.join(class_names[:3])} ..."
        )
    return torch.nn.functional.normalize(rows.float(), dim=-1)


def _finish(trainer: Trainer, config: TrainConfig) -> dict[str, Any]:
    """Train to the end, test once, and keep the result with the state."""
    frozen = trainer.model.encoder
    zero_shot = _zero_shot(trainer, config)
    _log(f"zero-shot top-1: {zero_shot.top1:.1f} % (test)")
    before = frozen.sha256
    trainer.model.run_in(frozen.in_precision(config.optimiser.precision))
    stops = (signal.SIGINT, signal.SIGTERM)
    before_run = [signal.signal(stop, lambda *_: trainer.stop()) for stop in stops]
    try:
        trainer.run()
    finally:
        for stop, handler in zip(stops, before_run, strict=True):
            signal.signal(stop, handler)
    trainer.model.run_in(frozen)
    if fingerprint(frozen.visual) != before or any(p.requires_grad for p in frozen.parameters()):
        raise cli.VerificationError("the frozen encoder changed during training")
    state = checkpoint.prompt_tensors(trainer.model)
    result = _result(trainer, zero_shot.top1)
    # The state goes on from the last prompt, not from the best one, which is drawn and tested.
    checkpoint.load_prompt(trainer.model, state)
    trainer.progress.result = result
    trainer.save()
    trainer.group.wait()
    distributed.leave()
    return result


def _zero_shot(trainer: Trainer, config: TrainConfig) -> Evaluation:
    """Test the encoder on whole images, whatever margin the prompt has."""
    model, test = trainer.model, trainer.dataset.test
    if config.margin:
        _, test = load_test(config.data, replace(model.encoder.preprocess, margin=0))

    def predict(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = trainer.inside[None].expand(len(images), -1, -1)
        return model.classify(model.prompt.normalised(images), mask)[:2]

    return trainer.predict(predict, test)


def _result(trainer: Trainer, zero_shot_top1: float) -> dict[str, Any]:
    """Test the best and the last prompt in fp32, draw the pictures, collect the figures."""
    progress, test = trainer.progress, trainer.dataset.test
    last = trainer.evaluate(test)
    path = trainer.output / "checkpoint.safetensors"
    # The leading process may still be writing it.
    trainer.group.wait()
    best = last
    if progress.best_epoch < progress.epoch - 1:
        checkpoint.load_prompt(trainer.model, checkpoint.load_checkpoint(path).tensors)
        best = trainer.evaluate(test)
    figures = mask_figures(best.masks, trainer.inside)
    if trainer.group.leads:
        _draw(trainer, zero_shot_top1)
    if progress.best_epoch == UNTRAINED:
        shrunk = " of the shrunk images" if trainer.model.encoder.preprocess.margin else ""
        _log(
            f"warning: no epoch was better than the untrained prompt{shrunk} "
            f"({progress.best_val:.1f} % on validation) by more than a standard error; "
            "the untrained one is kept"
        )
    if trainer.model.prompt.generator is not None and figures.adaptivity < SAME_MASK:
        _log(
            f"warning: the mask does not adapt: adaptivity {figures.adaptivity:.3f}, "
            f"{figures.density:.2f} of the regions open in every image"
        )
    return {
        "method": trainer.model.prompt.config.method,
        "zero_shot_top1": zero_shot_top1,
        "val_top1": progress.best_val,
        "test_top1": best.top1,
        "last_test_top1": last.top1,
        "trainable_params": trainable(trainer.model),
        "mask_density": figures.density,
        "mask_adaptivity": figures.adaptivity,
        "mask_placement": figures.placement,
        "epochs": trainer.config.epochs,
        "images_per_s": statistics.median(row["images_per_s"] for row in progress.rows),
        "seconds": progress.seconds,
        "checkpoint": str(path),
    }


def _draw(trainer: Trainer, zero_shot_top1: float) -> None:
    val, names = trainer.dataset.val, trainer.dataset.class_names
    spread = torch.linspace(0, len(val) - 1, min(PICTURED, len(val))).long()
    images, labels = val.batch(spread, trainer.device)
    grid = pictures.mask_grid(trainer.model, images, [names[label] for label in labels.tolist()])
    pictures.save(grid, trainer.output / "masks.png")
    curves = pictures.curves(trainer.progress.rows, zero_shot_top1)
    pictures.save(curves, trainer.output / "curves.png")


def _log(line: str) -> None:
    if distributed.leading():
        print(cli.printable(line), file=sys.stderr)


def _to_json(config: TrainConfig) -> dict[str, Any]:
    return dict(json.loads(json.dumps(asdict(config), default=str)))


def _from_json(settings: dict[str, Any], path: Path) -> TrainConfig:
    """Rebuild a configuration from `_to_json`'s dictionary.

    Raises:
        ValueError: settings are missing or of the wrong kind.
    """
    try:
        data = settings["data"] | {k: Path(settings["data"][k]) for k in ("data_root", "cache_dir")}
        paths = {
            k: v and Path(v) for k, v in settings.items() if k in ("class_embeddings", "output")
        }
        nested = {
            "prompt": PromptConfig(**settings["prompt"]),
            "data": DataConfig(**data),
            "optimiser": OptimiserConfig(**settings["optimiser"]),
            "template": tuple(settings["template"]),
            "accept_change": (),
        }
        if type(settings.get("margin", 0)) is not int:
            raise TypeError(f"margin is {settings['margin']!r}")
        return TrainConfig(**(settings | paths | nested))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has settings that cannot be used: {error}") from error


def _diff(stored: TrainConfig, asked: TrainConfig) -> dict[str, str]:
    """Tell flags that differ: name to a line that says how."""
    flat = [
        {
            k.replace("_", "-"): v
            for part in (asdict(c), *(asdict(c)[n] for n in ("prompt", "data", "optimiser")))
            for k, v in part.items()
            if not isinstance(v, dict)
        }
        for c in (stored, asked)
    ]
    return {k: f"--{k} {flat[1][k]} instead of {v}" for k, v in flat[0].items() if flat[1][k] != v}


if __name__ == "__main__":
    main()
