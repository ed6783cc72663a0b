"""Resolve names of open_clip models, and the settings that weights in a file need."""

import difflib
import hashlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
from huggingface_hub import constants

from adavipro_fast.errors import EncoderWarning
from adavipro_fast.method.transformers_clip import CONFIG, is_transformers_clip

# open_clip's settings of published weights that affect their output.
SETTINGS = ("quick_gelu", "mean", "std", "interpolation", "resize_mode")
SHA256_IN_ADDRESS = re.compile(r"/([0-9a-f]{64})/")
# Names of OpenAI's models on the Hub: size, patch, and image side if not 224.
HUB_NAME = re.compile(r"(?:openai/)?clip-vit-(base|large)-patch(\d+)(?:-(\d+))?")
SIZES = {"base": "B", "large": "L"}
NEAREST = 3
OPEN_CLIP_CONFIG = "open_clip_config.json"


def resolved_name(model: str) -> str:
    """Return open_clip's form of a name: `ViT-B/32` is `ViT-B-32`, a folder is `local-dir:`.

    Raises:
        ValueError: open_clip does not know the name; the message suggests similar ones.
    """
    known: list[str] = open_clip.list_models()
    name = model.replace("/", "-")
    same = next((each for each in known if each.lower() == name.lower()), None)
    if same is not None:
        return same
    folder = Path(model.removeprefix("local-dir:"))
    if folder.is_dir() and not (folder / OPEN_CLIP_CONFIG).exists():
        if is_transformers_clip(folder):
            return model
        raise ValueError(f"model folder {folder} {what_lacks(folder)}")
    if ":" in model:
        return model
    if folder.is_dir():
        return f"local-dir:{folder}"
    raise ValueError(f"open_clip has no model {model!r}; {suggestion(model, known)}")


def what_lacks(folder: Path) -> str:
    """Describe the content of a folder without open_clip's configuration, and the way out."""
    try:
        kind = json.loads((folder / CONFIG).read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return f"has no {OPEN_CLIP_CONFIG}; save the model with open_clip, or use one of its names"
    return (
        f"contains a {kind!r} model of transformers, but only 'clip' is supported; use an encoder "
        "of open_clip, or timm:NAME"
    )


def suggestion(model: str, known: list[str]) -> str:
    """Suggest the name that was probably meant."""
    on_hub = HUB_NAME.fullmatch(model.lower())
    if on_hub is not None:
        size, patch, side = on_hub.groups()
        name = f"ViT-{SIZES[size]}-{patch}" + (f"-{side}" if side else "")
        if name in known:
            return f"this is its name in transformers; use --model {name} --pretrained openai"
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(model.replace("/", "-").lower(), lower, NEAREST, cutoff=0.5)
    names = ", ".join(lower[name] for name in near) or ", ".join(["ViT-B-32", "ViT-B-16"])
    hub = f", or hf-hub:{model} for a model of open_clip's on the Hub" if "/" in model else ""
    return (
        f"use demo, local-dir:PATH or one of {names} ({len(known)} names: "
        f"open_clip.list_models()){hub}"
    )


def settings_of_file(model: str, path: Path) -> Mapping[str, Any]:
    """Return the settings of weights in a file.

    They are those of the published weights with the file's hash; otherwise, those that all
    published weights of the architecture share.

    Args:
        model: open_clip's name of the architecture.
        path: file of the weights.

    Warns:
        EncoderWarning: settings of published weights differ, and the file's hash is not known.
    """
    tags = open_clip.list_pretrained_tags_by_model(model)
    published = {tag: open_clip.get_pretrained_cfg(model, tag) for tag in tags}
    addresses = {
        tag: SHA256_IN_ADDRESS.search(cfg.get("url", "")) for tag, cfg in published.items()
    }
    if any(addresses.values()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        for tag, match in addresses.items():
            if match is not None and match[1] == digest:
                return {name: published[tag].get(name) for name in SETTINGS}
    agreed = {}
    for name in SETTINGS:
        ways: dict[Any, list[str]] = {}
        for tag, cfg in published.items():
            ways.setdefault(cfg.get(name, False if name == "quick_gelu" else None), []).append(tag)
        if len(ways) == 1:
            agreed[name] = next(iter(ways))
        elif len(ways) > 1:
            warnings.warn(EncoderWarning(difference(model, name, ways)), stacklevel=2)
    return agreed


def difference(model: str, name: str, ways: Mapping[Any, list[str]]) -> str:
    """Explain how published weights of one architecture differ, and how to choose."""
    listed = "; ".join(
        f"{way} ({', '.join(tags[:NEAREST])}{' ...' if len(tags) > NEAREST else ''})"
        for way, tags in ways.items()
    )
    twin = f"{model}-quickgelu"
    other = "--model local-dir:FOLDER with an open_clip_config.json that sets it"
    if name == "quick_gelu" and twin in open_clip.list_models():
        other = f"--model {twin} for QuickGELU"
    return (
        f"published weights of {model} differ in {name}: {listed}; the file does not say which it "
        f"needs, so the default of {model} is used; to change this, use {other}, or "
        "--pretrained TAG"
    )


@contextmanager
def one_line_errors(model: str, pretrained: str) -> Iterator[None]:
    """Turn open_clip's loading errors into one-line messages, and silence its log.

    Raises:
        ValueError: the model cannot be loaded; the message names the way out.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0][:300]
        source = published_at(model, pretrained)
        if source is not None and ("download" in reason or "HF Hub" in reason):
            why = (
                "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub is not reachable"
            )
            reason = (
                f"its weights are not on this machine and {why}; download {source} on another "
                "machine and use --pretrained FILE. Exported .onnx files need no weights"
            )
        raise ValueError(
            f"model {model!r} with pretrained {pretrained!r} cannot be loaded: {reason}"
        ) from error
    finally:
        logging.disable(disabled)


def published_at(model: str, pretrained: str) -> str | None:
    """Return where published weights can be downloaded; None if they are not published."""
    if model.startswith("hf-hub:"):
        return f"the files of {model.removeprefix('hf-hub:')} from the Hugging Face Hub"
    cfg = open_clip.get_pretrained_cfg(model, pretrained)
    if not cfg:
        return None
    repository, _, file = cfg.get("hf_hub", "").rpartition("/")
    if not repository:
        return str(cfg["url"]) if cfg.get("url") else None
    file = file or "open_clip_model.safetensors"
    return f"{file} of {repository} from the Hugging Face Hub"
