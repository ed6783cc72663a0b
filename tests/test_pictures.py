"""What is drawn of masks and of runs."""

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection

from adavipro_fast import pictures
from adavipro_fast.method.config import PromptConfig

SIDE = 224


def drawn(figure):
    """Return the images of a figure, by axes."""
    return [axis.images[0].get_array() for axis in figure.axes]


def outlines(axis):
    """Return the ends of the coloured lines on an axes, each as a sorted pair."""
    *_, line = (c for c in axis.collections if isinstance(c, LineCollection))
    return sorted(sorted(map(tuple, ends.astype(int).tolist())) for ends in line.get_segments())


def images(count):
    return torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8)


def test_only_what_is_closed_within_the_frame_is_hatched():
    mask = torch.zeros(1, 7, 7)
    mask[0, 0, 1] = mask[0, 3, 3] = 1
    figure = pictures.overlay(images(1), mask, ["circle 93 %"], PromptConfig(prompt_size=30))
    original, marked = drawn(figure)
    changed = (original != marked).any(-1)
    expected = np.ones((SIDE, SIDE), dtype=bool)
    expected[30:-30, 30:-30] = False
    expected[:30, 32:64] = False
    assert not (changed & ~expected).any()
    assert changed[expected].mean() > 0.95
    corners = [(32, 0), (64, 0), (64, 30), (32, 30)]
    sides = zip(corners, corners[1:] + corners[:1], strict=True)
    assert outlines(figure.axes[1]) == sorted(sorted(pair) for pair in sides)


@pytest.mark.parametrize(("region", "size"), [(8, 5), (8, 30), (28, 56), (32, 30), (56, 112)])
def test_what_is_open_everywhere_has_the_frame_as_its_outline(region, size):
    grid = SIDE // region
    config = PromptConfig(method="vp", region_size=region, prompt_size=size)
    figure = pictures.overlay(images(1), torch.ones(1, grid, grid), ["a"], config)
    assert np.array_equal(*drawn(figure))
    assert len(outlines(figure.axes[1])) == (4 if size == SIDE // 2 else 8)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["open: prompt added"]


@pytest.mark.parametrize("config", [None, PromptConfig(method="zero_shot")])
def test_without_a_prompt_images_are_drawn_alone(config):
    pixels = images(3)
    figure = pictures.overlay(pixels, torch.zeros(3, 7, 7), ["a", "b", "c"], config)
    assert len(figure.axes) == 3
    for image, picture in zip(pixels, drawn(figure), strict=True):
        assert np.allclose(picture, image.permute(1, 2, 0) / 255)
    assert not figure.legends


@pytest.mark.parametrize("config", [None, PromptConfig(method="zero_shot"), PromptConfig()])
def test_one_image_alone_is_drawn_as_beside_its_original(config):
    pixels, mask = images(1), torch.randint(0, 2, (1, 7, 7))
    (axis,) = pictures.masked(pixels[0], mask[0], config).axes
    expected = pictures.overlay(pixels, mask, ["a"], config).axes[-1]
    assert np.array_equal(*(a.images[0].get_array() for a in (axis, expected)))
    assert len(axis.collections) == len(expected.collections)
    assert axis.get_position().bounds == (0, 0, 1, 1)


def test_many_images_wrap_into_rows_of_four():
    figure = pictures.overlay(images(6), torch.ones(6, 7, 7), ["a"] * 6, PromptConfig())
    corners = [axis.get_position().bounds[:2] for axis in figure.axes[::2]]
    assert len({round(y, 3) for _, y in corners}) == 2
    assert len({round(x, 3) for x, _ in corners}) == 4


@pytest.mark.filterwarnings("error")
def test_titles_are_plain_text_that_fits_and_keeps_its_end(tmp_path):
    names = ["$x^{\n\x1b[31m<b> 5 %", "Löwe 7 %", "\N{CJK UNIFIED IDEOGRAPH-82B1} 9 %"]
    names.append("a_long_name" * 20 + " 12 %")
    figure = pictures.overlay(images(4), torch.ones(4, 7, 7), names, PromptConfig())
    markup, latin, chinese, long = (axis.get_title() for axis in figure.axes[::2])
    assert markup == r"$x^{\n\x1b[31m<b> 5 %"
    assert (latin, chinese) == ("Löwe 7 %", r"\u82b1 9 %")
    assert "…" in long
    assert long.endswith("a_long_name 12 %")
    # Matplotlib warns where its font lacks a glyph.
    pictures.save(figure, tmp_path / "a.png")
    for axis in figure.axes[::2]:
        width = axis.title.get_window_extent().width / figure.dpi
        assert width < 2 * pictures.PANEL + pictures.APART


@pytest.mark.parametrize("epochs", [0, 1, 2, 50])
def test_curves_have_whole_epochs_and_their_legend_above_the_axes(epochs, tmp_path):
    names = ("loss", "train_top1", "val_top1", "mask_density", "mask_adaptivity", "mask_placement")
    rows = [{"epoch": n + 1} | dict.fromkeys(names, 1 / (n + 1)) for n in range(epochs)]
    figure = pictures.curves(rows, 37.4)
    pictures.save(figure, tmp_path / "curves.png")
    for axis in figure.axes:
        assert all(tick == int(tick) for tick in axis.get_xticks())
        assert axis.get_legend().get_window_extent().y0 >= axis.get_window_extent().y1
        marks = {line.get_marker() for line in axis.lines[:1]}
        assert marks == ({"o"} if epochs <= 20 else {""})
