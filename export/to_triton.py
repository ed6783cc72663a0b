"""Write a Triton Inference Server repository: `python export/to_triton.py F.onnx --output R`.

It contains four models: the graph, an ensemble from image files to class names, and the ensemble's
two Python models. Another export with the same name becomes the next version.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import onnx
import tyro

from adavipro_fast import cli
from adavipro_fast.files.about import Description
from adavipro_fast.files.sealed import describe_onnx, read_sidecar
from adavipro_fast.files.whole import flush, write_whole

MODELS = Path(__file__).parent / "python_backend"
# Characters allowed in names besides letters and digits: they need no escaping in URLs, paths and
# configuration files.
LETTERS = "-_."


@dataclass(frozen=True)
class TritonConfig:
    """Write a model repository for Triton Inference Server."""

    artifact: Annotated[Path, tyro.conf.Positional]
    """.onnx (exported with --input uint8) or TensorRT .engine"""
    output: Path
    """folder of the model repository"""
    name: str | None = None
    """name of the model (default: the file's)"""
    batch: int = 32
    """largest batch, images; engines use their own"""
    delay_us: int = 2000
    """longest time to wait for more requests, microseconds"""
    instances: int = 1
    """model instances per device"""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """device of the graph"""

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("instances", 1), ("delay_us", 0)):
            if not least <= getattr(self, name) < 10**6:
                raise ValueError(f"{name} is {getattr(self, name)}; use {least} or more")


@dataclass(frozen=True)
class Served:
    """The graph to serve, and its batch sizes."""

    about: Description
    backend: str
    file: str
    batch: int
    usual: int
    """batch size that an engine is optimised for"""
    width: int | None
    """of the embedding; None for engines, whose files do not contain it"""


def main() -> None:
    """Parse, write, print."""
    cli.main(TritonConfig, command, summary)


def command(config: TritonConfig) -> dict[str, Any]:
    """Write the repository's models, the graph last.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: Triton cannot serve the file, or an existing model of this name differs.
    """
    graph, name = graph_of(config), config.name or config.artifact.stem
    plain = all(letter.isalnum() or letter in LETTERS for letter in name)
    if not plain or not name.strip("."):
        raise ValueError(f"{name!r} is not a valid model name; choose one with --name")
    about, repository = graph.about, config.output
    facts = about.facts()
    folders = {kind: repository / (name + kind) for kind in ("_preprocess", "_postprocess", "")}
    check_same(folders[""] / "about.json", facts)
    ensemble_folder = repository / f"{name}_classify"
    version = next_version([*folders.values(), ensemble_folder])
    kind = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}[config.device]
    texts = configurations(name, graph, kind, config)
    files = {
        "_preprocess": {"model.py": MODELS / "preprocess.py"},
        "_postprocess": {"model.py": MODELS / "postprocess.py"},
        "": {graph.file: config.artifact},
    }
    data = config.artifact.with_name(config.artifact.name + ".data")
    if data.exists():
        files[""][data.name] = data
    if not about.tasks:
        labels = "".join(f"{each}\n" for each in facts["class_names"][0])
        write_whole(folders[""] / "labels.txt", labels.encode())
    for kind, folder in folders.items():
        place(folder, version, texts[kind], files[kind], facts)
    place(ensemble_folder, version, texts["_classify"], {}, facts)
    return {
        "repository": str(repository),
        "model": name,
        "ensemble": f"{name}_classify",
        "version": version,
        "backend": graph.backend,
        "max_batch_size": graph.batch,
        "tasks": facts["tasks"],
    }


def summary(result: dict[str, Any]) -> str:
    """Format the repository's models, and how to serve them."""
    return (
        f"{result['repository']}: {result['model']} version {result['version']}, batches up to "
        f"{result['max_batch_size']}\n"
        f"image files to class names: model {result['ensemble']}\n"
        f"serve: tritonserver --model-repository={result['repository']}"
    )


def graph_of(config: TritonConfig) -> Served:
    """Read a file's description and batch sizes.

    Raises:
        ValueError: Triton cannot serve the file.
    """
    path = config.artifact
    if path.suffix == ".engine":
        values = read_sidecar(path)
        if values["runtime"] != "tensorrt":
            raise ValueError(
                f"{path} is an engine of {values['runtime']}, which Triton does not support; use "
                "the .onnx file, or build with --runtime tensorrt"
            )
        smallest, usual, largest = values["batch"]
        if smallest > 1:
            raise ValueError(
                f"{path} needs batches of {smallest} or more; build it with --batch 1,OPT,MAX"
            )
        about = Description.of(values, path)
        graph = Served(about, "tensorrt", "model.plan", largest, usual, None)
    elif path.suffix == ".onnx":
        about = describe_onnx(path)
        width = embedding_width(path)
        graph = Served(about, "onnxruntime", "model.onnx", config.batch, config.batch, width)
    else:
        raise ValueError(f"{path} is not an .onnx or .engine file; export it with adavipro-to-onnx")
    if about.input == "float32":
        raise ValueError(f"{path} needs normalised floats; export it with --input uint8")
    if about.open_for is not None:
        raise ValueError(
            f"{path} was exported with --tasks open, which Triton does not support; export it "
            "without"
        )
    return graph


def embedding_width(path: Path) -> int:
    """Read the embedding's width from an .onnx file."""
    model = onnx.load(path, load_external_data=False)
    shapes = {each.name: each.type.tensor_type.shape for each in model.graph.output}
    return int(shapes["embedding"].dim[1].dim_value)


def check_same(path: Path, facts: dict[str, Any]) -> None:
    """Raise ValueError if earlier versions have other classes, tasks or preprocessing.

    Clients would not notice the change, and while Triton switches versions, models of both would be
    combined.
    """
    known = json.loads(path.read_text()) if path.exists() else facts
    for what in ("tasks", "class_names", "preprocess"):
        if known[what] != facts[what]:
            model = path.parent.name
            raise ValueError(
                f"{model} exists with other {what.replace('_', ' ')}; choose another --name"
            )


def next_version(folders: Sequence[Path]) -> int:
    """Return the number after the last version of any of the models."""
    names = [each.name for folder in folders if folder.is_dir() for each in folder.iterdir()]
    return 1 + max((int(name) for name in names if name.isdigit()), default=0)


def place(
    folder: Path, version: int, config: str, files: dict[str, Path], facts: dict[str, Any]
) -> None:
    """Write a model's configuration and one version, whose folder is renamed once complete."""
    partial = folder / f"{version}.part"
    # Left behind by an interrupted run.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    about = (json.dumps(facts) + "\n").encode()
    for name, source in files.items():
        shutil.copyfile(source, partial / name)
        flush(partial / name)
    write_whole(partial / "about.json", about)
    write_whole(folder / "about.json", about)
    # Write only if changed, since Triton would reload the model.
    path = folder / "config.pbtxt"
    if not path.exists() or path.read_text() != config:
        write_whole(path, config.encode())
    flush(partial)
    partial.replace(folder / str(version))
    flush(folder)


def configurations(name: str, graph: Served, kind: str, config: TritonConfig) -> dict[str, str]:
    """Return the configuration of each model, by the suffix of its name."""
    about = graph.about
    side, grid = about.preprocess.size, about.preprocess.size // about.config.region_size
    # Triton supports one list of labels, so only a file of one task has them.
    labels = "" if about.tasks else ' label_filename: "labels.txt"'
    image = ("image", "UINT8", [3, side, side] if about.input == "uint8" else [3, -1, -1])
    number = ("task", "INT64", [1])
    task = [("task", "STRING", [1])] if about.tasks else []
    answer = [("class", "STRING", [1]), ("probability", "FP32", [1])]
    classes = ("logits", "FP32", [about.most_classes])
    shared = f"max_batch_size: {graph.batch}\n"
    latest = "version_policy { latest { num_versions: 1 } }\n"
    python = f'backend: "python"\n{shared}{latest}instance_group [ {{ kind: KIND_CPU }} ]\n'
    outputs = [line("logits", "FP32", [about.most_classes], labels)]
    if not about.baseline:
        outputs.append(line("mask", "INT32", [grid, grid]))
    if graph.width is not None:
        outputs.append(line("embedding", "FP32", [graph.width]))
    inputs = [line(*image)]
    if about.tasks:
        inputs.append(line(*number, " reshape { shape: [ ] }"))
    preferred = sorted({size for size in (8, 16, graph.usual, graph.batch) if size <= graph.batch})
    texts = {
        "": f'backend: "{graph.backend}"\n{shared}'
        + tensors("input", inputs)
        + tensors("output", outputs)
        + latest
        + f"instance_group [ {{ kind: {kind} count: {config.instances} }} ]\n"
        f"dynamic_batching {{ preferred_batch_size: {preferred} "
        f"max_queue_delay_microseconds: {config.delay_us} }}\n"
        "response_cache { enable: false }\n" + warm_up(side, graph),
        "_preprocess": python
        + tensors("input", [line("encoded", "STRING", [1]), *(line(*each) for each in task)])
        + tensors(
            "output",
            [line("image", "UINT8", [3, side, side])]
            + ([line("number", "INT64", [1])] if task else []),
        )
        + "dynamic_batching { }\n",
        "_postprocess": python
        + tensors("input", [line(*classes), *([line(*number)] if task else [])])
        + tensors("output", [line(*each) for each in answer])
        + "dynamic_batching { }\n",
        "_classify": f'platform: "ensemble"\n{shared}{latest}'
        + tensors("input", [line("encoded", "STRING", [1]), *(line(*each) for each in task)])
        + tensors("output", [line(*each) for each in answer])
        + ensemble(name, several=bool(task)),
    }
    return {ending: f'name: "{name}{ending}"\n{text}' for ending, text in texts.items()}


def line(name: str, kind: str, dims: Sequence[int], more: str = "") -> str:
    """Format the configuration of a tensor; its dimensions exclude the batch."""
    return f'{{ name: "{name}" data_type: TYPE_{kind} dims: {list(dims)}{more} }}'


def tensors(kind: str, lines: Sequence[str]) -> str:
    """Format the inputs or outputs of a model."""
    return f"{kind} [\n  " + ",\n  ".join(lines) + "\n]\n"


def warm_up(side: int, graph: Served) -> str:
    """Format a warm-up with one image and with a full batch."""
    shapes = [("image", "UINT8", [3, side, side])]
    shapes += [("task", "INT64", [1])] if graph.about.tasks else []
    fed = " ".join(
        f'inputs {{ key: "{name}" value {{ data_type: TYPE_{kind} dims: {dims} '
        "zero_data: true } }"
        for name, kind, dims in shapes
    )
    sizes = sorted({1, graph.batch})
    samples = [f'{{ name: "batch_{size}" batch_size: {size} {fed} }}' for size in sizes]
    return "model_warmup [\n  " + ",\n  ".join(samples) + "\n]\n"


def ensemble(name: str, *, several: bool) -> str:
    """Format the steps of the ensemble, which turn task names into numbers."""

    def step(ending: str, inputs: dict[str, str], outputs: dict[str, str]) -> str:
        maps = [
            f'{kind}_map {{ key: "{key}" value: "{value}" }}'
            for kind, mapped in (("input", inputs), ("output", outputs))
            for key, value in mapped.items()
        ]
        return f'{{ model_name: "{name}{ending}" model_version: -1 {" ".join(maps)} }}'

    number = {"task": "number"} if several else {}
    steps = [
        step(
            "_preprocess",
            {"encoded": "encoded"} | ({"task": "task"} if several else {}),
            {"image": "image"} | ({"number": "number"} if several else {}),
        ),
        step("", {"image": "image"} | number, {"logits": "logits"}),
        step(
            "_postprocess",
            {"logits": "logits"} | number,
            {"class": "class", "probability": "probability"},
        ),
    ]
    return "ensemble_scheduling { step [\n  " + ",\n  ".join(steps) + "\n] }\n"


if __name__ == "__main__":
    main()
