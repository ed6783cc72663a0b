"""Load a CLIP saved by Hugging Face's transformers as an open_clip model."""

import json
import re
from pathlib import Path
from typing import Any

import open_clip
import safetensors.torch
import torch
from torch import Tensor

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Keys are Pillow's resampling constants.
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
# Size of CLIP's byte-pair vocabulary, which open_clip's tokenizer uses.
VOCABULARY = 49408
# transformers' names to open_clip's, the most specific first.
NAMES = (
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
PROJECTED = ("visual.proj", "text_projection")
ATTENTION = re.compile(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)")


def is_transformers_clip(folder: Path) -> bool:
    """Report whether a folder contains a CLIP saved by transformers."""
    try:
        return bool(json.loads((folder / CONFIG).read_text()).get("model_type") == "clip")
    except (OSError, ValueError, AttributeError):
        return False


def load_transformers_clip(folder: Path) -> tuple[Any, Any]:
    """Load model and tokenizer on the CPU in fp32.

    Args:
        folder: contains config.json and model.safetensors or pytorch_model.bin, as written by
            `CLIPModel.save_pretrained`.

    Raises:
        ValueError: a file is missing, or the model is not supported.
    """
    config = json.loads((folder / CONFIG).read_text())
    settings, acts = settings_of(config), acts_of(config)
    act = acts.pop() if len(acts) == 1 else "mixed"
    if act not in ("quick_gelu", "gelu") or settings["text_cfg"]["vocab_size"] != VOCABULARY:
        raise ValueError(
            f"{folder}: activation {act!r} with {settings['text_cfg']['vocab_size']} words is not "
            f"supported; use quick_gelu or gelu with {VOCABULARY}"
        )
    clip = open_clip.CLIP(**settings, quick_gelu=act == "quick_gelu")
    try:
        clip.load_state_dict(renamed(read_weights(folder)), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights in {folder} do not match its config: {reason}") from error
    open_clip.factory.set_model_preprocess_cfg(
        clip, preprocessing(folder, settings["vision_cfg"]["image_size"])
    )
    length = settings["text_cfg"]["context_length"]
    return clip, open_clip.SimpleTokenizer(context_length=length)


def acts_of(config: dict[str, Any]) -> set[str]:
    """Return the activations of the two towers."""
    towers = (config.get(name) or {} for name in ("vision_config", "text_config"))
    return {tower.get("hidden_act", "quick_gelu") for tower in towers}


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """Translate a transformers configuration, with its defaults, to open_clip's arguments."""
    vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    width, words = vision.get("hidden_size", 768), text.get("hidden_size", 512)
    return {
        "embed_dim": config.get("projection_dim", 512),
        "vision_cfg": {
            "layers": vision.get("num_hidden_layers", 12),
            "width": width,
            "head_width": width // vision.get("num_attention_heads", 12),
            "mlp_ratio": vision.get("intermediate_size", 3072) / width,
            "patch_size": vision.get("patch_size", 32),
            "image_size": vision.get("image_size", 224),
            "norm_kwargs": {"eps": vision.get("layer_norm_eps", 1e-5)},
        },
        "text_cfg": {
            "context_length": text.get("max_position_embeddings", 77),
            "vocab_size": text.get("vocab_size", 49408),
            "width": words,
            "heads": text.get("num_attention_heads", 8),
            "layers": text.get("num_hidden_layers", 12),
            "mlp_ratio": text.get("intermediate_size", 2048) / words,
            "norm_kwargs": {"eps": text.get("layer_norm_eps", 1e-5)},
        },
    }


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights, in fp32.

    Raises:
        ValueError: there are no weights, or they are split into several files.
    """
    for name in WEIGHTS:
        path = folder / name
        if path.exists():
            if path.suffix == ".safetensors":
                tensors = safetensors.torch.load_file(path)
            else:
                tensors = torch.load(path, map_location="cpu", weights_only=True)
            return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    raise ValueError(f"{folder} contains none of {', '.join(WEIGHTS)}; save the model as one file")


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights to open_clip's names and layout: one matrix for query, key and value."""
    direct: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.endswith("position_ids"):
            continue
        attention = ATTENTION.fullmatch(name)
        new = f"{attention[1]}.attn.in_proj_{attention[3]}" if attention else name
        for pattern, replacement in NAMES:
            new = re.sub(pattern, replacement, new)
        if attention:
            parts.setdefault(new, {})[attention[2]] = value
        else:
            direct[new] = value.t().contiguous() if new in PROJECTED else value
    joined = {k: torch.cat([v[part] for part in "qkv"]) for k, v in parts.items() if len(v) == 3}
    return direct | joined


def preprocessing(folder: Path, side: int) -> dict[str, Any]:
    """Read the preprocessing; without its file, return that of OpenAI's models."""
    path = folder / PREPROCESSOR
    values = json.loads(path.read_text()) if path.exists() else {}
    default = open_clip.get_pretrained_cfg("ViT-B-32", "openai")
    return {
        "size": side,
        "mean": tuple(values.get("image_mean", default["mean"])),
        "std": tuple(values.get("image_std", default["std"])),
        "interpolation": INTERPOLATIONS.get(values.get("resample", 3), "bicubic"),
        "resize_mode": "shortest",
        "mode": "RGB",
        "fill_color": 0,
    }
