"""Draw image sets far from any encoder's pretraining: letters, spectrograms, scatter plots.

    python bench/drawn.py sounds my_sounds

Nothing is downloaded: letters use the fonts included in matplotlib, and sounds are synthesised.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib as mpl
import numpy as np
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from adavipro_fast import cli

Kind = Literal["letters", "sounds", "charts"]
Array = np.ndarray[Any, Any]
SIDE = 128
LETTERS = "BDEFKMPRSW"
# Fonts with Latin letters; the Display fonts lack most of them.
FONTS = ("DejaVuSans*.ttf", "DejaVuSerif*.ttf", "STIXGeneral*.ttf")
# Samples of a sound, and of one spectrum; a new spectrum starts every HOP samples.
SAMPLES, WINDOW, HOP = 8192, 256, 64
TIME = np.linspace(0, 1, SAMPLES, endpoint=False)


@cache
def fonts() -> list[Path]:
    """List the font files, sorted."""
    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    found = (path for pattern in FONTS for path in folder.glob(pattern))
    return sorted(path for path in found if "Display" not in path.name)


def letter(name: str, rng: np.random.Generator) -> Image.Image:
    """Draw a letter in a random font, size, position, angle and pair of greys, with noise."""
    paper, ink = rng.permutation([rng.uniform(40, 110), rng.uniform(150, 215)])
    font = ImageFont.truetype(str(rng.choice(fonts())), int(rng.integers(40, 90)))  # type: ignore[arg-type]
    drawn = Image.new("L", (SIDE, SIDE), int(paper))
    place = tuple(SIDE / 2 + rng.uniform(-20, 20, 2))
    ImageDraw.Draw(drawn).text(place, name, int(ink), font, anchor="mm")
    drawn = drawn.rotate(rng.uniform(-40, 40), Image.Resampling.BICUBIC, fillcolor=int(paper))
    noisy = np.asarray(drawn) + rng.normal(0, 40, (SIDE, SIDE))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert("RGB")


def tone(frequency: Array) -> Array:
    """Return a tone whose frequency (SAMPLES,) is in periods per sound."""
    return np.sin(2 * np.pi * np.cumsum(frequency) / SAMPLES)


def path(*points: float) -> Array:
    """Return frequencies (SAMPLES,) on straight lines through points at even times."""
    return np.interp(TIME, np.linspace(0, 1, len(points)), points)


def chord(low: float, _: float, rng: np.random.Generator) -> Array:
    """Return a tone with its harmonics."""
    return sum(tone(path(k * low / 2)) for k in range(1, 2 + rng.integers(3, 5))) / 2  # type: ignore[return-value]


def clicks(_: float, __: float, rng: np.random.Generator) -> Array:
    """Return clicks at even times."""
    sound = np.zeros(SAMPLES)
    sound[rng.integers(400) :: rng.integers(500, 1400)] = 25
    return sound


def band(low: float, high: float, rng: np.random.Generator) -> Array:
    """Return noise between two frequencies."""
    spectrum = np.fft.rfft(rng.normal(size=SAMPLES))
    number = np.arange(len(spectrum))
    spectrum[(number < low) | (number > (low + high) / 2)] = 0
    return np.fft.irfft(spectrum, SAMPLES)


def wave(rate: float, rng: np.random.Generator) -> Array:
    """Return a slow sine (SAMPLES,) of any phase."""
    return np.sin(2 * np.pi * (rate * TIME + rng.random()))


SOUNDS: dict[str, Callable[[float, float, np.random.Generator], Array]] = {
    "rising": lambda low, high, rng: tone(path(low, high)),
    "falling": lambda low, high, rng: tone(path(high, low)),
    "arch": lambda low, high, rng: tone(path(low, high, low)),
    "valley": lambda low, high, rng: tone(path(high, low, high)),
    "trembling": lambda low, high, rng: tone(path(high)) * (1 + wave(rng.uniform(4, 9), rng)),
    "vibrato": lambda low, high, rng: tone(high + low / 3 * wave(rng.uniform(4, 9), rng)),
    "pair": lambda low, high, rng: tone(path(low)) + tone(path(high)),
    "chord": chord,
    "clicks": clicks,
    "band": band,
}


def sound(name: str, rng: np.random.Generator) -> Image.Image:
    """Draw the spectrogram of a sound in noise, with a short tone unrelated to the class."""
    low, high = rng.uniform(300, 900), rng.uniform(1500, 3200)
    begin, end = np.sort(rng.uniform(0, 1, 2))
    other = tone(path(rng.uniform(200, 3800))) * ((begin < TIME) & (end > TIME))
    heard = rng.uniform(0.3, 1) * SOUNDS[name](low, high, rng)
    heard = heard + 0.5 * other + rng.uniform(0.3, 1.2) * rng.normal(size=SAMPLES)
    frames = np.lib.stride_tricks.sliding_window_view(heard, WINDOW)[::HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(WINDOW))[:, 1:]) ** 2
    level = np.log(power.T[::-1] + 1e-9)
    least, most = np.percentile(level, (5, 99.8))
    colours = colormaps["magma"](((level - least) / (most - least)).clip(0, 1), bytes=True)
    return Image.fromarray(colours[..., :3]).resize((SIDE, SIDE), Image.Resampling.BILINEAR)


CHARTS: dict[str, Callable[[Array, np.random.Generator], Array]] = {
    "rising": lambda x, rng: x,
    "falling": lambda x, rng: -x,
    "valley": lambda x, rng: 4 * (x - 0.5) ** 2,
    "peak": lambda x, rng: np.exp(-(((x - rng.uniform(0.35, 0.65)) / 0.13) ** 2)),
    "periodic": lambda x, rng: np.sin(2 * np.pi * (rng.uniform(2, 3.5) * x + rng.random())) / 2,
    "step": lambda x, rng: (x > rng.uniform(0.3, 0.7)) * rng.choice([-1.0, 1.0]),
    "noise": lambda x, rng: 0 * x,
    "groups": lambda x, rng: (rng.random(len(x)) < 0.5).astype(float),
}


def chart(name: str, rng: np.random.Generator) -> Image.Image:
    """Draw a scatter plot; the class is the points' trend, and everything else is random."""
    x = np.sort(rng.uniform(size=rng.integers(25, 60)))
    y = rng.uniform(0.7, 1.5) * CHARTS[name](x, rng)
    y = y + rng.normal(0, rng.uniform(0.12, 0.28), len(x))
    figure = Figure(figsize=(1.6, 1.6), dpi=SIDE / 1.6)
    axis = figure.add_axes((0.15, 0.12, 0.8, 0.8))
    colour, marker = colormaps["tab10"](rng.integers(10)), str(rng.choice(list("o^s+x.")))
    axis.scatter(x, y, s=rng.uniform(6, 22), color=colour, marker=marker)
    if rng.random() < 0.5:
        axis.grid(alpha=0.5)
    below, above = rng.uniform(0, 0.4, 2) * np.ptp(y)
    axis.set_ylim(y.min() - below, y.max() + above)
    axis.tick_params(labelsize=5)
    content = BytesIO()
    figure.savefig(content, format="png")
    return Image.open(content).convert("RGB")


KINDS: dict[Kind, tuple[tuple[str, ...], Callable[[str, np.random.Generator], Image.Image]]] = {
    "letters": (tuple(LETTERS), letter),
    "sounds": (tuple(SOUNDS), sound),
    "charts": (tuple(CHARTS), chart),
}


@dataclass(frozen=True)
class DrawnConfig:
    """Draw a labelled folder with train/, val/ and test/ of eight or ten classes."""

    kind: Annotated[Kind, tyro.conf.Positional]
    """letters, spectrograms of sounds, or scatter plots"""
    output: Annotated[Path, tyro.conf.Positional]
    """folder to make"""
    train: int = 100
    """training images a class"""
    val: int = 20
    """validation images a class"""
    test: int = 50
    """test images a class"""


def command(config: DrawnConfig) -> dict[str, Any]:
    """Draw the images; every image has its own seed.

    Raises:
        ValueError: the output already exists.
    """
    if config.output.exists():
        raise ValueError(f"{config.output} is there already; name a new folder")
    names, draw = KINDS[config.kind]
    counts = {"train": config.train, "val": config.val, "test": config.test}
    for part, (split, count) in enumerate(counts.items()):
        for label, name in enumerate(tqdm(names, split, leave=False, disable=None)):
            folder = config.output / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                rng = np.random.default_rng((part, label, index))
                draw(name, rng).save(folder / f"{index:05d}.png")
    sizes = {split: count * len(names) for split, count in counts.items()}
    return {"path": str(config.output), "kind": config.kind, **sizes}


def main() -> None:
    """Parse, draw, print."""
    cli.main(DrawnConfig, command)


if __name__ == "__main__":
    main()
