"""Tables of what was trained: accuracy, masks, and what prompts with heads gain."""

import csv
import statistics
from collections import defaultdict
from collections.abc import Sequence

from lib.points import over_probe
from lib.published import RATIO, RESULTS, Row, columns, mean, named, rows, table

# Files of bench/accuracy.py by their test set.
SETS = {"flowers5": "accuracy", "dtd10": "accuracy-dtd10", "cifar10": "accuracy-cifar10"}
# Prompt size of the results in README.
PROMPT_SIZE = 30


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
    """Tabulate by data set the loss of int8 and the changes by resizing in the graph."""
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
    """Format a row's figure, or "no file" if it was skipped."""
    return "no file" if "skipped" in row else form.format(**row, **more)


def results() -> str:
    """Tabulate the methods: means over seeds for the demo, and the small data sets."""
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
    for name, data, limit in (("traffic signs", "gtsrb10", 600), ("charts", "charts", None)):
        of = [
            r for r in rows("far") if (r["data"], r["limit_train"], r["epochs"]) == (data, limit, 4)
        ]
        lines = {
            line: [row for row in of if row["line"] == line]
            for line in ("vp", "adavipro", "full_finetune")
        }
        reached = [mean(found, "test_top1") for found in lines.values()]
        probe = mean(lines["adavipro"], "probe_test")
        body.append([f"{name}, `--head linear`", "", *reached[:2], probe, reached[2]])
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
    # Zero-shot needs no training; every line starts from it.
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
    """Tabulate the gain of prompts with heads over their probes on far sets."""
    forms = {
        "set": "{data}",
        "run": "{line}",
        "epochs": "{epochs}",
        "training images": "{limit_train}",
        "seeds": "{seeds}",
        "probe": "{probe_test:.1f}",
        "top-1": "{test_top1:.1f}",
        "points gained": "{points:+.1f} ± {standard_error:.1f}",
    }
    found = [row | {"limit_train": row["limit_train"] or "all"} for row in over_probe(rows("far"))]
    return columns(sorted(found, key=lambda row: (row["data"], -row["points"])), forms)


def top1(found: Sequence[dict[str, str]], data: str, figure: str) -> list[float]:
    """Return a figure of each row of a data set."""
    return [float(row[figure]) for row in found if row["data"] == data]
