import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from adavipro_fast.training.assemble import load

# Over 77 tokens in under 255 letters.
LONG = "a b " * 45


@pytest.fixture
def named(folder, small, tmp_path):
    """Load the small folder with its first two classes called otherwise."""

    def build(first, second, third="cross", **settings):
        data = shutil.copytree(folder, tmp_path / "data")
        for split in ("train", "val", "test"):
            (data / split / "circle").rename(data / split / first)
            (data / split / "crescent").rename(data / split / second)
            (data / split / "cross").rename(data / split / third)
        config = small(tmp_path / "run")
        prompt = replace(config.prompt, **settings.pop("prompt", {}))
        config = replace(config, prompt=prompt, **settings)
        return load(replace(config, data=replace(config.data, data=str(data))))

    return build


def test_names_that_are_read_alike_are_refused(named):
    with pytest.raises(ValueError, match="'Red_Fox' and 'red fox' have .*read as 'red fox'"):
        named("Red_Fox", "red fox")


def test_names_that_are_cut_to_the_same_text_are_refused(named, capsys):
    with pytest.raises(ValueError, match="have the same embedding: both are truncated"):
        named(LONG + "good", LONG + "broken")
    assert "warning: the text encoder truncates" in capsys.readouterr().err


def test_a_learned_head_only_warns(named, capsys):
    named("Red_Fox", "red fox", prompt={"head": "linear"})
    assert "zero-shot cannot tell them apart" in capsys.readouterr().err


def test_a_name_that_just_fits_is_not_called_cut(demo_clip):
    _, text = demo_clip
    words = next(n for n in range(1, 100) if text.cut(["a " * n + "b"], ["{}"]))
    exact = "a " * (words - 1) + "b"
    assert text.cut([exact, exact + " c", "short"], ["{}"]) == [exact + " c"]


def test_equal_rows_of_a_file_are_refused(named, tmp_path):
    rows = torch.nn.functional.normalize(torch.randn(3, 64), dim=-1)
    rows[2] = rows[0]
    save_file({"class_embeddings": rows}, tmp_path / "rows.safetensors")
    with pytest.raises(ValueError, match="'a' and 'cross' have the same .*rows.safetensors"):
        named("a", "b", class_embeddings=tmp_path / "rows.safetensors")


def test_numbers_as_names_hint_at_a_learned_head(named, capsys):
    named("0", "1", "2")
    assert "numbers mean little to a text encoder" in capsys.readouterr().err
