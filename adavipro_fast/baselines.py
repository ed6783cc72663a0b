"""What prompts are compared with: zero-shot, a linear probe, and full fine-tuning.

Their artefacts are `head.safetensors` and `encoder.safetensors`, which `evaluate` and `predict`
read like a checkpoint.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from tqdm import tqdm

from adavipro_fast.checkpoint import (
    EncoderIdentity,
    parse,
    safetensors_bytes,
    write_whole,
)
from adavipro_fast.clip import FrozenEncoder, Preprocess
from adavipro_fast.data import Dataset, Split
from adavipro_fast.device import full_fp32
from adavipro_fast.functional import check_region, normalise
from adavipro_fast.metrics import evaluate
from adavipro_fast.prompt import Prediction, PromptConfig
from adavipro_fast.training import EVAL_BATCH, NonFiniteLossError, OptimiserConfig, lr_factor

BASELINE_FORMAT = "adavipro-fast-baseline/1"
# Inverse strengths of the L2 penalty that are tried on validation; VP's 0.316 is among them.
STRENGTHS = tuple(10 ** (power / 2) for power in range(-6, 7))
HEAD_STEPS = 2000


class Baseline(nn.Module):
    """An image tower with a linear head, or in front of class embeddings.

    Args:
        encoder: the image tower; a fine-tuned one may train.
        classes: (K, E) unit rows; the head's rows (K, F) for a linear probe.
        bias: (K,) of the head; none for class embeddings.
        region_size: of the closed mask that stands in a prediction.
    """

    bias: Tensor | None

    def __init__(
        self, encoder: FrozenEncoder, classes: Tensor, bias: Tensor | None, region_size: int
    ) -> None:
        super().__init__()
        self.encoder, self.region_size = encoder, region_size
        self.register_buffer("classes", classes)
        self.register_buffer("bias", bias)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(encoder.preprocess, name)))

    def forward(self, images: Tensor) -> Prediction:
        """Classify uint8 images (B, 3, S, S)."""
        x = normalise(images, self.get_buffer("mean"), self.get_buffer("std"))
        embedding = self.encoder(x)
        classes = self.get_buffer("classes")
        if self.bias is None:
            logits = self.encoder.logit_scale * embedding @ classes.t()
        else:
            logits = F.linear(features(self.encoder, x), classes, self.bias)
        grid = images.shape[-1] // self.region_size
        return Prediction(logits, x.new_zeros(len(images), grid, grid), embedding)


@contextlib.contextmanager
def without_projection(encoder: FrozenEncoder) -> Iterator[None]:
    """Leave out the last projection of a vision transformer; other towers have none to leave."""
    visual: Any = encoder.visual
    projection = getattr(visual, "proj", None)
    if projection is not None:
        visual.proj = None
    try:
        yield
    finally:
        if projection is not None:
            visual.proj = projection


def features(encoder: FrozenEncoder, images: Tensor) -> Tensor:
    """Return what the tower gives before its projection: normalised (B, 3, S, S) to (B, F)."""
    with without_projection(encoder):
        return encoder.tower(images)


@torch.no_grad()
def all_features(
    encoder: FrozenEncoder, split: Split, device: torch.device
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the features (N, F) and labels (N,) of a split."""
    probe = Baseline(encoder, torch.zeros(1, 1), None, 1).to(device)
    rows, labels = [], []
    for images, targets in tqdm(
        split.batches(EVAL_BATCH, device), "features", -(-len(split) // EVAL_BATCH), leave=False
    ):
        x = normalise(images, probe.get_buffer("mean"), probe.get_buffer("std"))
        rows.append(features(encoder, x).cpu())
        labels.append(targets.cpu())
    return torch.cat(rows).double().numpy(), torch.cat(labels).numpy()


def fit_head(
    encoder: FrozenEncoder, dataset: Dataset, device: torch.device
) -> tuple[Tensor, Tensor, float]:
    """Fit logistic regression; its penalty is chosen on validation.

    Returns:
        weight (K, F), bias (K,) and the validation top-1, percent.
    """
    train, labels = all_features(encoder, dataset.train, device)
    val, expected = all_features(encoder, dataset.val, device)
    best: tuple[float, LogisticRegression] | None = None
    for strength in tqdm(STRENGTHS, "penalty", leave=False):
        head = LogisticRegression(C=strength, max_iter=HEAD_STEPS).fit(train, labels)
        top1 = 100 * float(head.score(val, expected))
        # Among equals the stronger penalty stays.
        if best is None or top1 > best[0]:
            best = top1, head
            print(f"C {strength:.3g}: val top-1 {top1:.1f} %", file=sys.stderr)
    assert best is not None
    top1, head = best
    weight, bias = torch.tensor(head.coef_), torch.tensor(head.intercept_)
    if len(weight) == 1:
        # Of two classes scikit-learn keeps the difference.
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return weight.float(), bias.float(), top1


def fine_tune(
    model: Baseline, dataset: Dataset, config: OptimiserConfig, device: torch.device, output: Path
) -> tuple[float, float]:
    """Train all weights of the image tower with AdamW; keep the best on validation.

    Returns:
        Validation top-1 of the best, percent, and seconds of training.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite.
    """
    encoder, train = model.encoder, dataset.train
    weights = [p.requires_grad_() for p in encoder.visual.parameters() if p.is_floating_point()]
    optimiser = torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    # Weights stay in fp32, and autocast takes copies of them.
    encoder.precision = config.precision
    steps = -(-len(train) // config.batch_size)
    best, seconds, rows = (-1.0, encoder.visual.state_dict()), 0.0, []
    for epoch in range(config.epochs):
        generator = np.random.default_rng([config.seed, epoch])
        order = torch.from_numpy(generator.permutation(len(train)))
        began, total, correct = time.perf_counter(), 0.0, 0
        for number, chunk in enumerate(
            tqdm(order.split(config.batch_size), f"epoch {epoch + 1}", leave=False)
        ):
            images, labels = train.batch(chunk, device)
            factor = lr_factor(epoch * steps + number, config.epochs * steps)
            optimiser.param_groups[0]["lr"] = config.lr_encoder * factor
            logits = model(images).logits
            loss = F.cross_entropy(logits, labels)
            if not torch.isfinite(loss):
                raise NonFiniteLossError(
                    f"the loss is {loss.item()} in epoch {epoch + 1}; try a lower --lr-encoder "
                    f"than {config.lr_encoder:g}"
                )
            optimiser.zero_grad()
            with full_fp32():
                scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
            total += loss.item() * len(chunk)
            correct += int((logits.argmax(1) == labels).sum())
        seconds += time.perf_counter() - began
        val = evaluate(lambda x: model(x)[:2], dataset.val.batches(EVAL_BATCH, device)).top1
        if val > best[0]:
            state = {k: v.detach().clone() for k, v in encoder.visual.state_dict().items()}
            best = val, state
        rows.append(
            {
                "epoch": epoch + 1,
                "loss": total / len(train),
                "train_top1": 100 * correct / len(train),
                "val_top1": val,
            }
        )
        print(f"epoch {epoch + 1}: loss {rows[-1]['loss']:.3f}, val {val:.1f} %", file=sys.stderr)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_whole(output / "metrics.jsonl", lines.encode())
    encoder.visual.load_state_dict(best[1])
    encoder.precision = "fp32"
    encoder.visual.requires_grad_(False)
    return best[0], seconds


def run_baseline(
    encoder: FrozenEncoder,
    embeddings: Tensor,
    dataset: Dataset,
    prompt: PromptConfig,
    config: OptimiserConfig,
    *,
    device: torch.device,
    output: Path,
) -> dict[str, Any]:
    """Run zero_shot, linear_probe or full_finetune, and return training's figures."""
    identity = EncoderIdentity(encoder.name, encoder.pretrained, encoder.sha256)
    encoder = encoder.to(device)
    zero_shot = Baseline(encoder, embeddings.float(), None, prompt.region_size).to(device)

    def top1(model: Baseline, split: Split) -> float:
        return evaluate(lambda x: model(x)[:2], split.batches(EVAL_BATCH, device)).top1

    began = time.perf_counter()
    before = top1(zero_shot, dataset.test)
    result: dict[str, Any] = {"method": prompt.method, "zero_shot_top1": before}
    model, count, path, epochs = zero_shot, 0, None, 0
    if prompt.method == "zero_shot":
        val, seconds = top1(zero_shot, dataset.val), time.perf_counter() - began
        images = len(dataset.test) + len(dataset.val)
    elif prompt.method == "linear_probe":
        began = time.perf_counter()
        weight, bias, val = fit_head(encoder, dataset, device)
        seconds, images = time.perf_counter() - began, len(dataset.train) + len(dataset.val)
        model = Baseline(encoder, weight, bias, prompt.region_size).to(device)
        tensors = {"head.weight": weight, "head.bias": bias}
        count, path = weight.numel() + bias.numel(), output / "head.safetensors"
    else:
        val, seconds = fine_tune(model, dataset, config, device, output)
        epochs, path = config.epochs, output / "encoder.safetensors"
        images = epochs * len(dataset.train)
        tensors = {
            "class_embeddings": embeddings.float().cpu(),
            "logit_scale": torch.tensor(encoder.logit_scale),
            **{f"visual.{k}": v.cpu() for k, v in encoder.visual.state_dict().items()},
        }
        count = sum(p.numel() for p in encoder.visual.parameters())
    test = before if prompt.method == "zero_shot" else top1(model, dataset.test)
    if path is not None:
        metadata = {
            "format": BASELINE_FORMAT,
            "config": asdict(prompt),
            "class_names": dataset.class_names,
            "encoder": asdict(identity),
            "preprocess": encoder.preprocess.stored(),
        }
        write_whole(path, safetensors_bytes(tensors, metadata))
    return result | {
        "val_top1": val,
        "test_top1": test,
        "last_test_top1": test,
        "trainable_params": count,
        "mask_density": 0.0,
        "mask_adaptivity": 0.0,
        "mask_placement": 0.0,
        "epochs": epochs,
        "images_per_s": images / seconds,
        "seconds": seconds,
        "checkpoint": path and str(path),
    }


def is_baseline(metadata: dict[str, Any]) -> bool:
    """Tell whether a file's metadata is that of `run_baseline`."""
    return metadata.get("format") == BASELINE_FORMAT


def load_baseline(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any], encoder: FrozenEncoder
) -> tuple[Baseline, tuple[str, ...], PromptConfig]:
    """Check what `head.safetensors` or `encoder.safetensors` holds, and build its model.

    Returns:
        The model in evaluation mode, class names and configuration.

    Raises:
        ValueError: not ours, of another encoder, or not whole.
    """
    try:
        names = tuple(str(name) for name in metadata["class_names"])
        config: PromptConfig = parse(PromptConfig, metadata["config"])
        identity: EncoderIdentity = parse(EncoderIdentity, metadata["encoder"])
        preprocess: Preprocess = parse(Preprocess, metadata["preprocess"])
        if encoder.sha256 != identity.sha256:
            raise ValueError(
                f"it was made with the encoder {identity.name!r} ({identity.sha256[:12]}), this is "
                f"{encoder.name!r} ({encoder.sha256[:12]}); name that one with --model"
            )
        encoder.prepare_by(preprocess)
        check_region(preprocess.size, config.region_size)
        if config.method == "linear_probe":
            weight, bias = tensors["head.weight"], tensors["head.bias"]
            with torch.no_grad():
                side = encoder.preprocess.size
                width = features(encoder, torch.zeros(1, 3, side, side)).shape[1]
            if weight.shape != (len(names), width) or bias.shape != (len(names),):
                raise ValueError(f"the head has shape {tuple(weight.shape)}")
            if weight.dtype != torch.float32 or bias.dtype != torch.float32:
                raise ValueError(f"the head is {weight.dtype}; fp32 is needed")
            return Baseline(encoder, weight, bias, config.region_size).eval(), names, config
        state = {k.removeprefix("visual."): v for k, v in tensors.items() if k.startswith("vis")}
        encoder.visual.load_state_dict(state)
        encoder.logit_scale = tensors["logit_scale"].item()
        classes = tensors["class_embeddings"].float()
        if classes.ndim != 2 or len(classes) != len(names):
            raise ValueError(f"class_embeddings has shape {tuple(classes.shape)}")
        return Baseline(encoder, classes, None, config.region_size).eval(), names, config
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
