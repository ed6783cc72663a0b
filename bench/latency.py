"""The prompt's cost at inference: latency in every runtime, relative to the encoder alone.

    python bench/latency.py --batch 1 --batch 16 --json FILE

Rows are interleaved in one process, after each has passed a check of its answers. A row's ratio is
relative to the encoder alone in the same runtime (for a graph that resizes, to the file that does
not), with its 95 % interval; `onnx_baseline_again` times that encoder a second time and shows the
noise. `to_other` compares other ways to run the model with our fastest row with a prompt in the
same precision, and int8 with fp32. There are three timing contracts: `encoder` and `prompt +
encoder` start from the graph's input in memory, `pipeline` starts from JPEG bytes and ends with
class names.
"""

import statistics
import tempfile
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import tyro

from adavipro_fast import cli
from adavipro_fast.device import full_fp32
from adavipro_fast.errors import VerificationError
from adavipro_fast.method.config import Precision
from lib.bound import bound_rows
from lib.deployed import deployed_rows
from lib.machine import peak_device_mib
from lib.peers import peer_rows
from lib.rows import chosen_by, engine_rows, file_rows, pipeline_rows, torch_rows
from lib.subject import Row, Subject
from lib.table import Append, Json, Plot, Rows, draw
from lib.timing import compared, percentiles, until_steady

QUICK_S = 10.0


@dataclass(frozen=True)
class LatencyConfig:
    """Time inference with and without the prompt in every runtime at hand."""

    model: str = "ViT-B-32"
    """open_clip name (random weights without --pretrained), local-dir:PATH, or demo"""
    pretrained: str = ""
    """open_clip tag or path of the weights"""
    batch: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """images per call; repeatable (default: 1)"""
    precision: Precision = "fp32"
    """of the encoder"""
    seconds: float = 180.0
    """longest time to measure a batch size for; it ends earlier when medians are within 2 %"""
    quick: bool = False
    """under a minute: ONNX Runtime and PyTorch in fp32 only, nothing compiled, fewer calls"""
    rows: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """measure the rows whose names begin so; repeatable (default: all)"""
    folder: Path | None = None
    """keep exported files and compiled packages here, and use those that are there"""
    build: bool = False
    """export, compile and check, and time nothing"""
    keep_going: bool = False
    """time the other rows where one fails or gives a wrong answer; exit 1 at the end if wrong"""
    device: cli.Device = "auto"
    json: Json = None
    append: Append = False
    plot: Plot = None


@full_fp32()
def command(config: LatencyConfig) -> dict[str, Any]:
    """Measure all rows at all batch sizes.

    Raises:
        VerificationError: a row's answers are wrong; nothing is timed.
    """
    sizes = config.batch or (1,)
    if min(sizes) < 1:
        raise ValueError(f"batch {min(sizes)} is below 1")
    subject = Subject(
        config.model,
        config.pretrained,
        images=max(sizes),
        precision=config.precision,
        device=config.device,
    )
    rows = Rows(subject.device, config.json, append=config.append)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = (config.folder or Path(name)) / config.precision
        folder.mkdir(parents=True, exist_ok=True)
        for count in sizes:
            # In a function, which frees a batch size's models before the next one's are built.
            rows += measured(subject, count, folder, config, wrong)
    if config.plot is not None:
        label = "median latency, ms per image; ratio to the encoder alone in the same runtime"
        draw(rows, config.plot, value="ms_per_image", label=label)
    title = f"latency: {config.model}, {config.precision}, {subject.device}"
    hidden = ("contract", "base", "calls", "ms_per_image", "to_other_low", "to_other_high")
    result = rows.published(title, (*hidden, "precision", "model", "cosine", "note"))
    if wrong:
        raise VerificationError("; ".join(wrong))
    return result


def measured(
    subject: Subject, count: int, folder: Path, config: LatencyConfig, wrong: list[str]
) -> list[dict[str, Any]]:
    """Build, check and time the rows of a batch size."""
    built = checked_rows(subject, count, folder, config, wrong)
    if config.build:
        return [{"name": r.name, "batch": count, "build_s": r.build_s} for r in built]
    return time_rows(subject, built, count, QUICK_S if config.quick else config.seconds)


def built_rows(subject: Subject, count: int, folder: Path, config: LatencyConfig) -> list[Row]:
    """Build the rows that were chosen."""
    chosen = chosen_by(config.rows)

    def wanted(*prefixes: str) -> bool:
        """Report whether rows with these prefixes may be chosen, since building takes minutes."""
        pairs = product(config.rows, prefixes)
        return not config.rows or any(a.startswith(b) or b.startswith(a) for a, b in pairs)

    quick, built = config.quick, []
    if wanted("encoder", "paper", "collapsed", "fused", "compiled", "open_clip", "transformers"):
        built += torch_rows(subject, count, quick=quick)
    built += deployed_rows(subject, count, folder, quick=quick, chosen=chosen)
    built += file_rows(subject, count, folder, quick=quick, chosen=chosen)
    built += bound_rows(subject, count, folder, quick=quick, chosen=chosen)
    if wanted("onnx_plain", "onnx_paper", "openvino_open_clip"):
        built += peer_rows(subject, count, folder, quick=quick)
    if wanted("pipeline"):
        built += pipeline_rows(subject, count, folder, quick=quick)
    if wanted("tensorrt"):
        built += engine_rows(subject, count, folder)
    return [row for row in built if chosen(row.name)]


def checked_rows(
    subject: Subject, count: int, folder: Path, config: LatencyConfig, wrong: list[str]
) -> list[Row]:
    """Build rows and check their answers; with --keep-going, add wrong ones to `wrong`."""
    result = []
    for row in built_rows(subject, count, folder, config):
        try:
            result.append(subject.checked(row, count))
        except Exception as error:
            if not config.keep_going:
                raise
            reason = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:600]}"
            result.append(replace(row, work=None, skipped=reason))
            if isinstance(error, VerificationError):
                wrong.append(str(error))
    return result


def time_rows(
    subject: Subject, rows: list[Row], count: int, seconds: float
) -> list[dict[str, Any]]:
    """Time the checked rows in turn."""
    works = {row.name: row.work for row in rows if row.work is not None}
    bases = {row.name: row.base for row in rows if row.name in works and row.base in works}
    times = until_steady(works, subject.device, seconds=seconds, bases=bases)
    ours = [
        row.name
        for row in rows
        if row.contract == "prompt + encoder" and not (row.peer or row.int8) and row.name in works
    ]
    fastest = min(ours, key=lambda name: statistics.median(times[name]), default="")
    result = []
    for row in rows:
        about = {"model": subject.model.encoder.name, "precision": subject.precision}
        figures: dict[str, Any] = {"name": row.name, "batch": count, **about}
        if row.name not in times:
            result.append(figures | {"skipped": row.skipped})
            continue
        figures |= {"contract": row.contract, **percentiles(times[row.name])}
        figures |= {"ms_per_image": figures["p50_ms"] / count}
        if row.name in bases:
            figures |= {"base": row.base, **compared(times[row.name], times[row.base])}
        other = fastest if row.peer else row.other
        if other in times:
            to_other = compared(times[row.name], times[other])
            figures |= {key.replace("ratio", "to_other"): value for key, value in to_other.items()}
            figures |= {"other": other}
        figures |= {"build_s": row.build_s, "cosine": row.cosine}
        figures |= {"note": row.note} if row.note else {}
        if subject.device.type == "cuda":
            figures |= {"peak_device_mib": peak_device_mib(works[row.name], subject.device)}
        result.append(figures)
    return result


def main() -> None:
    """Parse, check, measure, print."""
    cli.main(LatencyConfig, command)


if __name__ == "__main__":
    main()
