"""Compare methods on your data within a time budget: `python -m adavipro_fast.compare`.

Tries zero-shot, a linear probe, prompts with either head, and full fine-tuning on your data, and
keeps the winner's checkpoint, ready to export.
"""

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from adavipro_fast import cli, pictures
from adavipro_fast.cores import use_threads
from adavipro_fast.files.whole import write_whole
from adavipro_fast.method.config import PROMPTED, HeadKind, Method, PromptConfig
from adavipro_fast.method.timm_encoder import PREFIX
from adavipro_fast.training.config import TrainConfig, recipe
from adavipro_fast.training.page import page
from adavipro_fast.training.run_folder import held, make_folder
from adavipro_fast.training.search import Candidate, Search

MINUTES, DEMO_MINUTES = 30.0, 2.0
FLAGS = "flags.json"
REFERENCES: tuple[tuple[Method, HeadKind], ...] = (
    ("zero_shot", "text"),
    ("linear_probe", "linear"),
)


@dataclass(frozen=True)
class Place:
    """The folder of a search: a new one, or one to resume."""

    output: Path | None = None
    resume: Path | None = None


@dataclass(frozen=True)
class Given:
    """Flags that restrict the candidates."""

    method: Method | None = None
    head: HeadKind | None = None
    prompt_size: int | None = None
    margin: int | None = None
    epochs: int | None = None

    def allows(self, method: Method, head: HeadKind) -> bool:
        """Report whether the flags allow a method and a head."""
        margin = not self.margin or method in PROMPTED
        return margin and self.method in (None, method) and self.head in (None, head)


@dataclass(frozen=True)
class Proposal:
    """A candidate to try if the flags allow it."""

    method: Method
    head: HeadKind
    prompt_size: int = PromptConfig.prompt_size
    margin: int = 0
    slowed: float = 1.0
    """factor on the learning rates"""
    ending: str = ""
    """suffix of the candidate's name"""

    def under(self, given: Given) -> TrainConfig:
        """Return the run's default configuration, with the given flags applied."""
        size, margin = self.prompt_size, self.margin
        if self.method in PROMPTED:
            size = size if given.prompt_size is None else given.prompt_size
            margin = margin if given.margin is None else given.margin
        start = recipe("best", size, self.head)
        prompt = replace(start.prompt, method=self.method, head=self.head, margin=margin)
        optimiser = replace(
            start.optimiser,
            lr_prompt=self.slowed * start.optimiser.lr_prompt,
            lr_head=self.slowed * start.optimiser.lr_head,
        )
        return replace(start, prompt=prompt, optimiser=optimiser)


# The most promising first, since a short budget tries only the first ones.
PROPOSALS = (
    Proposal("adavipro", "linear"),
    Proposal("vp", "linear"),
    Proposal("adavipro", "linear", slowed=0.1, ending="-gentle"),
    Proposal("adavipro", "text"),
    Proposal("adavipro", "text", margin=30),
    Proposal("vp", "text"),
    Proposal("adavipro", "linear", prompt_size=112),
    Proposal("vp", "linear", prompt_size=112),
    Proposal("full_finetune", "text"),
)


@dataclass(frozen=True)
class CompareConfig:
    """Compare methods on your data within a time budget; flags that you set are held fixed."""

    help_first: ClassVar[tuple[str, ...]] = (
        "minutes",
        "data",
        "model",
        "pretrained",
        "method",
        "head",
        "output",
        "resume",
        "device",
    )

    minutes: float | None = None
    """time budget in minutes (default: 30; 2 for the demo)"""
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.minutes is not None and not 0 < self.minutes < 1e6:
            raise ValueError(f"minutes is {self.minutes}; use a number above 0")


def main() -> None:
    """Parse, compare, print."""
    cli.run(command, summary)


def command() -> dict[str, Any]:
    """Search in a folder that this process locks, and write the results."""
    place = cli.parse_some(Place)
    flags = sys.argv[1:] if place.resume is None else kept_flags(place.resume)
    config = cli.parse(CompareConfig, CompareConfig(train=recipe("best")), flags)
    use_threads(config.train.threads)
    if config.train.recipe != "best":
        raise ValueError("compare only supports the default recipe; leave --recipe out")
    folder, made = place.resume or place.output, list[Path]()
    if folder is None:
        folder, made = make_folder(f"{Path(config.train.data.data).name}-compare")
    with ExitStack() as stack:
        stack.enter_context(held(folder, made))
        if place.resume is None:
            keep_flags(folder)
        minutes = config.minutes or (DEMO_MINUTES if config.train.data.data == "demo" else MINUTES)
        epochs = cli.parse_some(Given, flags).epochs
        tried = candidates(config.train, folder, flags)
        search = Search(tried, 60 * minutes, folder, epochs)
        result = search.run()
        assert search.finalist is not None
        write_whole(folder / "compare.json", (json.dumps(result, indent=1) + "\n").encode())
        write_whole(folder / "compare.md", markdown(result).encode())
        drawn = pictures.comparison(result["rows"], result["winner"])
        pictures.save(drawn, folder / "compare.png")
        write_whole(folder / "compare.html", page(result, search.finalist).encode())
    return result | {"folder": str(folder)}


def keep_flags(folder: Path) -> None:
    """Save a new search's flags.

    Raises:
        ValueError: the folder already contains a search.
    """
    path = folder / FLAGS
    if path.exists():
        raise ValueError(f"{folder} already contains a search; continue it with --resume {folder}")
    write_whole(path, json.dumps(sys.argv[1:]).encode())


def kept_flags(folder: Path) -> list[str]:
    """Return the saved flags of a search.

    Raises:
        FileNotFoundError: the folder contains no search.
        ValueError: other flags are given with --resume.
    """
    path = folder / FLAGS
    if not path.exists():
        raise FileNotFoundError(f"{folder} contains no search; start one with --output {folder}")
    if sys.argv[1:] not in (["--resume", str(folder)], [f"--resume={folder}"]):
        raise ValueError("--resume uses the flags of the search; leave all other flags out")
    return list(json.loads(path.read_text()))


def candidates(base: TrainConfig, folder: Path, flags: Sequence[str]) -> list[Candidate]:
    """List the candidates that the given flags allow."""
    given = cli.parse_some(Given, flags)
    listed = []
    # An encoder without a text model cannot embed class names.
    mute = base.model.startswith(PREFIX) and base.class_embeddings is None
    for method, head in REFERENCES:
        if mute and head == "text":
            continue
        prompt = PromptConfig(method=method, region_size=base.prompt.region_size)
        eligible = given.method in (None, method) and given.head in (None, head)
        listed.append(Candidate(method, replace(base, prompt=prompt), eligible))
    for proposal in PROPOSALS:
        if given.allows(proposal.method, proposal.head) and not (mute and proposal.head == "text"):
            start = proposal.under(given)
            config = cli.parse(CompareConfig, CompareConfig(train=start), flags).train
            listed.append(Candidate(name_of(config, proposal.ending), config))
    return in_folders(listed, folder)


def name_of(config: TrainConfig, ending: str) -> str:
    """Name a candidate by what distinguishes it from the others."""
    prompt = config.prompt
    parts: list[str] = [prompt.method, prompt.head]
    if prompt.method in PROMPTED:
        parts.append(str(prompt.prompt_size))
    if prompt.margin:
        parts.append(f"margin-{prompt.margin}")
    return "-".join(parts) + ending


def in_folders(listed: Sequence[Candidate], folder: Path) -> list[Candidate]:
    """Give each candidate a folder; drop those that the flags made equal to another."""
    unique: dict[str, Candidate] = {}
    for candidate in listed:
        config = replace(candidate.config, output=None, resume=None)
        key = json.dumps(asdict(config), default=str, sort_keys=True)
        own = replace(config, output=folder / candidate.name)
        unique.setdefault(key, replace(candidate, config=own))
    return list(unique.values())


def markdown(result: dict[str, Any]) -> str:
    """Format a search's result as a Markdown table."""
    lines = [
        "| candidate | epochs | validation top-1 | test top-1 | trained parameters | file, kB "
        "| seconds | inference |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(result["rows"], key=lambda row: -row["val_top1"]):
        test = "" if row["test_top1"] is None else f"{row['test_top1']:.1f} ± {row['test_se']:.1f}"
        ratio = "" if row["inference_ratio"] is None else f"{row['inference_ratio']:.2f}"
        name = f"**{row['name']}**" if row["name"] == result["winner"] else row["name"]
        lines.append(
            f"| {name} | {row['epochs']} | {row['val_top1']:.1f} ± {row['val_se']:.1f} | {test} "
            f"| {row['trainable_params']:,} | {row['bytes'] / 1e3:.0f} | {row['seconds']:.0f} "
            f"| {ratio} |"
        )
    lines += [
        "",
        f"Winner: {result['winner']}, {result['rule']}. The test split did not influence the "
        "choice; it was read for the winner, the best candidate and the two references. "
        "Inference: time relative to the encoder alone in PyTorch, before a prompt is folded.",
    ]
    return "\n".join(lines) + "\n"


def summary(result: dict[str, Any]) -> str:
    """Format the table, the winner and the next command."""
    shown = sorted(result["rows"], key=lambda row: -row["val_top1"])
    table = [f"{'candidate':<32} {'val':>6} {'test':>6} {'params':>11} {'seconds':>8}"]
    for row in shown:
        test = "" if row["test_top1"] is None else f"{row['test_top1']:.1f}"
        table.append(
            f"{row['name']:<32} {row['val_top1']:>6.1f} {test:>6} {row['trainable_params']:>11,} "
            f"{row['seconds']:>8.0f}"
        )
    path = result["checkpoint"]
    return "\n".join(
        [
            *table,
            f"winner: {result['winner']}, {result['rule']}",
            f"kept:   {path}; {result['folder']}/compare.html, compare.md and compare.png",
            f"export: adavipro-to-onnx {path} --output model.onnx --input uint8",
        ]
    )


if __name__ == "__main__":
    main()
