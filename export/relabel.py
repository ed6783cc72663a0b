"""Give a checkpoint new class names: `python export/relabel.py FILE --classes A B --output F`.

The encoder's own text tower embeds the names, and their embeddings replace the old ones; nothing is
trained. Export the new checkpoint again, which takes seconds.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from adavipro_fast import cli
from adavipro_fast.artifact.torch import clip_of
from adavipro_fast.errors import VerificationError
from adavipro_fast.export.comparison import SMALLEST_COSINE, Classify, compare, sample_batches
from adavipro_fast.files.checkpoint import Checkpoint, load_checkpoint
from adavipro_fast.files.whole import named_when_whole
from adavipro_fast.method.clip import (
    DEFAULT_TEMPLATE,
    NoText,
    TextTower,
    check_templates,
    readable,
)
from adavipro_fast.method.model import AdaViPro, Prediction

# Number of old names to embed again, to check that templates and text tower match the old rows.
PROBED = 4


@dataclass(frozen=True)
class RelabelConfig:
    """Give a checkpoint other class names."""

    file: Annotated[Path, tyro.conf.Positional]
    """checkpoint.safetensors"""
    output: Path
    """output file, F.safetensors"""
    classes: tuple[str, ...]
    """new class names in label order; quote a name with spaces"""
    template: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """text with {} for the class name; repeat for an ensemble (default: as in training)"""
    images: cli.Images = ()
    model: cli.Model = None
    pretrained: cli.Pretrained = None


def main() -> None:
    """Parse, relabel, print."""
    cli.main(RelabelConfig, command, summary)


def command(config: RelabelConfig) -> dict[str, Any]:
    """Embed the names, write the file, verify it, and only then rename it to its final name.

    Raises:
        ValueError: the names are invalid, or the file's classes are not embedded names.
        VerificationError: the new file's output is not as expected.
    """
    file, output = config.file, config.output
    check_names(config.classes)
    check_templates(config.template)
    if file.suffix in (".onnx", ".engine"):
        raise ValueError(f"{file} cannot be relabelled; relabel its checkpoint and export it again")
    if output.suffix != ".safetensors":
        raise ValueError(f"output {output} must end in .safetensors")
    old = load_checkpoint(file)
    if old.config.head != "text":
        raise ValueError(
            f"{file} has a linear head, which cannot be relabelled; train it on the new classes"
        )
    encoder, text = clip_of(old, config.model, config.pretrained)
    before = old.model(encoder)
    new = relabelled(old, text, config)
    with named_when_whole(output) as path:
        new.save(path)
        batches = sample_batches(old.preprocess, config.images)
        expected, after = by_rows(before, new), load_checkpoint(path).model(encoder)
        with torch.no_grad():
            comparison = compare(before, expected, after, batches)
        if complaint := comparison.complaint("fp32"):
            raise VerificationError(f"the file was not written: {complaint}")
        size = path.stat().st_size
    if new.config.method != "zero_shot":
        trained = "encoder" if new.config.method == "full_finetune" else "prompt"
        cli.warn(
            f"the {trained} was trained for other classes than these {len(new.class_names)}; "
            f"measure it: adavipro-evaluate {output} --data DATA"
        )
    return {
        "path": str(output),
        "classes": len(new.class_names),
        "classes_before": len(old.class_names),
        "templates": new.templates,
        "encoder": new.encoder.sha256,
        "verified": True,
        "reason": "",
        "max_abs_error": comparison.max_abs_error,
        "bytes": size,
    }


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError unless there are names, and the text tower can distinguish them."""
    if not names:
        raise ValueError("no class given; use --classes NAME [NAME ...]")
    texts = [" ".join(readable(name).split()) for name in names]
    if "" in texts:
        raise ValueError(f"class {texts.index('') + 1} of {len(names)} has an empty name")
    text, count = Counter(texts).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} class names are all read as {text!r}; make them different")


def relabelled(old: Checkpoint, text: TextTower | NoText, config: RelabelConfig) -> Checkpoint:
    """Replace the class embeddings; drop the calibration, which was fitted with the old ones.

    Raises:
        ValueError: there is no text tower, or the old rows are not its embeddings of the names.
    """
    if isinstance(text, NoText):
        raise ValueError(f"encoder {text.name!r} has no text encoder to embed class names")
    templates = config.template or old.templates or (DEFAULT_TEMPLATE,)
    if not config.template:
        names, rows = old.class_names[:PROBED], old.tensors["class_embeddings"][:PROBED]
        again = text.class_embeddings(names, templates)
        if again.shape != rows.shape or F.cosine_similarity(again, rows).min() < SMALLEST_COSINE:
            raise ValueError(
                f"the class embeddings in {config.file} do not match its names in the templates "
                f"{' | '.join(templates)!r}; set --template, or the encoder with --model"
            )
    rows = text.class_embeddings(config.classes, templates)
    return replace(
        old,
        tensors=old.tensors | {"class_embeddings": rows},
        class_names=config.classes,
        calibration=old.calibration.without,
        templates=templates,
    )


def by_rows(before: AdaViPro, new: Checkpoint) -> Classify:
    """Return the expected predictions: as before, with logits computed from the new rows."""
    scale, rows = before.head.scale, new.head.rows
    bias = 0.0 if before.head.bias is None else before.head.bias[0]

    def classify(pixels: Tensor) -> Prediction:
        prediction: Prediction = before(pixels)
        return prediction._replace(logits=scale * prediction.embedding @ rows.t() + bias)

    return classify


def summary(result: dict[str, Any]) -> str:
    """Format the numbers of new and old classes."""
    return (
        f"{result['path']}: {result['classes']} classes in place of {result['classes_before']}, "
        "verified; probabilities are not calibrated for the new classes"
    )


if __name__ == "__main__":
    main()
