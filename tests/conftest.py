import os
from pathlib import Path

import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from adavipro_fast.data import world
from adavipro_fast.data.sets import DataConfig
from adavipro_fast.method.clip import TextTower, load_clip
from adavipro_fast.method.config import PromptConfig
from adavipro_fast.method.encoder import FrozenEncoder
from adavipro_fast.training.config import OptimiserConfig, TrainConfig

SHARED = Path(__file__).parents[2] / "shared"


def pytest_collection_modifyitems(config, items):
    real = (SHARED / "models").is_dir() and (SHARED / "data").is_dir()
    for item in items:
        # Keywords would also hold the names of the folders that the checkout lies in.
        marked = {mark.name for mark in item.iter_markers()}
        if "gpu" in marked and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))
        if "real" in marked and not real:
            item.add_marker(pytest.mark.skip(reason="../shared/models or ../shared/data is absent"))
        if "slow" in marked and "slow" not in config.getoption("markexpr"):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture(autouse=True)
def in_onnx_runtime(request, monkeypatch):
    """Files are opened in ONNX Runtime, but where what `auto` takes is tested."""
    if request.path.stem not in ("test_openvino", "test_combinations"):
        monkeypatch.setattr("adavipro_fast.artifact.open.preferred", lambda *_: False)


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    torch.manual_seed(0)
    # Fills fresh memory with NaN, so that a value that nobody wrote is seen.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def demo_clip() -> tuple[FrozenEncoder, TextTower]:
    return load_clip("demo")


@pytest.fixture
def encoder(demo_clip) -> FrozenEncoder:
    return demo_clip[0]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A small labelled folder: 3 classes, 10 / 3 / 4 images each, PNG and JPEG."""
    root = tmp_path_factory.mktemp("shapes")
    counts = {"train": 10, "val": 3, "test": 4}
    generator = torch.Generator().manual_seed(3)
    for split, count in counts.items():
        images, labels = world.render(8 * count, world.DOWNSTREAM, generator)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            if label >= 3:
                continue
            name = world.CLASS_NAMES[label]
            path = root / split / name / f"{number:03d}.{'png' if number // 8 % 2 else 'jpg'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return root


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def small(folder, cache):
    """Return a configuration that trains in seconds."""

    def build(output, method="adavipro", epochs=3, **optimiser):
        return TrainConfig(
            prompt=PromptConfig(method=method, embed_dim=4, edge="laplacian-magnitude"),
            data=DataConfig(str(folder), cache_dir=cache),
            optimiser=OptimiserConfig(
                **{"epochs": epochs, "batch_size": 8, "lr_prompt": 1.0, "lr_generator": 0.01}
                | optimiser
            ),
            device="cpu",
            output=output,
        )

    return build
