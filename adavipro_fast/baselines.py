"""Run what prompts are compared with: zero-shot, a linear probe, and full fine-tuning."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm import tqdm

from adavipro_fast.baseline import BASELINE_FORMAT, Baseline, features
from adavipro_fast.checkpoint import EncoderIdentity, safetensors_bytes, write_whole
from adavipro_fast.clip import FrozenEncoder
from adavipro_fast.data import Dataset, Split
from adavipro_fast.device import full_fp32
from adavipro_fast.functional import normalise
from adavipro_fast.metrics import evaluate
from adavipro_fast.prompt import PromptConfig
from adavipro_fast.training import EVAL_BATCH, NonFiniteLossError, OptimiserConfig, lr_factor

# Inverse strengths of the L2 penalty that are tried on validation; VP's 0.316 is among them.
STRENGTHS = tuple(10 ** (power / 2) for power in range(-6, 7))
HEAD_STEPS = 2000


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
