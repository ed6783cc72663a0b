"""Region-based adaptive visual prompts (AdaViPro) for a frozen CLIP encoder."""

from importlib.metadata import version

from adavipro_fast.artifact.open import open_artifact
from adavipro_fast.bulk.classifier import Classifier
from adavipro_fast.calls import fit, to_onnx
from adavipro_fast.method.clip import load_clip, load_encoder
from adavipro_fast.method.config import PromptConfig
from adavipro_fast.method.encoder import FrozenEncoder
from adavipro_fast.method.model import AdaViPro, Prediction
from adavipro_fast.method.prompt import AdaptivePrompt

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


def __getattr__(name: str) -> str:
    # At its first use: the package can also run without having been installed.
    if name == "__version__":
        return version("adavipro_fast")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
