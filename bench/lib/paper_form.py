"""The paper's form of the mask generator, as it is written: what the collapsed one is beside."""

import torch
from torch import Tensor

from adavipro_fast import AdaViPro
from adavipro_fast.method.prompt import AdaptivePrompt, Sampling


class PaperForm(AdaptivePrompt):
    """The paper's generator as it is written: 64 full-resolution maps, nothing collapsed."""

    @classmethod
    def of(cls, prompt: AdaptivePrompt) -> "PaperForm":
        """Write a prompt in the paper's form; the values are copied."""
        mean, std = (tuple(part) for part in prompt.mean_std)
        side = prompt.grid * prompt.config.region_size
        twin = cls(side, prompt.config, mean=mean, std=std, kernel="plain")
        twin.load_state_dict(prompt.state_dict())
        return twin.train(prompt.training).to(prompt.mean.device)

    def delta(self, images: Tensor) -> Tensor:
        """Compute Δ of normalised images, uncollapsed."""
        assert self.generator is not None
        uncollapsed: Tensor = self.generator(self.edges(images))
        return uncollapsed

    def _noise(self, drawn: Sampling, delta: Tensor) -> Tensor:
        """Draw from torch's own generator."""
        return torch.logit(torch.rand_like(delta), eps=1e-6) if drawn.noise is None else drawn.noise


def in_paper_form(model: AdaViPro) -> AdaViPro:
    """Return the model with its prompt computed as the paper writes it."""
    twin = AdaViPro(model.encoder, model.head.rows, model.config)
    twin.prompt = PaperForm.of(model.prompt)
    return twin.train(model.training).to(model.head.rows.device)
