"""What the prompt costs at inference: latency of every runtime, beside its encoder alone.

    python bench/latency.py --batch 1 --batch 16 --json FILE

Rows are interleaved in one process, each only after it gave the right answer. A row's ratio is to
the encoder alone in the same runtime (of a resize in the graph, to the file without), with its 95 %
interval; `onnx_baseline_again` is that encoder a second time and shows the noise. `to_other`
compares what users would run instead with the fastest row of ours with a prompt in the same
precision, and int8 with fp32. Three timing contracts: `encoder` and `prompt + encoder` start from
the graph's input in memory, `pipeline` starts from JPEG bytes and ends with class names.
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from adavipro_fast import cli
from adavipro_fast.device import full_fp32
from adavipro_fast.method.config import Precision
from lib.machine import peak_device_mib
from lib.peers import peer_rows
from lib.rows import engine_rows, file_rows, pipeline_rows, torch_rows
from lib.subject import Row, Subject
from lib.table import Json, Plot, draw, publish
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
    device: cli.Device = "auto"
    json: Json = None
    plot: Plot = None


@full_fp32()
def command(config: LatencyConfig) -> dict[str, Any]:
    """Measure all rows at all batch sizes.

    Raises:
        VerificationError: a row computes something else; nothing is timed.
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
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in sizes:
            built = torch_rows(subject, count, quick=config.quick)
            for build in (file_rows, peer_rows, pipeline_rows):
                built += build(subject, count, folder, quick=config.quick)
            built += engine_rows(subject, count, folder)
            seconds = QUICK_S if config.quick else config.seconds
            rows += time_rows(subject, built, count, seconds)
    if config.plot is not None:
        label = "median latency, ms per image; ratio to the encoder alone in the same runtime"
        draw(rows, config.plot, value="ms_per_image", label=label)
    title = f"latency: {config.model}, {config.precision}, {subject.device}"
    hidden = ("contract", "base", "calls", "ms_per_image", "to_other_low", "to_other_high")
    return publish(rows, subject.device, config.json, title, hidden)


def time_rows(
    subject: Subject, rows: list[Row], count: int, seconds: float
) -> list[dict[str, Any]]:
    """Check every row, then time all of them in turn."""
    rows = [subject.checked(row, count) for row in rows]
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
        figures: dict[str, Any] = {"name": row.name, "batch": count}
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
        figures |= {"build_s": row.build_s}
        if subject.device.type == "cuda":
            figures |= {"peak_device_mib": peak_device_mib(works[row.name], subject.device)}
        result.append(figures)
    return result


def main() -> None:
    """Parse, check, measure, print."""
    cli.main(LatencyConfig, command)


if __name__ == "__main__":
    main()
