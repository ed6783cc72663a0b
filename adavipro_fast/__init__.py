"""Region-based adaptive visual prompts (AdaViPro) for a frozen CLIP encoder."""

from adavipro_fast.artifact import open_artifact
from adavipro_fast.clip import FrozenEncoder, load_clip, load_encoder
from adavipro_fast.prompt import AdaptivePrompt, AdaViPro, Prediction, PromptConfig

__all__ = [
    "AdaViPro",
    "AdaptivePrompt",
    "FrozenEncoder",
    "Prediction",
    "PromptConfig",
    "load_clip",
    "load_encoder",
    "open_artifact",
]
