"""The paper's uncollapsed form of the mask generator, for comparison with the collapsed one."""

import torch
from torch import Tensor

from adavipro_fast import AdaViPro
from adavipro_fast.method.prompt import AdaptivePrompt, Sampling


class PaperForm(AdaptivePrompt):
    """The paper's generator: 64 full-resolution maps, not collapsed."""

    @classmethod
    def of(cls, prompt: AdaptivePrompt) -> "PaperForm":
        """Copy a prompt into the paper's form."""
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
        """Draw from torch's generator."""
        return torch.logit(torch.rand_like(delta), eps=1e-6) if drawn.noise is None else drawn.noise


def in_paper_form(model: AdaViPro) -> AdaViPro:
    """Return a twin of the model with its prompt in the paper's form."""
    twin = AdaViPro(model.encoder, model.head.rows, model.config)
    twin.prompt = PaperForm.of(model.prompt)
    return twin.train(model.training).to(model.head.rows.device)
