"""Export a checkpoint as one verified ONNX file: `python export/to_onnx.py CHECKPOINT --output F`.

Inputs and outputs: image (B, 3, S, S) to logits (B, K), mask (B, G, G) int32 and embedding (B, E).
"""

import json
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import onnx
import torch
import tyro
from onnx import TensorProto

from adavipro_fast import cli
from adavipro_fast.artifact import (
    SEAL_KEY,
    UNSEALED,
    OnnxArtifact,
    PromptArtifact,
    open_prompt,
    seal,
)
from adavipro_fast.checkpoint import FORMAT, Checkpoint, load_checkpoint
from adavipro_fast.clip import DTYPES, Precision
from adavipro_fast.description import NotRunnableError, file_sha256
from adavipro_fast.export.fold import Deployed, folding_obstacle
from adavipro_fast.export.verify import Comparison, Unprompted, compare, sample_batches
from adavipro_fast.prompt import AdaViPro

Graph = Literal["folded", "pixel"]
Input = Literal["float32", "uint8"]

# Attention is one node since opset 23, which TensorRT builds in half precision only.
OPSETS = {"fp32": 20, "fp16": 23, "bf16": 23}
ELEMENTS = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
}
# protobuf ends at 2 GiB; weights of larger encoders go into a second file.
ONE_FILE_BYTES = 1_900_000_000


@dataclass(frozen=True)
class OnnxConfig:
    """Export a checkpoint with its frozen encoder as ONNX."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """checkpoint.safetensors"""
    output: Path
    """file to write, F.onnx"""
    graph: Graph | None = None
    """prompt folded into the tokens, or on the pixels (default: folded for ViTs)"""
    precision: Precision = "fp32"
    """of the encoder; the mask path stays in fp32"""
    input: Input = "float32"
    """normalised floats, or RGB bytes 0-255"""
    baseline: bool = False
    """the frozen encoder without a prompt, in the same form"""
    opset: int | None = None
    """ONNX operator set (default: 20 for fp32, 23 for half precision)"""
    images: Path | None = None
    """folder of images to verify with (default: procedural ones)"""
    model: str | None = None
    """where the encoder now lies (default: as in training)"""
    pretrained: str | None = None
    """open_clip tag or path of its weights (default: as in training)"""


def main() -> None:
    """Parse, export, print."""
    config = cli.parse(OnnxConfig)
    cli.run(lambda: command(config))


def command(config: OnnxConfig) -> dict[str, Any]:
    """Export, verify, and only then give the file its name.

    Raises:
        ValueError: encoder, graph, precision or opset do not go together.
        VerificationError: the exported graph computes something else.
    """
    opset = config.opset or OPSETS[config.precision]
    if not OPSETS[config.precision] <= opset <= OPSETS["fp16"]:
        raise ValueError(
            f"opset {opset} cannot hold this graph in {config.precision}; "
            f"use {OPSETS[config.precision]} to {OPSETS['fp16']}"
        )
    if config.output.suffix != ".onnx":
        raise ValueError(f"output {config.output} does not end in .onnx; name a file F.onnx")
    reference = open_prompt(config.checkpoint, config.model, config.pretrained)
    graph = config.graph or _default_graph(reference.model)
    module = Deployed(
        reference.model,
        folded=graph == "folded",
        dtype=DTYPES[config.precision],
        uint8=config.input == "uint8",
        baseline=config.baseline,
    )
    metadata = describe(load_checkpoint(config.checkpoint), config, graph)
    with named_when_whole(config.output) as path:
        nodes = write(
            module, path, side=reference.about.preprocess.size, opset=opset, metadata=metadata
        )
        check_dtypes(path, config.precision)
        verdict = verify(reference, path, config)
        size = sum(file.stat().st_size for file in path.parent.iterdir())
    return {
        "path": str(config.output),
        "graph": graph,
        "precision": config.precision,
        "input": config.input,
        "opset": opset,
        "baseline": config.baseline,
        **verdict,
        "nodes": nodes,
        "bytes": size,
    }


@contextmanager
def named_when_whole(output: Path) -> Iterator[Path]:
    """Yield where to write; what lies beside it moves to the output's folder without an error."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
        path = Path(folder) / output.name
        yield path
        # The file that was asked for comes last.
        for file in sorted(path.parent.iterdir(), key=lambda file: file == path):
            file.replace(output.parent / file.name)


def _default_graph(model: AdaViPro) -> Graph:
    return "pixel" if folding_obstacle(model.encoder.visual) else "folded"


def describe(checkpoint: Checkpoint, config: OnnxConfig, graph: Graph) -> dict[str, Any]:
    """Collect what the file says about itself."""
    preprocess = checkpoint.preprocess
    if config.baseline:
        # A margin is the prompt's.
        preprocess = replace(preprocess, margin=0)
    return {
        "format": FORMAT,
        "class_names": checkpoint.class_names,
        "preprocess": preprocess.stored(),
        "config": asdict(checkpoint.config),
        "encoder": asdict(checkpoint.encoder),
        "checkpoint_sha256": file_sha256(config.checkpoint),
        "graph": graph,
        "precision": config.precision,
        "input": config.input,
        "baseline": config.baseline,
    }


def write(module: Deployed, path: Path, *, side: int, opset: int, metadata: dict[str, Any]) -> int:
    """Export a module as ONNX, stripped of the exporter's notes; return its number of nodes."""
    weights = sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
    apart = weights > ONE_FILE_BYTES
    # Without gradients attention is one node.
    with torch.no_grad(), quiet(), exporter_errors():
        program = torch.onnx.export(
            module,
            (torch.zeros(2, 3, side, side, dtype=torch.uint8 if module.uint8 else torch.float32),),
            dynamo=True,
            opset_version=opset,
            input_names=["image"],
            output_names=["logits", *(() if module.baseline else ("mask",)), "embedding"],
            dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1, max=65536)}},
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=apart)
    model = onnx.load(path, load_external_data=False)
    clean(model)
    if apart:
        data = path.with_name(path.name + ".data")
        metadata = metadata | {"data_sha256": file_sha256(data)}
    properties = {key: json.dumps(value) for key, value in metadata.items()}
    onnx.helper.set_model_props(model, properties | {SEAL_KEY: UNSEALED})
    path.write_bytes(seal(model.SerializeToString()))
    onnx.checker.check_model(path, full_check=not apart)
    return len(model.graph.node)


@contextmanager
def exporter_errors() -> Iterator[None]:
    """Tell what torch.onnx cannot export in one line.

    Raises:
        ValueError: it gave up.
    """
    try:
        yield
    except torch.onnx.errors.OnnxExporterError as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"torch.onnx cannot export this encoder: {type(reason).__name__}: {reason}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's remarks about its own passes out of the output."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def clean(model: onnx.ModelProto) -> None:
    """Drop stack traces and notes, which hold paths of this machine; softmax in fp32."""
    graph = model.graph
    graph.name, model.producer_name = "adavipro_fast", "adavipro_fast"
    del model.metadata_props[:], graph.metadata_props[:]
    for item in [*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]:
        item.doc_string = ""
        del item.metadata_props[:]
    for node in graph.node:
        if node.op_type == "Attention":
            node.attribute.append(
                onnx.helper.make_attribute("softmax_precision", TensorProto.FLOAT)
            )


def check_dtypes(path: Path, precision: Precision) -> None:
    """Check that matrix products are in `precision`, and that what must be safe is in fp32.

    Raises:
        VerificationError: they are not.
    """
    model = onnx.load(path, load_external_data=False)
    model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    kinds = {
        v.name: v.type.tensor_type.elem_type
        for v in [*graph.value_info, *graph.input, *graph.output]
    }
    kinds |= {t.name: t.data_type for t in graph.initializer}
    safe = {"LayerNormalization", "Softmax", "ReduceL2"}
    found: Counter[int] = Counter()
    for node in graph.node:
        kind = kinds.get(node.input[0])
        wide = node.op_type in safe or any(
            n.startswith(("head.", "trunk.proj", "classes")) for n in node.input
        )
        if wide and kind != TensorProto.FLOAT:
            raise cli.VerificationError(f"{node.op_type} {node.name} is not computed in fp32")
        if not wide and node.op_type in ("MatMul", "Gemm", "Conv", "Attention"):
            found[kind or 0] += 1
    if set(found) != {ELEMENTS[precision]}:
        names = {TensorProto.DataType.Name(k): n for k, n in found.items()}
        raise cli.VerificationError(f"matrix products are {names}; {precision} was asked for")


def verify(reference: PromptArtifact, path: Path, config: OnnxConfig) -> dict[str, Any]:
    """Compare the file with PyTorch in fp32, where a backend at hand can run it.

    Raises:
        VerificationError: it computes something else.
    """
    # ONNX Runtime's CPU provider has no bf16.
    bf16 = config.precision == "bf16"
    candidate = None
    if not bf16 or torch.cuda.is_available():
        try:
            candidate = OnnxArtifact.open(path, "cuda" if bf16 else "cpu")
        except NotRunnableError as error:
            if not bf16:
                raise cli.VerificationError(f"{path.name} was not written: {error}") from error
    if candidate is None:
        return {
            "verified": False,
            "reason": "no ONNX Runtime here runs bf16; structure and dtypes were checked",
            **dict.fromkeys(Comparison.__dataclass_fields__),
        }
    expected = Unprompted(reference.model) if config.baseline else reference
    batches = sample_batches(reference.about.preprocess, config.images)
    comparison = compare(reference.model, expected, candidate, batches)
    if complaint := comparison.complaint(config.precision):
        raise cli.VerificationError(f"{path.name} was not written: {complaint}")
    figures = asdict(comparison)
    if config.baseline:
        figures |= {"mask_agreement": None, "mask_ties": None}
    return {"verified": True, "reason": "", **figures}


if __name__ == "__main__":
    main()
