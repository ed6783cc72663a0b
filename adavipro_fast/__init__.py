"""Region-based adaptive visual prompts (AdaViPro) for a frozen CLIP encoder."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from adavipro_fast.artifact.open import open_artifact
from adavipro_fast.bulk.classifier import Classifier
from adavipro_fast.calls import fit, to_onnx
from adavipro_fast.method.config import PromptConfig
from adavipro_fast.method.model import AdaViPro, Prediction
from adavipro_fast.method.prompt import AdaptivePrompt

if TYPE_CHECKING:
    from adavipro_fast.method.clip import load_clip, load_encoder
    from adavipro_fast.method.encoder import FrozenEncoder

__all__ = [
    "AdaViPro",
    "AdaptivePrompt",
    "Classifier",
    "FrozenEncoder",
    "Prediction",
    "PromptConfig",
    "__version__",
    "fit",
    "load_clip",
    "load_encoder",
    "open_artifact",
    "to_onnx",
]


# Imported at their first use: open_clip takes seconds, and exported files do without it.
LATER = {
    "FrozenEncoder": "adavipro_fast.method.encoder",
    "load_clip": "adavipro_fast.method.clip",
    "load_encoder": "adavipro_fast.method.clip",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("adavipro_fast")
    if name in LATER:
        return getattr(import_module(LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
