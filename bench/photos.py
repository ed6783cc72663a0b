"""From photographs to answers: time and accuracy of each way to decode, and bulk throughput.

    python bench/photos.py --data flowers --model local-dir:my_clip --json photos.json

Each row is timed in turn with its base. `agreement` rows enlarge the test images of `--data` to 12
megapixels and compare the answers and masks of both decodings.
"""

import io
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from adavipro_fast import AdaViPro, PromptConfig, cli, load_clip, open_artifact
from adavipro_fast.artifact.artifact import Artifact
from adavipro_fast.bulk.rows import Output
from adavipro_fast.bulk.run import BATCH, answered, classify_all
from adavipro_fast.data.ahead import decoded_ahead
from adavipro_fast.data.images import decode, images_in, pixels_of, read_pixels
from adavipro_fast.method.clip import DEFAULT_TEMPLATE, TextTower
from adavipro_fast.method.preprocess import Decode, Preprocess
from lib.subject import Subject, write
from lib.table import Append, Json, Rows
from lib.timing import compared, interleaved_ms, percentiles

PHOTOGRAPH, USUAL = (4000, 3000), (500, 375)
MEGAPIXELS = 12e6
# Sides of photographs are multiples of this, so that JPEG's scales divide them, as for cameras.
MULTIPLE = 16
QUALITY = 92
CHEAPER: tuple[Decode, ...] = ("fast", "scaled")


@dataclass(frozen=True)
class PhotosConfig:
    """Time pictures from their files to their answers."""

    encoder: str = "ViT-B-32"
    """open_clip name of the timed rows, random weights"""
    photographs: int = 64
    """in the folder of 12 megapixels"""
    pictures: int = 256
    """in the folder, shard and table of 500 x 375"""
    calls: int = 5
    """of each row; 0 times nothing"""
    data: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """folder whose `test` images are enlarged and compared; repeatable"""
    model: str = "demo"
    """encoder of the comparison"""
    images: int | None = None
    """of each folder that is compared (default: all)"""
    json: Json = None
    append: Append = False


def main() -> None:
    """Parse, measure, print."""
    cli.main(PhotosConfig, command)


def command(config: PhotosConfig) -> dict[str, Any]:
    """Time all rows in turn, then compare the decodings."""
    device = torch.device("cpu")
    rows = Rows(device, config.json, append=config.append)
    if config.calls:
        with tempfile.TemporaryDirectory() as name:
            rows += timed_rows(config, Path(name), device)
    for folder in config.data:
        rows += agreement(folder, config)
    return rows.published(f"photographs, {config.encoder}")


def timed_rows(config: PhotosConfig, folder: Path, device: torch.device) -> list[dict[str, Any]]:
    """Time one photograph, a folder of them, and smaller pictures from every kind of source."""
    subject = Subject(config.encoder, images=1, device="cpu")
    path = folder / "folded_uint8.onnx"
    write(subject, path)
    artifacts = {how: open_artifact(path, device="cpu", decode=how) for how in get_args(Decode)}
    full = artifacts["full"]
    content = encoded(subject.sample[0].permute(1, 2, 0).numpy(), PHOTOGRAPH)
    large, small = folder / "photographs", folder / "pictures"
    filled(large, PHOTOGRAPH, config.photographs)
    filled(small, USUAL, config.pictures)
    files = images_in(small)
    preprocess = full.about.preprocess
    batch = read_pixels((files[0],) * BATCH, preprocess)
    # Name, base, images per call, work.
    plan: list[tuple[str, str | None, int, Callable[[], object]]] = [
        ("photo_full", None, 1, partial(full.classify, content)),
        *(
            (f"photo_{how}", "photo_full", 1, partial(artifacts[how].classify, content))
            for how in CHEAPER
        ),
        ("folder_full", None, config.photographs, partial(bulk, full, large, folder)),
        *(
            (
                f"folder_{how}",
                "folder_full",
                config.photographs,
                partial(bulk, artifacts[how], large, folder),
            )
            for how in CHEAPER
        ),
        ("decode_alone", None, config.pictures, partial(decode_alone, files, preprocess)),
        ("encoder_alone", None, BATCH, partial(full, batch)),
        ("folder", None, config.pictures, partial(bulk, full, small, folder)),
        (
            "pictures_fast",
            "folder",
            config.pictures,
            partial(bulk, artifacts["fast"], small, folder),
        ),
        ("tar", "folder", config.pictures, partial(bulk, full, shard(files, folder), folder)),
        ("parquet", "folder", config.pictures, partial(bulk, full, table(files, folder), folder)),
    ]
    works = {name: work for name, _, _, work in plan}
    bases = {name: base for name, base, _, _ in plan if base}
    times = interleaved_ms(works, device, rounds=config.calls, warm_up=1, bases=bases)
    rows: list[dict[str, Any]] = []
    for name, base, count, _ in plan:
        row: dict[str, Any] = {"name": name, "images": count, **percentiles(times[name])}
        row["images_per_s"] = 1e3 * count / row["p50_ms"]
        rows.append(row | (compared(times[name], times[base]) if base else {}))
    by_name = {row["name"]: row for row in rows}
    alone = sum(1 / by_name[name]["images_per_s"] for name in ("decode_alone", "encoder_alone"))
    by_name["folder"]["of_alone"] = by_name["folder"]["images_per_s"] * alone
    return rows


def encoded(pixels: np.ndarray[Any, Any], size: tuple[int, int]) -> bytes:
    """Enlarge pixels (H, W, 3) and encode them as a JPEG."""
    content = io.BytesIO()
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    image.save(content, "JPEG", quality=QUALITY)
    return content.getvalue()


def filled(folder: Path, size: tuple[int, int], count: int) -> None:
    """Write JPEGs of smooth noise."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(count):
        coarse = noise.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        (folder / f"{number:05}.jpg").write_bytes(encoded(coarse, size))


def shard(files: list[Path], folder: Path) -> Path:
    """Pack files as a WebDataset shard."""
    path = folder / "pictures.tar"
    with tarfile.open(path, "w") as archive:
        for file in files:
            archive.add(file, file.name)
    return path


def table(files: list[Path], folder: Path) -> Path:
    """Pack files as a Parquet table."""
    import pyarrow
    import pyarrow.parquet

    path = folder / "pictures.parquet"
    column = pyarrow.table({"image": [file.read_bytes() for file in files]})
    pyarrow.parquet.write_table(column, path)
    return path


def bulk(artifact: Artifact, source: Path, folder: Path) -> object:
    """Classify a source into a file of rows."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        output = Output(Path(place) / "rows.csv", {"source": str(source)}, embeddings=False)
        answers = partial(answered, artifact, columns=output.columns, reject=None)
        return classify_all(answers, [source], output)


def decode_alone(files: list[Path], preprocess: Preprocess) -> None:
    """Decode files in threads like bulk classification, and discard them."""
    for _ in decoded_ahead(files, partial(pixels_of, preprocess=preprocess), BATCH):
        pass


@torch.no_grad()
def agreement(folder: Path, config: PhotosConfig) -> list[dict[str, Any]]:
    """Compare answers and masks of enlarged test images with those of full decoding."""
    files = images_in(folder / "test")
    files = files[:: max(1, len(files) // (config.images or len(files)))]
    names = sorted({file.parent.name for file in files})
    encoder, text = load_clip(config.model)
    assert isinstance(text, TextTower)
    torch.manual_seed(0)
    prompt = PromptConfig(
        edge="laplacian-magnitude", edge_padding="replicate", generator_init="avoid-edges"
    )
    rows = text.class_embeddings(names, [DEFAULT_TEMPLATE])
    model = AdaViPro(encoder, rows, prompt).eval()
    full = encoder.preprocess
    model.prompt.initialise(read_pixels(tuple(files[::4]), full))
    ways = [full, *(replace(full, decode=how) for how in CHEAPER)]

    def each(file: Path) -> list[np.ndarray[Any, Any]]:
        content = enlarged(file)
        return [how.pixels()(decode(content, file.name, how)) for how in ways]

    same: dict[str, list[Tensor]] = {how: [] for how in CHEAPER}
    masks: dict[str, list[Tensor]] = {how: [] for how in CHEAPER}
    apart: dict[str, list[Tensor]] = {how: [] for how in CHEAPER}
    for _, pairs in decoded_ahead(files, each, BATCH):
        pixels = torch.from_numpy(np.stack(pairs)).transpose(0, 1)
        before = model(pixels[0])
        for how, changed in zip(CHEAPER, pixels[1:], strict=True):
            after = model(changed)
            same[how].append(before.logits.argmax(1) == after.logits.argmax(1))
            masks[how].append((before.mask == after.mask).double().mean((1, 2)))
            apart[how].append((pixels[0].short() - changed.short()).abs())
    return [
        {
            "name": f"agreement_{folder.name}_{how}",
            "images": len(files),
            "answers": torch.cat(same[how]).double().mean().item(),
            "masks": torch.cat(masks[how]).mean().item(),
            "grey_levels_mean": torch.cat(apart[how]).double().mean().item(),
            "grey_levels_max": int(torch.cat(apart[how]).max()),
        }
        for how in CHEAPER
    ]


def enlarged(file: Path) -> bytes:
    """Enlarge an image to 12 megapixels, with sides that JPEG's scales divide."""
    image = Image.open(file).convert("RGB")
    factor = (MEGAPIXELS / (image.width * image.height)) ** 0.5
    width, height = (
        int(side * factor) // MULTIPLE * MULTIPLE for side in (image.width, image.height)
    )
    return encoded(np.asarray(image), (width, height))


if __name__ == "__main__":
    main()
