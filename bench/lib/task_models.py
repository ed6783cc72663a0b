"""Tasks for one encoder, each with its own prompt and classes."""

import torch

from adavipro_fast import AdaViPro, PromptConfig
from lib.subject import Subject

NAMES = tuple(map(str, range(10)))
PROMPT_SIZE = 30


def task_model(subject: Subject, prompt_size: int, number: int) -> AdaViPro:
    """Make the model of a task; the number is its seed."""
    torch.manual_seed(number)
    width = subject.model.head.rows.shape[1]
    prompt = PromptConfig(
        prompt_size=prompt_size,
        region_size=subject.model.config.region_size,
        edge="laplacian-magnitude",
        edge_padding="replicate",
        embed_dim=8,
    )
    rows = torch.nn.functional.normalize(torch.randn(len(NAMES), width), dim=-1)
    return AdaViPro(subject.model.encoder, rows, prompt).eval()
