"""The model card of a checkpoint: what it is, how good, how to use it, and its limits.

Every figure in it is the run's own; what is not known is left out or said to be unknown.
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
from adavipro_fast.files.hub import CHECKPOINT, LIBRARY, SCHEME
from adavipro_fast.method.config import PROMPTED, HeadKind, Method, PromptConfig
from adavipro_fast.method.encoder import EncoderIdentity
from adavipro_fast.method.preprocess import Preprocess
from adavipro_fast.method.timm_encoder import PREFIX

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
    "zero_shot": "nothing: it is used as it is",
    "linear_probe": "nothing but the classes' linear layer",
    "full_finetune": "training its own weights further; they are in this repository",
}
HEADS: dict[HeadKind, str] = {
    "text": "the nearest name, by the text encoder",
    "linear": "a linear layer, trained too",
}
OWN = "of the author's own"
WEIGHTS = (".bin", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class Run:
    """What a run's own files say about its checkpoint."""

    data: str | None
    """name of a known data set; none of the author's own images"""
    images: Mapping[str, int]
    """how many are in `train`, `val` and `test`; empty where it did not count them"""
    seed: int
    figures: Mapping[str, Any]
    """what training returned"""


@dataclass(frozen=True)
class Source:
    """Where others get an encoder."""

    what: str
    repository: str | None = None
    """owner/name on the Hub"""
    licence: str | None = None
    """that its library records"""
    flags: tuple[tuple[str, str], ...] = ()
    """that others must give, where it is a file of the author's"""


def model_card(
    config: PromptConfig,
    class_names: Sequence[str],
    encoder: EncoderIdentity,
    preprocess: Preprocess,
    *,
    calibrated: bool = False,
    repository: str = "owner/name",
    run: Run | None = None,
    license: str | None = None,
    pictures: Sequence[str] = (),
) -> ModelCard:
    """Write a checkpoint's model card.

    Args:
        config: of the prompt.
        class_names: in label order.
        encoder: that it belongs to.
        preprocess: of its images.
        calibrated: whether `--reject` works.
        repository: where the card will lie, owner/name.
        run: that made it, where its files are known.
        license: that the author gives the trained weights, such as apache-2.0.
        pictures: names among `PICTURES` that lie beside it.
    """
    source = source_of(encoder)
    known = None if run is None or run.data in (None, "demo") else run.data
    data = ModelCardData(
        library_name=LIBRARY,
        pipeline_tag="image-classification",
        tags=["image-classification", "visual-prompting", config.method],
        license=license,
        base_model=source.repository,
        datasets=known,
    )
    if run is not None:
        data.model_name, data.eval_results = repository.split("/")[-1], [result_of(run)]
    sections = (
        what_it_is(config, class_names, preprocess, source, repository),
        how_good(config, run, pictures),
        usage(repository, source),
        licences(config, encoder, source, license),
        limits(config, preprocess, run, calibrated),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def source_of(encoder: EncoderIdentity) -> Source:
    """Say where an encoder comes from; paths of its author are left out."""
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
    """Return what timm records of an encoder's weights; none of weights that it does not know."""
    name, _, own = name.partition(".")
    if not (tag or own):
        return None
    with suppress(RuntimeError):
        return timm.get_pretrained_cfg(f"{name}.{tag or own}")
    return None


def code(text: str) -> str:
    """Show a name as it is: names come from folders, and may hold Markdown."""
    return "`" + printable(text).replace("`", "'") + "`"


def result_of(run: Run) -> EvalResult:
    """Return the test figure as the Hub's model-index holds it, or validation's without one."""
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


def what_it_is(
    config: PromptConfig,
    class_names: Sequence[str],
    preprocess: Preprocess,
    source: Source,
    repository: str,
) -> str:
    """Say what it is, and list the classes."""
    adapted = METHODS[config.method].format(size=config.prompt_size, region=config.region_size)
    head = HEADS["linear" if config.method == "linear_probe" else config.head]
    side, margin = preprocess.size, ""
    if preprocess.margin:
        margin = f", shrunk by {preprocess.margin} on each side, which the prompt has for itself"
    listed = ", ".join(code(name) for name in class_names[:SHOWN_CLASSES])
    if len(class_names) > SHOWN_CLASSES:
        listed += f" and {len(class_names) - SHOWN_CLASSES} more, which the file lists"
    return f"""# {repository.split("/")[-1]}

An image classifier: it tells which of {len(class_names)} classes an image shows.

- **Encoder**, which turns an image into numbers: {source.what}.
- **Adapted by**: {adapted}.
- **From these numbers to a class**: {head}.
- **Images**: RGB, {side} x {side} pixels{margin}; the library resizes them.

## Classes

In the order of the model's outputs: {listed}."""


def how_good(config: PromptConfig, run: Run | None, pictures: Sequence[str]) -> str:
    """Tell what the run measured, with its split and seed."""
    shown = [f"{PICTURES[name]}:\n\n![{PICTURES[name]}]({name})" for name in pictures]
    if run is None:
        said = "No figures came with this file: measure it on your own images before you use it."
        return "\n\n".join(["## How good it is", said, *shown])
    counted = {name: f"{count} " for name, count in run.images.items()}
    val, test = f"{counted.get('val', '')}validation", f"{counted.get('test', '')}test"
    rows = [("This model", val, "val_top1"), ("This model", test, "test_top1")]
    if config.method != "zero_shot":
        rows.append(("The encoder alone, by the names of the classes", test, "zero_shot_top1"))
    table = ["| | images | top-1, % |", "|---|---|---|"]
    for what, split, key in rows:
        if run.figures.get(key) is not None:
            table.append(f"| {what} | {split} | {run.figures[key]:.1f} |")
    data = code(run.data) if run.data else f"images {OWN}"
    said = (
        f"From one run on {data} ({counted.get('train', '')}training images), with seed "
        f"{run.seed}; another seed gives other figures. What was kept was chosen on the validation "
        "images, nothing on the test images."
    )
    split = "validation" if run.figures.get("test_top1") is None else "test"
    if config.method == "adavipro":
        said += (
            f" The prompt is added in {100 * run.figures['mask_density']:.0f} % of the regions "
            f"that its frame touches, in the mean over the {split} images."
        )
    return "\n\n".join(["## How good it is", "\n".join(table), said, *shown])


def usage(repository: str, source: Source) -> str:
    """Show how to classify a photo, in Python and on the command line."""
    address = SCHEME + repository
    options = "".join(f', {name}="{value}"' for name, value in source.flags)
    flags = "".join(f" --{name} {value}" for name, value in source.flags)
    return f"""## Use

With the Python package `{LIBRARY}`:

```python
from pathlib import Path

from {LIBRARY} import open_artifact
from {LIBRARY}.data.images import read_pixels

artifact = open_artifact("{address}"{options})
logits, mask, embedding = artifact(read_pixels((Path("photo.jpg"),), artifact.about.preprocess))
probabilities = artifact.about.calibration.probabilities(logits)[0]
print(artifact.about.class_names[probabilities.argmax()], probabilities.max())
```

or on the command line:

    python -m {LIBRARY}.predict {address} photo.jpg{flags}"""


def licences(
    config: PromptConfig, encoder: EncoderIdentity, source: Source, license: str | None
) -> str:
    """Say where the encoder is, and whose licences apply."""
    named = f", on the Hub as `{source.repository}`" if source.repository else ""
    way = "the library gets it"
    if source.flags:
        flags = " and ".join(code(f"--{name} {value}") for name, value in source.flags)
        way = f"get it from its author, and say where it lies with {flags}"
    terms = "It has a licence of its own, which holds for this model too: see the encoder"
    if source.licence is not None:
        terms += f" (timm records {source.licence})"
    if encoder.name == "demo":
        terms = "It is under the licence of that package"
    absent = "It is not in this repository"
    if config.method == "full_finetune":
        absent = "As it was before this training it is not in this repository"
    own = f"it is under {license}" if license else "its author named no licence for it"
    return f"""## Encoder and licences

The encoder is {source.what}{named}. {absent}: {way}. {terms}.

Another encoder is refused by its hash, `{encoder.sha256}`.

This model's own part is `{CHECKPOINT}`; {own}."""


def limits(config: PromptConfig, preprocess: Preprocess, run: Run | None, calibrated: bool) -> str:
    """Name what it cannot do."""
    unknown = ""
    if calibrated:
        unknown = (
            " `--reject 0.05` answers `unknown` where it is less sure than on all but 5 % of its "
            "validation images."
        )
    lines = [
        "It knows the classes above and no others: whatever an image shows, one of them is the "
        f"answer.{unknown}",
        "It was trained for these classes and for images like those of its training: measure it "
        "on yours before you use it.",
        "What the encoder and the training images get wrong about people and things, it gets "
        "wrong too.",
    ]
    if config.method in PROMPTED:
        side = preprocess.size
        lines.append(f"The prompt fits this encoder and images of {side} x {side} pixels alone.")
    if run is not None and run.data is None:
        lines.append("The images of its training are not published with it.")
    return "\n".join(["## Limits", "", *(f"- {line}" for line in lines)])
