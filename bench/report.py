"""Write the measured figures into README.md and docs/pages, and the charts: `bench/report.py`.

Between `<!-- report: NAME -->` and `<!-- end -->` a page holds what `SECTIONS[NAME]` makes of the
files under bench/results; nothing there is written by hand. `report.toml` holds the sentences.
"""

import csv
import json
import re
import statistics
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from adavipro_fast import cli
from adavipro_fast.files.whole import write_whole
from lib import gpu_tables
from lib.machine import ROOT
from lib.points import over_probe
from lib.table import draw, scatter

DOCS = ROOT / "docs" / "pages"
PAGES = (
    ROOT / "README.md",
    *(DOCS / f"{name}.md" for name in ("numbers", "evidence", "combinations")),
)
RESULTS = ROOT / "bench" / "results"
# Measured elsewhere, shown in the docs: mkdocs serves what lies beside the pages.
PICTURES = (RESULTS / "paper" / "figure2.png", RESULTS / "demo-masks.png")
CPU = RESULTS / "cpu-2-cores"
SECTION = re.compile(r"(<!-- report: (\w+) -->\n).*?(\n?<!-- end -->)", re.DOTALL)
# Files of bench/accuracy.py by their test set.
SETS = {"flowers5": "accuracy", "dtd10": "accuracy-dtd10", "cifar10": "accuracy-cifar10"}
BILLION, DAY_S = 1e9, 86_400
# Of the results in README.
PROMPT_SIZE = 30
RATIO = "{ratio:.3f} ({ratio_low:.3f} to {ratio_high:.3f})"
TO_OTHER = RATIO.replace("ratio", "to_other")
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


def columns(found: Iterable[Row], forms: Mapping[str, str]) -> str:
    """Write a Markdown table with a line for each row: titles and forms of its columns."""
    return table(list(forms), [[form.format_map(row) for form in forms.values()] for row in found])


@cache
def prose() -> dict[str, str]:
    """Read the sentences, each on one line."""
    texts = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    return {name: " ".join(text.split()) for name, text in texts.items()}


def headline() -> str:
    """Say in README what a prompt costs."""
    many, share = named("tasks")["tasks_4096"], named("training")["adavipro"]["ratio_to_vp"]
    folded = latency("latency", "onnx_folded", 16)["ratio"]
    rows = [
        ["training step, relative to a fixed prompt", f"{share:.2f}"],
        ["exported encoder, relative to one without a prompt", f"{folded:.2f}"],
        [f"{many['tasks']:,} tasks in one file, relative to one task", f"{many['ratio']:.2f}"],
    ]
    return table(["time with a prompt (ViT-B/32, 2 CPU cores)", ""], rows)


def tasks() -> str:
    """Tabulate what many tasks in one file cost."""
    forms = {
        "row": "`{name}`",
        "tasks": "{tasks}",
        "p50, ms": "{p50_ms:.0f}",
        "ratio to one task (95 %)": "{ratio:.3f} ({ratio_low:.3f} to {ratio_high:.3f})",
    }
    figures = named("tasks")
    size, whole = figures["tasks_64"]["bytes_a_task"], figures["separate_8"]["bytes_a_task"]
    sizes = {"kb": size / 1e3, "share": 100 * size / whole, "mb": whole / 1e6}
    compared = [row for row in figures.values() if "ratio" in row]
    texts = (
        columns(compared, forms),
        prose()["tasks"].format(**sizes, **figures),
        prose()["tasks_int8"].format(**named("tasks-int8")),
    )
    return "\n\n".join(texts)


def combinations() -> str:
    """Tabulate what runs where, by precision and tasks; inputs that are refused have a note."""
    kinds = {"one": "one", "baked": "several, baked", "data": "several, as data"}
    runtimes = {
        "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "tensorrt-rtx": "TensorRT-RTX",
        "triton": "Triton", "serve": "serve",
    }  # fmt: skip
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows("combinations"):
        groups[row["precision"], row["tasks"]].append(row)
    notes: list[str] = []
    body = []
    for (precision, kind), group in groups.items():
        cells = [cell(group, where, notes) for where in runtimes]
        body.append([precision, kinds[kind], *cells])
    listed = "\n".join(f"{number}. {note}." for number, note in enumerate(notes, 1))
    return table(["precision", "tasks", *runtimes.values()], body) + "\n\n" + listed


def cell(group: list[Row], where: str, notes: list[str]) -> str:
    """Say which inputs of a group work somewhere; reasons are numbered in `notes`."""
    works = [row["input"] for row in group if not row[where]]
    for row in group:
        if row[where] and row[where] not in notes:
            notes.append(row[where])
    numbers = sorted({notes.index(row[where]) + 1 for row in group if row[where]})
    shown = "yes" if len(works) == len(group) else ", ".join(works) or "no"
    return f"{shown} ({', '.join(map(str, numbers))})" if numbers else shown


def serving() -> str:
    """Tabulate what serving costs."""
    forms = {
        "row": "`{name}`",
        "images/s": "{images_per_s:.1f}",
        "share of the runner": "{of_runner:.2f}",
        "p50, ms": "{p50_ms:.0f}",
        "p99, ms": "{p99_ms:.0f}",
        "mean batch": "{mean_batch:.1f}",
    }
    figures = named("serving")
    return columns(list(figures.values()), forms) + "\n\n" + prose()["serving"].format(**figures)


def latency(file: str, name: str, batch: int) -> Row:
    """Return a latency row."""
    return next(
        row
        for row in rows(file)
        if row["name"] == name and row["batch"] == batch and "skipped" not in row
    )


def training() -> str:
    """Tabulate the training step and its parts."""
    steps = [row for row in rows("training") if "step_ms" in row]
    parts = ("data", "prompt", "encoder", "backward", "optimiser")
    forms = {
        "row": "`{name}`",
        "step": "{step_s:.2f} s",
        "ratio to vp (95 %)": "{ratio_to_vp:.2f} ({ratio_low:.2f} to {ratio_high:.2f})",
        **{f"{part}, ms": f"{{{part}_ms:.0f}}" for part in parts},
        "peak memory": "{peak_mib:.0f} MiB",
    }
    return columns((row | {"step_s": row["step_ms"] / 1e3} for row in steps), forms)


def epochs() -> str:
    """Say how fast images come."""
    found = named("training")
    told = ["epochs"]
    if {"to_accuracy_vp", "to_accuracy_adavipro"} <= found.keys():
        told.append("to_accuracy")
    return " ".join(prose()[name].format_map(found) for name in told)


def scaling() -> str:
    """Say what a second process brings."""
    one, two = (named("scaling")[name] for name in ("1 process", "2 processes"))
    return prose()["scaling"].format(one=one, two=two, percent=100 * two["message_share"])


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
    rounded = {
        f"{runtime}_{batch}": TO_OTHER.format_map(
            latency("latency", f"{runtime}_folded_int8", batch)
        )
        for runtime in ("onnx", "openvino")
        for batch in (1, 16)
    }
    return table(head, body) + "\n\n" + prose()["int8"].format(**rounded)


def peers() -> str:
    """Tabulate what users would run instead beside the fastest of ours with a prompt."""
    found = [row for row in rows("latency") if "to_other" in row and "int8" not in row["name"]]
    forms = {
        "alternative": "`{name}`",
        "batch": "{batch}",
        "p50, ms": "{p50_ms:.1f}",
        "ratio to ours (95 %)": TO_OTHER,
        "compared with": "`{other}`",
    }
    ahead = [
        f"`{row['name']}` at batch {row['batch']}" for row in found if row["to_other_high"] < 1
    ]
    told = "ahead" if ahead else "none_ahead"
    return columns(found, forms) + "\n\n" + prose()[told].format(names=", ".join(ahead))


def figures(row: Row) -> list[str]:
    """Write a latency and its ratio."""
    return [f"{row['p50_ms']:.1f} ms", RATIO.format_map(row)]


def curve() -> str:
    """Tabulate images per second over batch sizes and encoders."""
    forms = {
        "encoder": "{model}",
        "side": "{side}",
        "precision": "{precision}",
        "runtime": "{runtime}",
        "batch": "{batch}",
        "images/s without a prompt": "{encoder_images_per_s:.1f}",
        "with the prompt": "{images_per_s:.1f}",
        "time ratio (95 %)": RATIO,
    }
    found = named("throughput")
    steady = next(row for name, row in found.items() if name.startswith("sustained"))
    points = (row for row in rows("throughput") if "ratio" in row)
    return columns(points, forms) + "\n\n" + prose()["curve"].format(steady=steady, **found)


def photos() -> str:
    """Tabulate what the ways to decode save and change, and what bulk reaches."""
    forms = {
        "test set": "{set}",
        "decode": "{decode}",
        "images": "{images}",
        "same answers": "{answers:.3f}",
    }
    forms |= {
        "same regions": "{masks:.4f}",
        "mean difference, grey levels": "{grey_levels_mean:.3f}",
    }
    found = named("photos")
    compared = [
        row | dict(zip(("set", "decode"), name.split("_")[1:], strict=True))
        for name, row in found.items()
        if name.startswith("agreement_")
    ]
    machines = BILLION / DAY_S / found["folder"]["images_per_s"]
    texts = [prose()[name].format(**found, machines=machines) for name in ("photos", "photos_bulk")]
    return "\n\n".join([*texts, columns(compared, forms)])


def accuracy() -> str:
    """Tabulate one checkpoint through the backends."""
    forms = {
        "backend": "`{name}`",
        "top-1, %": "{top1:.1f}",
        "other answers": "{turned}, near {turned_near}",
        "same regions, %": "{regions:.3f}",
        "images/s": "{speed}",
        "time ratio (95 %)": "{ratio}",
    }
    found = [
        {
            **row,
            "regions": 100 * row["mask_agreement"],
            "speed": f"{row['images_per_s']:.1f}" if "ratio" in row else "",
            "ratio": RATIO.format_map(row) if "ratio" in row else "",
        }
        for row in named("accuracy").values()
    ]
    return columns(found, forms)


def sets() -> str:
    """Tabulate, set by set, what int8 loses and what resizing in the graph turns."""
    body = []
    for name, file in SETS.items():
        found = {row["name"]: row for row in rows(file)}
        exact, resized = (found[f"onnx_folded_fp32_{kind}"] for kind in ("uint8", "any"))
        rounded = [found[f"{runtime}_folded_int8_uint8"] for runtime in ("onnx", "openvino")]
        fp8 = found["onnx_folded_fp8_uint8"]
        body.append(
            [
                f"{name}, {exact['n']} images",
                f"{exact['top1']:.1f}",
                *(one(row, "{top1:.1f}") for row in rounded),
                one(rounded[0], "{count} of {products}", count=len(rounded[0].get("wide", ()))),
                one(fp8, "{top1:.1f}"),
                f"{resized['turned']}, near {resized['turned_near']}",
            ]
        )
    head = ["test set", "fp32", "int8, ONNX Runtime", "int8, OpenVINO", "left in fp32", "fp8"]
    return table([*head, "other answers of `--input any`"], body)


def one(row: Row, form: str, **more: object) -> str:
    """Write a row's figure, or that there is none."""
    return "no file" if "skipped" in row else form.format(**row, **more)


def results() -> str:
    """Tabulate methods beside each other: the demo's means over seeds, and the small sets."""
    methods = ("zero_shot", "vp", "adavipro", "linear_probe", "full_finetune")
    found = [r for r in rows("runs") if (r["task"], r["prompt_size"]) == ("demo", PROMPT_SIZE)]
    trained = [[row for row in found if row["method"] == m] for m in methods[1:3]]
    cells = [mean(found, "zero_shot_top1"), *(mean(of, "test_top1") for of in trained), "", ""]
    body = [["demo", *cells]]
    with (RESULTS / "paper" / "table1.csv").open() as file:
        table1 = {
            (row["data"], row["line"]): float(row["test_top1"]) for row in csv.DictReader(file)
        }
    body += [
        [data, *(f"{table1[data, method]:.1f}" for method in methods)]
        for data in dict.fromkeys(data for data, _ in table1)
    ]
    far = [row for row in rows("far") if (row["data"], row["line"]) == ("gtsrb10", "adavipro")]
    cells = ["", "", mean(far, "test_top1"), mean(far, "probe_test"), ""]
    body.append(["traffic signs, `--head linear`", *cells])
    head = ["task", "zero-shot", "vp", "adavipro", "probe", "fine-tuning"]
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


def worth() -> str:
    """Tabulate what prompts with heads gain over their probes on far sets."""
    forms = {
        "set": "{data}",
        "run": "{line}",
        "training images": "{limit_train}",
        "seeds": "{seeds}",
        "probe": "{probe_test:.1f}",
        "top-1": "{test_top1:.1f}",
        "points gained": "{points:+.1f} ± {standard_error:.1f}",
    }
    found = [row | {"limit_train": row["limit_train"] or "all"} for row in over_probe(rows("far"))]
    return columns(sorted(found, key=lambda row: (row["data"], -row["points"])), forms)


def top1(found: Sequence[dict[str, str]], data: str, figure: str) -> list[float]:
    """Return a figure of a data set's rows."""
    return [float(row[figure]) for row in found if row["data"] == data]


def mean(found: list[Row], figure: str, digits: int = 1) -> str:
    """Average a figure over runs."""
    if not found:
        return ""
    return f"{statistics.mean(row[figure] for row in found):.{digits}f}"


def gpu() -> str:
    """Tabulate what was measured on GPUs, or say that nothing was."""
    return gpu_tables.gpu_section(RESULTS)


def gpu_limit() -> str:
    """Say in README what was measured on GPUs."""
    return gpu_tables.gpu_limit(RESULTS)


SECTIONS: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        *(
            headline,
            results,
            tasks,
            combinations,
            serving,
            training,
            epochs,
            scaling,
            costs,
            peers,
            curve,
            photos,
            accuracy,
            sets,
            runs,
            evidence,
            worth,
            gpu,
            gpu_limit,
        ),
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
    scatter(list(rows("accuracy")), DOCS / "precisions.svg")
    for picture in PICTURES:
        write_whole(DOCS / picture.name, picture.read_bytes())
    return {"changed": changed, "chart": str(chart.relative_to(ROOT))}


def main() -> None:
    """Parse, write, print."""
    cli.main(ReportConfig, command)


if __name__ == "__main__":
    main()
