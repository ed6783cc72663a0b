"""The model card of a checkpoint: description, accuracy, usage and limits.

All its figures come from the run; unknown facts are left out or marked as unknown.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from adavipro_fast.errors import printable
from adavipro_fast.files.checkpoint import Checkpoint
from adavipro_fast.files.hub import LIBRARY, SCHEME
from adavipro_fast.method.config import PROMPTED, EncoderIdentity, HeadKind, Method
from adavipro_fast.method.timm_encoder import PREFIX

TEMPLATE = Path(__file__).with_name("card.md")
SHOWN_CLASSES = 200
PICTURES = {
    "masks.png": "From the top: images, their edges, the mask (where the prompt is added), and "
    "what the encoder sees",
    "curves.png": "The training, epoch by epoch",
}
METHODS: dict[Method, str] = {
    "adavipro": "a visual prompt: a frame of {size} pixels, learned, that is added around each "
    "image. A small network looks at the image's edges and decides, for each region of {region} x "
    "{region} pixels, whether the prompt is added there (the method is called AdaViPro)",
    "vp": "a visual prompt: a frame of {size} pixels, learned, that is added around each image",
    "zero_shot": "nothing; it is used unchanged",
    "linear_probe": "only a linear layer for the classes",
    "full_finetune": "fine-tuning its weights, which are in this repository",
}
HEADS: dict[HeadKind, str] = {
    "text": "the text embedding of the class names",
    "linear": "a trained linear layer",
}
OWN = "from the author"
WEIGHTS = (".bin", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class Run:
    """The record of the run that trained a checkpoint."""

    data: str | None
    """name of a known data set; None for the author's own images"""
    images: Mapping[str, int]
    """number of images in `train`, `val` and `test`; empty if unknown"""
    seed: int
    figures: Mapping[str, Any]
    """the result of training"""


@dataclass(frozen=True)
class Source:
    """Where others get an encoder."""

    what: str
    repository: str | None = None
    """owner/name on the Hub"""
    licence: str | None = None
    """licence recorded by its library"""
    flags: tuple[tuple[str, str], ...] = ()
    """flags that others must set if the encoder is one of the author's files"""


def model_card(
    checkpoint: Checkpoint,
    *,
    repository: str = "owner/name",
    run: Run | None = None,
    license: str | None = None,
    pictures: Sequence[str] = (),
) -> ModelCard:
    """Write a checkpoint's model card.

    Args:
        checkpoint: the published checkpoint.
        repository: the card's repository, owner/name.
        run: the run that trained it, if its files are available.
        license: licence of the trained weights, such as apache-2.0.
        pictures: the names in `PICTURES` that are published with it.
    """
    config, source = checkpoint.config, source_of(checkpoint.encoder)
    known = None if run is None or run.data in (None, "demo") else run.data
    data = ModelCardData(
        library_name=LIBRARY,
        pipeline_tag="image-classification",
        tags=["image-classification", "visual-prompting", config.method],
        license=license,
        base_model=source.repository,
        datasets=known,
    )
    name = repository.split("/")[-1]
    if run is not None:
        data.model_name, data.eval_results = name, [result_of(run)]
    card: ModelCard = ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(),
        name=name,
        address=SCHEME + repository,
        library=LIBRARY,
        code=code,
        config=config,
        class_names=checkpoint.class_names,
        shown=SHOWN_CLASSES,
        encoder=checkpoint.encoder,
        preprocess=checkpoint.preprocess,
        calibrated=bool(checkpoint.calibration.confidences),
        prompted=config.method in PROMPTED,
        adapted=METHODS[config.method].format(size=config.prompt_size, region=config.region_size),
        head=HEADS["linear" if config.method == "linear_probe" else config.head],
        source=source,
        run=run,
        figures=[] if run is None else figures_of(run, config.method),
        counted=counted(run),
        license=license,
        pictures=[(file, PICTURES[file]) for file in pictures],
    )
    return card


def counted(run: Run | None) -> dict[str, str]:
    """Format each split's number of images with a trailing space; empty if unknown."""
    images = {} if run is None else run.images
    return {name: f"{images[name]} " if name in images else "" for name in ("train", "val", "test")}


def figures_of(run: Run, method: Method) -> list[tuple[str, str, float]]:
    """List the run's measurements: (model, images, top-1 in percent)."""
    images = counted(run)
    rows = [
        ("This model", f"{images['val']}validation", "val_top1"),
        ("This model", f"{images['test']}test", "test_top1"),
    ]
    if method != "zero_shot":
        alone = "Zero-shot: the encoder with the class names alone"
        rows.append((alone, f"{images['test']}test", "zero_shot_top1"))
    measured = ((what, split, run.figures.get(key)) for what, split, key in rows)
    return [(what, split, figure) for what, split, figure in measured if figure is not None]


def source_of(encoder: EncoderIdentity) -> Source:
    """Describe where to get an encoder; the author's local paths are left out."""
    name, tag = encoder.name, encoder.pretrained
    flags: tuple[tuple[str, str], ...] = ()
    weights = f", weights {code(tag)}" if tag else ""
    if Path(tag).name != tag or tag.endswith(WEIGHTS):
        weights, flags = f", weights {OWN}", (("pretrained", "FILE"),)
    if name == "demo":
        return Source(f"the small one for demonstrations in the package `{LIBRARY}`")
    if name.startswith("local-dir:"):
        return Source(f"one {OWN}", flags=(("model", "local-dir:FOLDER"), *flags))
    if name.startswith("hf-hub:"):
        what = f"{code(name)} of open_clip{weights}"
        return Source(what, name.removeprefix("hf-hub:"), flags=flags)
    if name.startswith(PREFIX):
        kept = None if flags else timm_record(name.removeprefix(PREFIX), tag)
        if kept is not None:
            return Source(f"{code(name)} of timm{weights}", kept.hf_hub_id, kept.license)
        return Source(f"{code(name)} of timm{weights}", flags=flags)
    kept = open_clip.get_pretrained_cfg(name, tag)
    repository = kept.get("hf_hub", "").strip("/") or None
    what = f"{code(name)} of open_clip{weights or ', with random weights'}"
    return Source(what, repository, flags=flags)


def timm_record(name: str, tag: str) -> Any:
    """Return timm's record of an encoder's weights; None if timm does not know them."""
    name, _, own = name.partition(".")
    if not (tag or own):
        return None
    with suppress(RuntimeError):
        return timm.get_pretrained_cfg(f"{name}.{tag or own}")
    return None


def code(text: str) -> str:
    """Quote a name as code: names come from folders and may contain Markdown."""
    return "`" + printable(text).replace("`", "'") + "`"


def result_of(run: Run) -> EvalResult:
    """Return the accuracy for the Hub's model-index: on test, or else validation images."""
    split = "validation" if run.figures["test_top1"] is None else "test"
    figure = run.figures["val_top1" if split == "validation" else "test_top1"]
    return EvalResult(
        task_type="image-classification",
        dataset_type=run.data or "imagefolder",
        dataset_name=run.data or f"images {OWN}",
        dataset_split=split,
        metric_type="accuracy",
        metric_name=f"top-1 accuracy, seed {run.seed}",
        metric_value=round(figure / 100, 4),
    )
