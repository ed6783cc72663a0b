"""Publish a checkpoint on the Hugging Face Hub: `python -m adavipro_fast.push FILE OWNER/NAME`.

The file is uploaded unchanged, with a model card and the run's pictures; log in with HF_TOKEN or
`hf auth login`.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import tyro
from huggingface_hub.utils.tqdm import disable_progress_bars

from adavipro_fast import cli
from adavipro_fast.data.sets import NAMED
from adavipro_fast.files import hub
from adavipro_fast.files.card import PICTURES, Run, model_card, source_of
from adavipro_fast.files.checkpoint import Checkpoint, load_checkpoint
from adavipro_fast.training.config import read_stored
from adavipro_fast.training.state import read_state


@dataclass(frozen=True)
class PushConfig:
    """Upload a checkpoint to the Hugging Face Hub, with a model card."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """checkpoint.safetensors; the accuracy on the card comes from last.safetensors beside it"""
    repository: Annotated[str, tyro.conf.Positional]
    """owner/name on the Hub; created if it does not exist"""
    private: bool = False
    """make the repository private"""
    license: str | None = None
    """licence of the trained part, such as apache-2.0 (default: none stated)"""


def main() -> None:
    """Parse, push, print."""
    if not sys.stderr.isatty():
        disable_progress_bars()
    cli.main(PushConfig, command, summary)


def command(config: PushConfig) -> dict[str, Any]:
    """Upload file, card and pictures in one commit.

    Raises:
        OSError: the file does not exist or cannot be uploaded; the message has the reason.
        ValueError: the file is not a checkpoint of ours, or the repository's name is invalid.
    """
    hub.check_repository(config.repository)
    checkpoint = load_checkpoint(config.checkpoint)
    run = run_of(config.checkpoint, checkpoint)
    if run is None:
        cli.warn("there is no finished run beside the checkpoint, so the card states no accuracy")
    if flags := source_of(checkpoint.encoder).flags:
        names = " and ".join(f"--{name}" for name, _ in flags)
        cli.warn(
            f"the encoder is a local file ({checkpoint.encoder.name}, "
            f"{checkpoint.encoder.pretrained or 'no tag'}), and its path is stored in the "
            f"checkpoint; other users need that encoder and {names}"
        )
    pictures = [name for name in PICTURES if config.checkpoint.with_name(name).is_file()]
    with TemporaryDirectory() as name:
        folder = Path(name)
        # A copy of the file, not its parsed content written again.
        shutil.copyfile(config.checkpoint, folder / hub.CHECKPOINT)
        for picture in pictures:
            shutil.copyfile(config.checkpoint.with_name(picture), folder / picture)
        card = model_card(
            checkpoint,
            repository=config.repository,
            run=run,
            license=config.license,
            pictures=pictures,
        )
        card.save(folder / "README.md")
        files = sorted(path.name for path in folder.iterdir())
        commit = hub.send(folder, config.repository, private=config.private)
    return {
        "repository": config.repository,
        "address": hub.SCHEME + config.repository,
        "commit": commit.oid,
        "url": str(commit.repo_url),
        "files": files,
    }


def run_of(path: Path, checkpoint: Checkpoint) -> Run | None:
    """Return the record of the run that wrote a checkpoint; None if missing or unfinished."""
    beside = path.with_name("last.safetensors")
    if not beside.is_file():
        return None
    _, state = read_state(beside)
    config, figures = read_stored(state.settings, beside), state.progress.result
    same = (
        config.prompt.method == checkpoint.config.method
        and state.identity.get("encoder") == checkpoint.encoder.sha256
        and Path(figures.get("checkpoint", "")).name == path.name
    )
    if not same:
        return None
    data = config.data.data if config.data.data in NAMED else None
    return Run(data, state.progress.images, config.optimiser.seed, figures)


def summary(result: dict[str, Any]) -> str:
    """Format the repository's address, and how others use it."""
    return (
        f"pushed: {', '.join(result['files'])} to {result['url']}\n"
        f"use:    adavipro-predict {result['address']} IMAGE"
    )


if __name__ == "__main__":
    main()
