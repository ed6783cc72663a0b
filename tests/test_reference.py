"""The paper's equations once more, written out without the library, against a trained prompt."""

import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open

from adavipro_fast.data.sets import DataConfig
from adavipro_fast.evaluate import EvaluateConfig, command
from adavipro_fast.method.clip import DEMO_MODEL
from adavipro_fast.method.config import PromptConfig
from adavipro_fast.training.config import OptimiserConfig, TrainConfig
from adavipro_fast.training.run import start_run


@pytest.mark.parametrize("edge", ["laplacian", "laplacian-magnitude"])
def test_a_plain_reading_of_the_checkpoint_gives_the_same_masks_and_classes(folder, tmp_path, edge):
    cache = tmp_path / "cache"
    config = TrainConfig(
        prompt=PromptConfig(prompt_size=60, edge=edge),
        data=DataConfig(str(folder), cache_dir=cache),
        optimiser=OptimiserConfig(epochs=1, batch_size=10, lr_prompt=4, lr_generator=1e-3),
        device="cpu",
        output=tmp_path / "run",
    )
    start_run(config)
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    figures = command(EvaluateConfig(checkpoint, config.data, device="cpu"))
    correct, opened = plain_evaluation(checkpoint, folder / "test")
    assert figures["top1"] == pytest.approx(100 * sum(correct) / len(correct))
    assert figures["mask_density"] == pytest.approx(sum(opened) / len(opened), abs=1e-9)


@torch.no_grad()
def plain_evaluation(checkpoint, folder):
    with safe_open(checkpoint, "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        w = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{DEMO_MODEL}")
    correct, opened = [], []
    for label, name in enumerate(metadata["class_names"]):
        for path in sorted((folder / name).iterdir()):
            x = preprocess(Image.open(path))[None]
            kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(3, 1, 3, 3)
            e = F.conv2d(x, kernel, padding=1, groups=3)  # eq. 3
            if metadata["config"]["edge"] == "laplacian-magnitude":
                e = e.abs()
            c = F.conv2d(e, w["convergence.weight"], w["convergence.bias"], padding=1)
            logits = F.conv2d(c, w["policy.weight"], w["policy.bias"], stride=32)
            m = logits.argmax(1)  # eq. 4
            dilated = F.interpolate(m[:, None].float(), scale_factor=32, mode="nearest")
            embedding = clip.encode_image(x + dilated * w["prompt"], normalize=True)  # eq. 5
            scores = w["logit_scale"] * embedding @ w["class_embeddings"].T  # eq. 2
            correct.append(int(scores.argmax()) == label)
            # At prompt size 60 all regions but the inner 3 x 3 hold a part of the frame.
            inner = torch.zeros(7, 7, dtype=torch.bool)
            inner[2:5, 2:5] = True
            opened += m[0][~inner].tolist()
    return correct, opened
