"""Give a trained file other classes: `python export/relabel.py FILE --classes A B --output F`.

The names are embedded by the encoder's own text tower and take the place of the old rows in a
checkpoint or an ONNX file; nothing is trained or exported again.
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
from adavipro_fast.artifact.description import Artifact
from adavipro_fast.artifact.torch import TorchArtifact, clip_of
from adavipro_fast.errors import VerificationError
from adavipro_fast.export.class_rows import head_of, scaled_rows, write_head
from adavipro_fast.export.verify import (
    LARGEST_ERROR_FP32,
    SMALLEST_COSINE,
    opened,
    sample_batches,
)
from adavipro_fast.files.checkpoint import Checkpoint, load_checkpoint
from adavipro_fast.files.whole import named_when_whole
from adavipro_fast.method.clip import (
    DEFAULT_TEMPLATE,
    NoText,
    TextTower,
    check_templates,
    readable,
)
from adavipro_fast.method.encoder import FrozenEncoder

# Old names that are embedded again, to see that texts and text tower are those of the old rows.
PROBED = 4


@dataclass(frozen=True)
class RelabelConfig:
    """Give a checkpoint or an ONNX file other class names."""

    file: Annotated[Path, tyro.conf.Positional]
    """checkpoint.safetensors, or .onnx of one task"""
    output: Path
    """file to write, of the same kind"""
    classes: tuple[str, ...]
    """the new names in label order; quote a name with spaces"""
    template: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """text with {} for the name; several make an ensemble (default: as in training)"""
    images: cli.Images = None
    model: cli.Model = None
    pretrained: cli.Pretrained = None


def main() -> None:
    """Parse, relabel, print."""
    cli.main(RelabelConfig, command, summary)


def command(config: RelabelConfig) -> dict[str, Any]:
    """Embed the names, write the file, and name it when it classifies by them.

    Raises:
        ValueError: the names, or a file whose classes are not embedded names.
        VerificationError: the new file computes something else.
    """
    file, output = config.file, config.output
    check_names(config.classes)
    check_templates(config.template)
    if file.suffix == ".engine":
        raise ValueError(f"{file} has its classes built in; relabel its .onnx and build it again")
    if output.suffix != file.suffix:
        raise ValueError(f"output {output} does not end in {file.suffix}, as {file} does")
    old = head_of(file) if file.suffix == ".onnx" else load_checkpoint(file)
    if old.config.head != "text":
        raise ValueError(f"{file} has a learned head, no names to embed; train it on the classes")
    encoder, text = clip_of(old, config.model, config.pretrained)
    old.check_encoder(encoder)
    new = relabelled(old, text, config)
    with named_when_whole(output) as path:
        if file.suffix == ".onnx":
            write_head(file, path, new)
        else:
            new.save(path)
        after, before = (run(written, encoder) for written in (path, file))
        batches = sample_batches(old.preprocess, config.images)
        verdict = verify(before, after, new, batches, bias=encoder.logit_bias or 0.0)
        size = sum(part.stat().st_size for part in path.parent.iterdir())
    if new.config.method != "zero_shot":
        trained = "encoder" if new.config.method == "full_finetune" else "prompt"
        cli.warn(
            f"the {trained} was trained for other classes than these {len(new.class_names)}; "
            f"measure it: python -m adavipro_fast.evaluate {output} --data DATA"
        )
    return {
        "path": str(output),
        "classes": len(new.class_names),
        "classes_before": len(old.class_names),
        "templates": new.templates,
        "encoder": new.encoder.sha256,
        **verdict,
        "bytes": size,
    }


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError unless there are names, and the text tower reads each as another one."""
    if not names:
        raise ValueError("no class was named; use --classes NAME [NAME ...]")
    texts = [" ".join(readable(name).split()) for name in names]
    if "" in texts:
        raise ValueError(f"class {texts.index('') + 1} of {len(names)} has an empty name; give one")
    text, count = Counter(texts).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} classes are read as {text!r}; give each a name of its own")


def relabelled(old: Checkpoint, text: TextTower | NoText, config: RelabelConfig) -> Checkpoint:
    """Replace the class rows; the calibration, fitted for the old ones, goes.

    Raises:
        ValueError: no text tower, or one that did not embed the old names.
    """
    if isinstance(text, NoText):
        raise ValueError(f"encoder {text.name!r} has no text tower to embed names with")
    templates = config.template or old.templates or (DEFAULT_TEMPLATE,)
    if not config.template:
        names, rows = old.class_names[:PROBED], old.tensors["class_embeddings"][:PROBED]
        again = text.class_embeddings(names, templates)
        if again.shape != rows.shape or F.cosine_similarity(again, rows).min() < SMALLEST_COSINE:
            raise ValueError(
                f"{config.file} has other rows than its names have in {' | '.join(templates)!r}: "
                "other texts or a text tower of another kind; give --template, or --model"
            )
    rows = text.class_embeddings(config.classes, templates)
    return replace(
        old,
        tensors=old.tensors | {"class_embeddings": rows},
        class_names=config.classes,
        calibration=old.calibration.without,
        templates=templates,
    )


def run(path: Path, encoder: FrozenEncoder) -> Artifact | None:
    """Open a file, a checkpoint with this encoder; none where bf16 cannot run."""
    if path.suffix == ".onnx":
        return opened(path)
    checkpoint = load_checkpoint(path)
    return TorchArtifact.of(checkpoint, checkpoint.model(encoder), torch.device("cpu"))


def verify(
    before: Artifact | None,
    after: Artifact | None,
    new: Checkpoint,
    batches: Sequence[Tensor],
    *,
    bias: float = 0.0,
) -> dict[str, Any]:
    """Compare logits with the old file's embeddings times the new rows, and all else with its own.

    Args:
        before: the old file; none where it cannot be run here.
        after: the new one.
        new: its rows.
        batches: images (B, 3, S, S) uint8.
        bias: of the encoder, added to every logit.

    Raises:
        VerificationError: they differ by more than rounding.
    """
    if before is None or after is None:
        reason = "no ONNX Runtime here runs bf16; structure was checked"
        return {"verified": False, "reason": reason, "max_abs_error": None}
    rows, worst, moved = scaled_rows(new), 0.0, 0.0
    for pixels in batches:
        expected, got = before(pixels), after(pixels)
        logits = expected.embedding @ rows.t() + bias
        moved = max(moved, (expected.embedding - got.embedding).abs().max().item())
        worst = max(worst, (logits - got.logits).abs().max().item())
        if not torch.equal(expected.mask.int(), got.mask.int()):
            raise VerificationError("the file was not written: its masks are other ones")
    largest = LARGEST_ERROR_FP32 * new.tensors["logit_scale"].item()
    if not (moved <= LARGEST_ERROR_FP32 and worst <= largest):
        raise VerificationError(
            f"the file was not written: logits are off by {worst:.1e}, embeddings by {moved:.1e}"
        )
    return {"verified": True, "reason": "", "max_abs_error": worst}


def summary(result: dict[str, Any]) -> str:
    """Say what the file now tells apart."""
    checked = "verified" if result["verified"] else f"not verified: {result['reason']}"
    return (
        f"{result['path']}: {result['classes']} classes in place of {result['classes_before']}, "
        f"{checked}; probabilities are uncalibrated, for the temperature was of the old classes"
    )


if __name__ == "__main__":
    main()
