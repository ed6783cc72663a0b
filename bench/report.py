"""Write the measured figures into README.md and docs/pages, and the charts: `bench/report.py`.

Between `<!-- report: NAME -->` and `<!-- end -->` a page holds what `SECTIONS[NAME]` makes of the
files under bench/results; nothing there is written by hand.
"""

import csv
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from measure import ROOT, draw

from adavipro_fast import cli
from adavipro_fast.files.whole import write_whole

DOCS = ROOT / "docs" / "pages"
PAGES = (ROOT / "README.md", DOCS / "numbers.md", DOCS / "evidence.md")
RESULTS = ROOT / "bench" / "results"
# Measured elsewhere, shown in the docs: mkdocs serves what lies beside the pages.
FIGURE2 = RESULTS / "paper" / "figure2.png"
CPU = RESULTS / "cpu-2-cores"
SECTION = re.compile(r"(<!-- report: (\w+) -->\n).*?(\n?<!-- end -->)", re.DOTALL)
Row = dict[str, Any]


@dataclass(frozen=True)
class ReportConfig:
    """Write the figures of bench/results into README.md and docs/pages and redraw the charts."""


@cache
def rows(name: str) -> tuple[Row, ...]:
    """Read the rows of a file under the results."""
    return tuple(json.loads((CPU / f"{name}.json").read_text())["rows"])


def named(name: str) -> dict[str, Row]:
    """Return the measured rows of a file by name."""
    return {row["name"]: row for row in rows(name) if "skipped" not in row}


def table(head: list[str], body: list[list[str]]) -> str:
    """Write a Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def headline() -> str:
    """Say what comes first in README."""
    demo = json.loads((CPU / "demo.json").read_text())
    step = named("training")["adavipro"]["ratio_to_vp"]
    folded = latency("latency", "onnx_folded", 16)["ratio"]
    return (
        f"On the embedded demo it lifts the frozen encoder's top-1 from "
        f"{demo['zero_shot_top1']:.1f} to {demo['test_top1']:.1f} % in {demo['seconds']:.0f} s on "
        f"2 CPU cores. A training step costs {step:.2f} times that of a fixed prompt (ViT-B-32, "
        f"bf16, CPU), and the exported encoder {folded:.2f} times the one without a prompt "
        "(ViT-B-32, fp32, ONNX Runtime, batch 16, CPU)."
    )


def latency(file: str, name: str, batch: int) -> Row:
    """Return a latency row."""
    return next(
        row
        for row in rows(file)
        if row["name"] == name and row["batch"] == batch and "skipped" not in row
    )


def training() -> str:
    """Tabulate the training step and its parts."""
    parts = ("data_ms", "prompt_ms", "encoder_ms", "backward_ms", "optimiser_ms")
    body = [
        [
            f"`{row['name']}`",
            f"{row['step_ms'] / 1e3:.2f} s",
            f"{row['ratio_to_vp']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})",
            *(f"{row[part]:.0f}" for part in parts),
            f"{row['peak_mib']:.0f} MiB",
        ]
        for row in rows("training")
        if "step_ms" in row
    ]
    titles = ["data", "prompt", "encoder", "backward", "optimiser"]
    head = ["row", "step", "to vp (95 %)", *(f"{t}, ms" for t in titles), "peak memory"]
    return table(head, body)


def epochs() -> str:
    """Say how fast images come."""
    found = named("training")
    cache_ratio = found["loader_cache"]["ratio_to_decode"]
    first, cached = found["epoch_first"], found["epoch_cached"]
    text = (
        f"The loader alone gives {found['loader_decode']['images_per_s']:.0f} images/s decoding "
        f"JPEG files and {found['loader_cache']['images_per_s']:.0f} from the cache "
        f"({cache_ratio:.0f} times); whole epochs run at {first['images_per_s']:.1f} (first, "
        f"filling the cache) and {cached['images_per_s']:.1f} images/s "
        f"({cached['ratio_to_first']:.2f} times): on a CPU the encoder is what takes the time."
    )
    reached = [found.get(f"to_accuracy_{method}") for method in ("vp", "adavipro")]
    if all(reached):
        vp, adavipro = (row["seconds"] for row in reached if row)
        goal = reached[0]["val_top1"] if reached[0] else 0
        text += (
            f" {goal:.0f} % validation top-1 on the demo: {vp:.0f} s of training with `vp`, "
            f"{adavipro:.0f} s with `adavipro`."
        )
    return text


def scaling() -> str:
    """Say what a second process brings."""
    one, two = (named("scaling")[name] for name in ("1 process", "2 processes"))
    return (
        f"Two processes with one thread each take {two['ratio']:.2f} times the step of one with "
        f"two threads (`bench/scaling.py`; the demo, 64 images a step in all, "
        f"{one['step_ms']:.0f} and {two['step_ms']:.0f} ms); the message of a step takes "
        f"{two['message_ms']:.1f} ms, {100 * two['message_share']:.2f} % of it."
    )


def costs() -> str:
    """Tabulate the latency rows, batch 1 beside batch 16."""
    body = []
    for row in rows("latency"):
        if row["batch"] != 1 or "skipped" in row:
            continue
        line = [f"`{row['name']}`", *figures(row)]
        wide = [r for r in rows("latency") if r["name"] == row["name"] and r["batch"] == 16]
        line += figures(wide[0]) if wide and "skipped" not in wide[0] else ["", ""]
        body.append([*line, f"`{row['base']}`"])
    head = ["row", "batch 1", "ratio (95 %)", "batch 16", "ratio (95 %)", "ratio to"]
    return table(head, body) + "\n\n" + losses()


def losses() -> str:
    """Say what is faster than we are, at batch 16."""

    def times(name: str, base: str) -> str:
        both = (latency("latency", row, 16)["p50_ms"] for row in (name, base))
        return f"{next(both) / next(both):.2f} times"

    return (
        "Where others are faster, at batch 16: OpenVINO takes "
        f"{times('openvino_folded', 'onnx_folded')} ONNX Runtime's time on the same folded file, "
        "compiled transformers "
        f"{times('transformers_compiled', 'encoder_compiled')} compiled open_clip's, and compiling "
        f"open_clip takes {times('encoder_compiled', 'encoder_eager')} its eager time."
    )


def figures(row: Row) -> list[str]:
    """Write a latency and its ratio."""
    return [
        f"{row['p50_ms']:.1f} ms",
        f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})",
    ]


def curve() -> str:
    """Tabulate images per second over batch sizes and encoders."""
    body = [
        [
            row["model"],
            str(row["side"]),
            str(row["batch"]),
            f"{row['encoder_images_per_s']:.1f}",
            f"{row['images_per_s']:.1f}",
            f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})",
        ]
        for row in rows("throughput")
        if "ratio" in row
    ]
    found = named("throughput")
    steady = next(row for name, row in found.items() if name.startswith("sustained"))
    head = ["encoder", "side", "batch", "images/s without", "with the prompt", "time ratio (95 %)"]
    return table(head, body) + (
        f"\n\nMore than {found['saturation']['batch']} images a call bring no more here; "
        f"{steady['name']} gives {steady['images_per_s']:.1f} images/s, the last third "
        f"{steady['last_third_to_first']:.2f} times as fast as the first. Decoding JPEG files and "
        f"resizing feeds {found['loader_decode']['images_per_s']:.0f} images/s."
    )


def accuracy() -> str:
    """Tabulate one checkpoint through the backends."""
    body = [
        [
            f"`{row['name']}`",
            f"{row['top1']:.1f}",
            f"{row['top1_agreement']:.1f}",
            f"{100 * row['mask_agreement']:.2f}",
            f"{row['images_per_s']:.1f}",
        ]
        for row in rows("accuracy")
        if "skipped" not in row
    ]
    head = ["backend", "top-1, %", "same answer, %", "same regions, %", "images/s"]
    return table(head, body)


def results() -> str:
    """Tabulate methods beside each other: the demo's means over seeds, and the small sets."""
    methods = ("zero_shot", "vp", "adavipro", "linear_probe", "full_finetune")
    body = []
    for size in (30, 60, 112):
        found = [row for row in rows("runs") if (row["task"], row["prompt_size"]) == ("demo", size)]
        trained = [[row for row in found if row["method"] == m] for m in methods[1:3]]
        cells = [mean(found, "zero_shot_top1"), *(mean(of, "test_top1") for of in trained), "", ""]
        body.append([f"demo, prompt size {size}", *cells])
    with (RESULTS / "paper" / "table1.csv").open() as file:
        table1 = {
            (row["data"], row["line"]): float(row["test_top1"]) for row in csv.DictReader(file)
        }
    body += [
        [data, *(f"{table1[data, method]:.1f}" for method in methods)]
        for data in dict.fromkeys(data for data, _ in table1)
    ]
    head = ["task", "zero-shot", "vp", "adavipro", "linear probe", "full fine-tuning"]
    return table(head, body)


def runs() -> str:
    """Tabulate the training runs: means over seeds."""
    groups: dict[tuple[str, int, str], list[Row]] = defaultdict(list)
    for row in rows("runs"):
        groups[row["task"], row["prompt_size"], row["method"]].append(row)
    body = []
    for task, size in sorted({key[:2] for key in groups}):
        cells = [groups.get((task, size, method), []) for method in ("vp", "adavipro")]
        body.append(
            [task, str(size), mean(cells[0] or cells[1], "zero_shot_top1")]
            + [f"{mean(found, 'test_top1')} ({len(found)})" if found else "–" for found in cells]
            + [
                mean(cells[1], f"mask_{name}", digits=2)
                for name in ("density", "adaptivity", "placement")
            ]
        )
    head = ["task", "prompt size", "zero-shot", "vp (seeds)", "adavipro (seeds)"]
    return table([*head, "density", "adaptivity", "placement"], body)


def evidence() -> str:
    """Tabulate recipe best, its controls and recipe paper: mean and spread over seeds."""
    with (RESULTS / "paper" / "best.csv").open() as file:
        found = list(csv.DictReader(file))
    sets = list(dict.fromkeys(row["data"] for row in found))
    figures = ("mask_density", "mask_adaptivity", "mask_placement")
    # Without training: what every line starts from.
    means = [statistics.mean(top1(found, data, "zero_shot_top1")) for data in sets]
    body = [["zero-shot", *(f"{value:.1f}" for value in means), f"{statistics.mean(means):.1f}"]]
    body[0] += [""] * len(figures)
    lines = {row["line"]: int(row["prompt_size"]) for row in found}
    for line in sorted(lines, key=lambda name: (lines[name], name)):
        of = [row for row in found if row["line"] == line]
        columns = [top1(of, data, "test_top1") for data in sets]
        body.append(
            [line]
            + [f"{statistics.mean(c):.1f} ± {statistics.stdev(c):.1f}" for c in columns]
            + [f"{statistics.mean(map(statistics.mean, columns)):.1f}"]
            + [f"{statistics.mean(float(row[name]) for row in of):.2f}" for name in figures]
        )
    return table(["", *sets, "mean", "density", "adaptivity", "placement"], body)


def top1(found: Sequence[dict[str, str]], data: str, figure: str) -> list[float]:
    """Return a figure of a data set's rows."""
    return [float(row[figure]) for row in found if row["data"] == data]


def mean(found: list[Row], figure: str, digits: int = 1) -> str:
    """Average a figure over runs."""
    if not found:
        return ""
    return f"{statistics.mean(row[figure] for row in found):.{digits}f}"


SECTIONS: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        *(headline, results, training, epochs, scaling, costs, curve, accuracy, runs, evidence),
    )
}


def rendered(text: str) -> str:
    """Fill all sections of a page's text with the figures of the results."""
    return SECTION.sub(lambda m: f"{m[1]}{SECTIONS[m[2]]()}\n{m[3].lstrip()}", text)


def command(config: ReportConfig) -> dict[str, Any]:
    """Rewrite the pages and the chart."""
    changed = []
    for page in PAGES:
        text = page.read_text()
        if (new := rendered(text)) != text:
            changed.append(page.name)
            write_whole(page, new.encode())
    bars = [row for row in rows("latency") if row["batch"] == 1]
    label = "median latency of one image, ms; ratio to the encoder alone in the same runtime"
    chart = DOCS / "latency.svg"
    draw(bars, chart, value="p50_ms", label=label)
    write_whole(DOCS / FIGURE2.name, FIGURE2.read_bytes())
    return {"changed": changed, "chart": str(chart.relative_to(ROOT))}


def main() -> None:
    """Parse, write, print."""
    config = cli.parse(ReportConfig)
    cli.run(lambda: command(config))


if __name__ == "__main__":
    main()
