"""Small random encoders of every family in open_clip and timm."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import open_clip
import timm
import torch
from safetensors.torch import save_file

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
POOLED = VIT | {"attentional_pool": True, "attn_pooler_heads": 2}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}


@dataclass(frozen=True)
class Encoder:
    """An architecture, small if possible, that represents its family."""

    family: str
    name: str
    """timm's name, or a name for the open_clip configuration"""
    vision: dict[str, Any] | None = None
    """open_clip's configuration of the image tower; None for an encoder of timm alone"""
    rest: dict[str, Any] = field(default_factory=dict)
    """other entries of open_clip's configuration"""
    resize_mode: str = "shortest"
    refused: tuple[str, ...] = ()
    """forms that are known not to work"""
    quick: bool = False
    """small enough for the ordinary tests"""

    def written(self, folder: Path) -> tuple[str, str]:
        """Write random weights; return the values of --model and --pretrained.

        Args:
            folder: an empty folder.
        """
        torch.manual_seed(0)
        if self.vision is None:
            weights = folder / "weights.safetensors"
            write_weights(timm.create_model(self.name, num_classes=0), weights)
            return f"timm:{self.name}", str(weights)
        config = {"embed_dim": 32, "text_cfg": TEXT, "vision_cfg": self.vision} | self.rest
        with patch.dict(open_clip.factory._MODEL_CONFIGS, {"random": config}):
            model = open_clip.create_model("random")
        write_weights(model, folder / "open_clip_model.safetensors")
        settings = {
            "model_cfg": config,
            "preprocess_cfg": HALF | {"resize_mode": self.resize_mode},
        }
        (folder / "open_clip_config.json").write_text(json.dumps(settings))
        return f"local-dir:{folder}", ""


def write_weights(model: torch.nn.Module, path: Path) -> None:
    """Write a model's weights as safetensors."""
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)


def of_timm(name: str, side: int, pool: str, projection: str) -> dict[str, Any]:
    """Return open_clip's configuration of an image tower from timm."""
    return {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": pool,
        "timm_proj": projection,
        "timm_drop": 0.0,
        "image_size": side,
    }


SIGLIP = {
    "embed_dim": 96,
    "init_logit_bias": -10,
    "custom_text": True,
    "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last"},
}
COCA = {
    "custom_text": True,
    "text_cfg": TEXT | {"context_length": 76, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": TEXT | {"context_length": 76, "width": 32, "attn_pooler_heads": 2},
}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}

OPEN_CLIP = [
    Encoder("CLIP ViT", "class token", VIT),
    Encoder("CLIP ViT", "QuickGELU", VIT, {"quick_gelu": True}),
    Encoder("CLIPA ViT", "average pooling", VIT | {"pool_type": "avg"}),
    Encoder("CLIP ViT", "attentional pooling", POOLED),
    Encoder("CoCa", "CoCa", POOLED | {"output_tokens": True}, COCA),
    Encoder("CLIP ResNet", "ModifiedResNet", RESNET, quick=True),
    Encoder(
        "SigLIP", "test_vit3", of_timm("test_vit3", 160, "map", "none"), SIGLIP,
        resize_mode="squash",
    ),
    Encoder(
        "EVA", "eva02_tiny", of_timm("eva02_tiny_patch14_224", 224, "token", "none"),
        {"embed_dim": 192},
    ),
    Encoder("PE-Core", "vit_pe_core_tiny", of_timm("vit_pe_core_tiny_patch16_384", 384, "map", "")),
    Encoder("CLIP ConvNeXt", "test_convnext", of_timm("test_convnext", 160, "", "mlp")),
    Encoder("CLIP Swin", "swin_tiny", of_timm("swin_tiny_patch4_window7_224", 224, "", "linear")),
    Encoder("CLIP ViT of timm", "vit_relpos", of_timm("test_vit_relpos", 160, "", "linear")),
    Encoder("MobileCLIP", "fastvit_t8", of_timm("fastvit_t8", 256, "avg", "")),
    Encoder("MobileCLIP", "vit_base_mci", of_timm("vit_base_mci_224", 224, "token", "")),
    Encoder("ViTamin", "vitamin_small", of_timm("vitamin_small_224", 224, "", "linear")),
]  # fmt: skip
TIMM = [
    Encoder("ViT", "test_vit", quick=True),
    Encoder("DeiT", "deit_tiny_patch16_224"),
    Encoder("DINOv2", "vit_small_patch14_reg4_dinov2"),
    Encoder("DINOv3", "vit_tiny_patch16_dinov3_qkvb"),
    Encoder("BEiT", "beit_base_patch16_224"),
    Encoder("CaiT", "cait_xxs24_224"),
    Encoder("XCiT", "xcit_nano_12_p16_224", refused=("own_fp16",)),
    Encoder("ConViT", "convit_tiny"),
    Encoder("LeViT", "levit_128s"),
    Encoder("TinyViT", "tiny_vit_5m_224"),
    Encoder("MaxViT", "test_maxvit", refused=("engine",)),
    Encoder("CoAtNet", "test_coatnet"),
    Encoder("ResNet", "test_resnet"),
    Encoder("ConvNeXt", "test_convnext3"),
    Encoder("EfficientNet", "test_efficientnet"),
    Encoder("NFNet", "test_nfnet"),
    Encoder("RegNet", "regnety_002"),
    Encoder("MobileNetV3", "mobilenetv3_small_050"),
    Encoder("MambaOut", "test_mambaout"),
    Encoder("RepVGG and kin", "test_byobnet"),
]
ENCODERS = OPEN_CLIP + TIMM
