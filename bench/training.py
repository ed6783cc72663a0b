"""Time a training step: prompt, frozen encoder forward and backward, optimiser.

    python bench/training.py --model ViT-B-32 --batch 32

Rows vp, adavipro_paper_form (the generator as the paper writes it) and adavipro (the default
path), interleaved in one process; peak memory comes from a process of its own per row.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import interleaved_ms, paired_ratio, publish, summary, synchronise

from adavipro_fast import AdaViPro, PromptConfig, cli, load_encoder
from adavipro_fast.artifact import torch_device
from adavipro_fast.clip import FrozenEncoder, Precision
from adavipro_fast.functional import apply_prompt, decide
from adavipro_fast.prompt import AdaptivePrompt, Prompted

NAMES = ("vp", "adavipro_paper_form", "adavipro")
CLASSES = 100


@dataclass(frozen=True)
class TrainingConfig:
    """Time a training step of vp, of the paper's form of adavipro, and of adavipro."""

    model: str = "ViT-B-32"
    """open_clip model name; random weights"""
    batch: int = 32
    """images per step"""
    precision: Precision = "bf16"
    """of the encoder"""
    rounds: int = 15
    """timed steps of each row"""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    only: str | None = None
    """run one row's step three times and print its peak memory"""
    json: Path | None = None
    """file for the rows"""


class PaperForm(AdaptivePrompt):
    """The paper's generator as it is written: 64 full-resolution maps, nothing collapsed."""

    def forward(
        self,
        images: torch.Tensor,
        *,
        tau: float = 1.0,
        noise: torch.Tensor | None = None,
        seed: int = 0,
    ) -> Prompted:
        """See `AdaptivePrompt.forward`; draws its noise from torch's own generator."""
        with torch.autocast(images.device.type, enabled=False):
            images = self.normalised(images)
            assert self.generator is not None
            delta = self.generator(self.edges(images))
            if noise is None and self.training:
                noise = torch.logit(torch.rand_like(delta), eps=1e-6)
            mask = decide(delta, "hard" if self.training else "argmax", tau=tau, noise=noise)
            return Prompted(apply_prompt(images, self.template(), mask), delta, mask)


def build_step(name: str, encoder: FrozenEncoder, config: TrainingConfig) -> Callable[[], None]:
    """Return one training step on random pixels."""
    device = torch_device(config.device)
    side = encoder.preprocess.size
    prompt = PromptConfig(method="vp" if name == "vp" else "adavipro")
    width = encoder(torch.zeros(1, 3, side, side, device=device)).shape[1]
    embeddings = F.normalize(torch.randn(CLASSES, width), dim=-1)
    model = AdaViPro(encoder, embeddings, prompt)
    if name == "adavipro_paper_form":
        model.prompt = PaperForm(
            side, prompt, mean=encoder.preprocess.mean, std=encoder.preprocess.std
        )
    model.to(device).train()
    model.run_in(encoder)
    optimiser = torch.optim.SGD(model.prompt.parameters(), lr=1e-3, momentum=0.9)
    pixels = torch.randint(0, 256, (config.batch, 3, side, side), dtype=torch.uint8, device=device)
    labels = torch.randint(0, CLASSES, (config.batch,), device=device)

    def step() -> None:
        loss = F.cross_entropy(model(pixels, tau=1.0).logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def peak_mib(name: str, config: TrainingConfig) -> float:
    """Run a row alone in a new process and return its peak memory, MiB."""
    arguments = [
        *("--model", config.model, "--batch", str(config.batch), "--device", config.device),
        *("--precision", config.precision, "--only", name),
    ]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mib"])


def own_peak_mib(config: TrainingConfig) -> float:
    """Run one row here and return the peak memory of this process or of its GPU, MiB."""
    assert config.only is not None
    device = torch_device(config.device)
    encoder = load_encoder(config.model).in_precision(config.precision).to(device)
    step = build_step(config.only, encoder, config)
    for _ in range(3):
        step()
    synchronise(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Not getrusage: its peak is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 2**10


def main() -> None:
    """Parse, measure, print."""
    config = cli.parse(TrainingConfig)
    cli.run(lambda: command(config))


def command(config: TrainingConfig) -> dict[str, Any]:
    """Measure all rows, or one row's memory."""
    if config.only is not None:
        return {"peak_mib": own_peak_mib(config)}
    device = torch_device(config.device)
    encoder = load_encoder(config.model).in_precision(config.precision).to(device)
    steps = {name: build_step(name, encoder, config) for name in NAMES}
    times = interleaved_ms(steps, device, rounds=config.rounds)
    rows: list[dict[str, Any]] = []
    for name in NAMES:
        figures = summary(times[name])
        rows.append(
            {
                "name": name,
                "step_ms": figures["median_ms"],
                "iqr_ms": figures["iqr_ms"],
                "ratio_to_vp": paired_ratio(times[name], times["vp"]),
                "peak_mib": peak_mib(name, config),
                "images_per_s": 1e3 * config.batch / figures["median_ms"],
            }
        )
    return publish(rows, device, config.json)


if __name__ == "__main__":
    main()
