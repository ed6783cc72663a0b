"""A training step, complete or by parts, with its pixels on the device as in training."""

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from adavipro_fast import AdaViPro
from adavipro_fast.method.config import DTYPES, Method, Precision
from adavipro_fast.method.encoder import FrozenEncoder
from adavipro_fast.method.prompt import Prompted
from adavipro_fast.training.config import recipe
from lib.paper_form import in_paper_form
from lib.timing import synchronise, timed_ms

CLASSES = 100
# Number of batches of pixels on a GPU, more than fit into its L2 cache.
BATCHES = 4


class TrainingStep:
    """A training step, complete or by parts.

    Args:
        name: of the row.
        encoder: in fp32, on the device.
        batch: images per step.
        precision: of the encoder.
    """

    def __init__(self, name: str, encoder: FrozenEncoder, batch: int, precision: Precision) -> None:
        self.device = next(encoder.visual.parameters()).device
        self.batch, self.dtype = batch, DTYPES[precision]
        encoder = encoder.with_(precision=precision, lean=name != "vp_stock_attention")
        side = encoder.preprocess.size
        with torch.no_grad():
            width = encoder(torch.zeros(1, 3, side, side, device=self.device)).shape[1]
        embeddings = F.normalize(torch.randn(CLASSES, width), dim=-1)
        method: Method = "vp" if name.startswith("vp") else "adavipro"
        prompt = replace(recipe("best").prompt, method=method)
        model = AdaViPro(encoder, embeddings, prompt).to(self.device).train()
        self.model = in_paper_form(model) if name == "adavipro_paper_form" else model
        if name == "adavipro_plain":
            self.model.prompt.kernel = "plain"
        self.optimiser = torch.optim.SGD(self.model.prompt.parameters(), lr=1e-3, momentum=0.9)
        shape = (BATCHES * batch, 3, side, side)
        self.pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        self.labels = torch.randint(0, CLASSES, shape[:1], device=self.device)
        self.images, self.targets = self.pixels[:batch], self.labels[:batch]
        self.prompted = Prompted(*3 * [self.images])
        self.loss = torch.zeros(())

    def data(self) -> None:
        """Gather a batch on the device, as in training."""
        rows = torch.randperm(len(self.pixels), device=self.device)[: self.batch]
        self.images, self.targets = self.pixels[rows], self.labels[rows]

    def prompt(self) -> None:
        """Add the prompt to the images, in the encoder's type."""
        self.prompted = self.model.prompt(self.images, dtype=self.dtype, tau=1.0)

    def encoder(self) -> None:
        """Run the frozen encoder and the loss."""
        logits = self.model.classify(self.prompted.images, self.prompted.mask).logits
        self.loss = F.cross_entropy(logits, self.targets)

    def backward(self) -> None:
        """Run the backward pass of encoder and prompt."""
        self.optimiser.zero_grad()
        self.loss.backward()

    def optimise(self) -> None:
        """Update the prompt."""
        self.optimiser.step()

    @property
    def parts(self) -> dict[str, Callable[[], None]]:
        """The parts in order."""
        return {
            "data_ms": self.data,
            "prompt_ms": self.prompt,
            "encoder_ms": self.encoder,
            "backward_ms": self.backward,
            "optimiser_ms": self.optimise,
        }

    def __call__(self) -> None:
        """Run all parts."""
        for part in self.parts.values():
            part()

    def repeated(self, count: int) -> Callable[[], None]:
        """Return a call of `count` steps, so that the host runs ahead of a GPU as in training."""

        def steps() -> None:
            for _ in range(count):
                self()

        return steps

    def timed_parts(self, rounds: int) -> dict[str, float]:
        """Return each part's median, ms."""
        times: dict[str, list[float]] = {name: [] for name in self.parts}
        for _ in range(rounds):
            for name, part in self.parts.items():
                times[name].append(timed_ms(part, self.device))
        return {name: median(values) for name, values in times.items()}

    def own_device_mib(self) -> float:
        """Return a step's GPU memory: its tensors, and its peak above the memory already used."""
        self()
        synchronise(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        held = torch.cuda.memory_allocated(self.device)
        self()
        synchronise(self.device)
        own = {t.data_ptr(): t.nbytes for t in (*self.model.parameters(), self.pixels)}
        peak = torch.cuda.max_memory_allocated(self.device) - held
        return (peak + sum(own.values())) / 2**20

    def kernel_ms(self, steps: int = 3) -> dict[str, float]:
        """Profile a step's GPU time, and the fused kernels' part of it."""
        from torch.profiler import ProfilerActivity, profile

        self()
        synchronise(self.device)
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
            self.repeated(steps)()
            synchronise(self.device)
        on_gpu: Any = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
        times = [
            (e.name, e.time_range.elapsed_us()) for e in trace.events() if e.device_type == on_gpu
        ]
        figures = {"gpu_ms": sum(us for _, us in times) / steps / 1e3}
        for part in ("_forward", "_backward"):
            found = [us for name, us in times if name == part]
            if found:
                figures[f"fused{part}_ms"] = sum(found) / steps / 1e3
        return figures
