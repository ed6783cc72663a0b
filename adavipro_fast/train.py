"""Train a prompt for a frozen CLIP encoder: `python -m adavipro_fast.train`.

Without arguments it trains the embedded demo.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adavipro_fast import cli
from adavipro_fast.method.config import HeadKind, PromptConfig
from adavipro_fast.training.config import TrainConfig, recipe
from adavipro_fast.training.group import leading
from adavipro_fast.training.run import resume_run, start_run


@dataclass(frozen=True)
class First:
    """Flags that the defaults of the others depend on."""

    recipe: Literal["paper", "best"] = "best"
    prompt_size: int = PromptConfig.prompt_size
    head: HeadKind = "text"
    resume: Path | None = None


def main() -> None:
    """Parse, train, print."""
    cli.run(command, summary, quiet=not leading())


def command() -> dict[str, Any]:
    """Start the run that the command line describes, or resume it."""
    resume = cli.parse_some(First).resume
    if resume is not None:
        return resume_run(resume, lambda before: cli.parse(TrainConfig, before))
    return start_run(parse())


def parse() -> TrainConfig:
    """Parse the command line of a new run."""
    first = cli.parse_some(First)
    return cli.parse(TrainConfig, recipe(first.recipe, first.prompt_size, first.head))


def summary(result: dict[str, Any]) -> str:
    """Format the accuracy, the files and the next commands."""
    path, before = result["checkpoint"], "no zero-shot without a text encoder"
    reached = f"validation top-1 {result['val_top1']:.1f} % (no test split"
    if result["test_top1"] is not None:
        if result["zero_shot_top1"] is not None:
            before = f"zero-shot {result['zero_shot_top1']:.1f} %"
        reached = f"test top-1 {result['test_top1']:.1f} % ({before}"
    return (
        f"{reached}), "
        f"{result['trainable_params']} trained parameters, {result['seconds']:.0f} s\n"
        f"kept:    {path}; pictures masks.png and curves.png beside it\n"
        f"measure: adavipro-evaluate {path}\n"
        f"export:  adavipro-to-onnx {path} --output {Path(path).with_suffix('.onnx')} "
        "--input uint8"
    )


if __name__ == "__main__":
    main()
