"""Compare an exported file with its checkpoint: `python export/verify.py CHECKPOINT ARTIFACT`.

Masks must agree in all regions except ties, where Δ is within rounding of 0; ties are counted.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from adavipro_fast import cli
from adavipro_fast.artifact.open import open_artifact
from adavipro_fast.artifact.torch import TorchArtifact
from adavipro_fast.errors import VerificationError, counted
from adavipro_fast.export.comparison import compare, sample_batches


@dataclass(frozen=True)
class VerifyConfig:
    """Compare an exported file with its checkpoint."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """checkpoint.safetensors, run in PyTorch in fp32"""
    artifact: Annotated[Path, tyro.conf.Positional]
    """.onnx or .engine"""
    images: cli.Images = ()
    task: cli.Task = None
    model: cli.Model = None
    pretrained: cli.Pretrained = None
    device: cli.Device = "auto"
    runtime: cli.Runtime = "auto"


def main() -> None:
    """Parse, compare, print."""
    cli.main(VerifyConfig, command, summary)


def command(config: VerifyConfig) -> dict[str, Any]:
    """Compare and return the figures.

    Raises:
        VerificationError: the outputs differ by more than rounding.
    """
    reference = TorchArtifact.open(
        config.checkpoint, model=config.model, pretrained=config.pretrained, device="cpu"
    )
    candidate = open_artifact(
        config.artifact, device=config.device, runtime=config.runtime, task=config.task
    )
    candidate.about.check_one_task(config.artifact)
    batches = sample_batches(reference.about.preprocess, config.images)
    comparison = compare(reference.model, reference, candidate, batches)
    if complaint := comparison.complaint(candidate.about.precision):
        raise VerificationError(f"{config.artifact} does not match its checkpoint: {complaint}")
    return {"backend": candidate.backend, "provider": candidate.provider, **vars(comparison)}


def summary(result: dict[str, Any]) -> str:
    """Format the differences."""
    ties = result["mask_ties"]
    except_ties = f" except {counted(ties, 'tie')}" if ties else ""
    return (
        f"the same: embeddings within {result['max_abs_error']:.1e}, worst cosine "
        f"{result['min_cosine']:.6f}, top-1 of {result['top1_agreement']:.1f} % of the images, "
        f"masks equal{except_ties}"
    )


if __name__ == "__main__":
    main()
