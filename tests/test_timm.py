"""Encoders of timm: their own preprocessing, a learned head, the toolchain behind them."""

from dataclasses import replace
from functools import reduce
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import timm.data
import torch
from PIL import Image
from safetensors.torch import save_file

from adavipro_fast import load_encoder, open_artifact
from adavipro_fast.export import onnx_export
from adavipro_fast.export.onnx_export import OnnxConfig
from adavipro_fast.method.timm_encoder import load_timm
from adavipro_fast.training.run import start_run

SHARED = Path(__file__).parents[2] / "shared"
SMALL = "test_vit"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "weights.safetensors"
    save_file(timm.create_model(SMALL, num_classes=0).state_dict(), path)
    return path


def settings(small, output, weights, **prompt):
    config = small(output, epochs=1)
    return replace(
        config,
        model=f"timm:{SMALL}",
        pretrained=str(weights),
        prompt=replace(config.prompt, region_size=32, **prompt),
    )


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_femto", "resnet18"])
@pytest.mark.parametrize("size", [(500, 375), (90, 333)])
def test_images_are_prepared_as_timm_prepares_them(name, size):
    visual = timm.create_model(name, num_classes=0)
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(visual))
    preprocess = load_timm(f"timm:{name}").preprocess
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    image = Image.fromarray(noise)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocess.mean, preprocess.std))
    ours = (torch.from_numpy(preprocess.pixels()(image).copy()) / 255 - mean) / std
    torch.testing.assert_close(ours, theirs(image), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_prompt_with_a_head_trains_exports_and_predicts(small, weights, tmp_path, folder):
    result = start_run(settings(small, tmp_path / "run", weights, head="linear"))
    assert result["zero_shot_top1"] is None
    config = OnnxConfig(Path(result["checkpoint"]), tmp_path / "f.onnx", input="any")
    exported = onnx_export.export(config)
    assert (exported["graph"], exported["verified"]) == ("folded", True)
    image = np.array(Image.open(next((folder / "test").rglob("*.png"))).convert("RGB"))
    about = open_artifact(tmp_path / "f.onnx", device="cpu")
    pixels = torch.from_numpy(about.about.preprocess.pixels()(Image.fromarray(image)).copy())[None]
    own = open_artifact(result["checkpoint"], device="cpu")(pixels)
    whole = about.run(torch.from_numpy(image).permute(2, 0, 1)[None])
    torch.testing.assert_close(whole["logits"], own.logits, rtol=0, atol=0.05)


def test_what_needs_names_of_classes_is_refused(small, weights, tmp_path):
    with pytest.raises(ValueError, match="has no text encoder; use --head linear"):
        start_run(settings(small, tmp_path / "a", weights))
    with pytest.raises(ValueError, match="has no model"):
        load_encoder("timm:no_such_model")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_encoder(f"timm:{SMALL}", str(Path(__file__)))


@pytest.mark.real
def test_the_same_weights_give_the_same_features_by_timms_class_as_by_open_clips(tmp_path):
    encoder = load_encoder(f"local-dir:{SHARED / 'models' / 'vit-tiny-16-aligned'}")
    visual = encoder.visual
    assert isinstance(visual, open_clip.transformer.VisionTransformer)
    config = {
        "embed_dim": visual.conv1.out_channels,
        "depth": len(visual.transformer.resblocks),
        "num_heads": visual.transformer.resblocks[0].attn.num_heads,
        "patch_size": visual.conv1.kernel_size[0],
        "img_size": encoder.preprocess.size,
        "num_classes": 0,
        "pre_norm": isinstance(visual.ln_pre, torch.nn.LayerNorm),
        "norm_layer": torch.nn.LayerNorm,
    }
    twin = timm.models.vision_transformer.VisionTransformer(**config).eval()
    twin.load_state_dict(timm_weights(visual.state_dict()), strict=True)
    images = torch.randn(2, 3, encoder.preprocess.size, encoder.preprocess.size)
    with torch.no_grad():
        features = encoder.embed(images)[1]
        near = 1e-4 * features.abs().max().item()
        torch.testing.assert_close(twin(images), features, rtol=0, atol=near)


def timm_weights(state):
    """Rename a vision transformer's weights from open_clip's names to timm's."""
    names = {
        "class_embedding": "cls_token", "positional_embedding": "pos_embed",
        "conv1.weight": "patch_embed.proj.weight", "ln_pre": "norm_pre", "ln_post": "norm",
        "transformer.resblocks": "blocks", "ln_1": "norm1", "ln_2": "norm2",
        "attn.in_proj_": "attn.qkv.", "attn.out_proj": "attn.proj",
        "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    renamed = {
        reduce(lambda name, pair: name.replace(*pair), names.items(), name): value
        for name, value in state.items()
        if name != "proj"
    }
    # open_clip's patch embedding has none.
    renamed["patch_embed.proj.bias"] = torch.zeros(len(renamed["patch_embed.proj.weight"]))
    renamed["cls_token"] = renamed["cls_token"].view(1, 1, -1)
    renamed["pos_embed"] = renamed["pos_embed"][None]
    return renamed
