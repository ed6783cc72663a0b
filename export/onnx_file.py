"""Write a module as one ONNX file, and check its types."""

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto

from adavipro_fast.errors import VerificationError
from adavipro_fast.export.graph import Graph
from adavipro_fast.files.sealed import save_sealed
from adavipro_fast.files.whole import file_sha256
from adavipro_fast.method.config import ExportPrecision

ELEMENTS = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    # The element type between dequantising and quantising nodes.
    "int8": TensorProto.FLOAT,
    "fp8": TensorProto.FLOAT,
}
PRODUCTS = ("MatMul", "Gemm", "Conv", "Attention")
# Prefixes of modules and tables that stay in fp32: mask, head and resize.
WIDE = ("decide", "head", "resize")
# protobuf files are limited to 2 GiB; weights of larger encoders are written to a second file.
ONE_FILE_BYTES = 1_900_000_000


def write(graph: Graph, path: Path, *, opset: int, metadata: dict[str, Any]) -> int:
    """Export a graph as ONNX without the exporter's metadata; return its number of nodes."""
    weights = sum(t.nbytes for t in [*graph.parameters(), *graph.buffers()])
    apart = weights > ONE_FILE_BYTES
    batch = torch.export.Dim("batch", min=1, max=65536)
    # no_grad, so that attention is exported as one node.
    with torch.no_grad(), quiet(), exporter_errors():
        program = torch.onnx.export(
            graph,
            graph.example(),
            dynamo=True,
            opset_version=opset,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=graph.dynamic(batch),
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=apart)
    model = onnx.load(path, load_external_data=False)
    clean(model)
    widen_softmax(model)
    if apart:
        data = path.with_name(path.name + ".data")
        metadata = metadata | {"data_sha256": file_sha256(data)}
    # The lowest possible IR version, so that older runtimes can load the file.
    least = onnx.helper.find_min_ir_version_for(list(model.opset_import))
    model.ir_version = min(model.ir_version, least)
    save_sealed(model, path, metadata)
    return len(model.graph.node)


@contextmanager
def exporter_errors() -> Iterator[None]:
    """Turn errors of torch.onnx into a one-line ValueError.

    Raises:
        ValueError: the export failed.
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
    """Silence the exporter's log and warnings."""
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
    """Drop stack traces and metadata, which contain local paths; set softmax to fp32.

    Nodes are prefixed with the name of their module.
    """
    graph = model.graph
    graph.name, model.producer_name = "adavipro_fast", "adavipro_fast"
    del model.metadata_props[:], graph.metadata_props[:]
    for node in graph.node:
        notes = {note.key: note.value for note in node.metadata_props}
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
        node.name = "/".join([*scopes[-2:-1], node.name]).lstrip("/")
    for item in [*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]:
        item.doc_string = ""
        del item.metadata_props[:]
    for node in graph.node:
        if node.op_type == "Attention":
            node.attribute.append(
                onnx.helper.make_attribute("softmax_precision", TensorProto.FLOAT)
            )


def widen_softmax(model: onnx.ModelProto) -> None:
    """Compute half-precision softmax nodes in fp32, between two casts."""
    graph = model.graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    nodes = []
    for node in graph.node:
        kind = kinds.get(node.input[0]) if node.op_type == "Softmax" else None
        if kind not in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
            nodes.append(node)
            continue
        source, target = node.input[0], node.output[0]
        node.input[0], node.output[0] = target + "_wide_in", target + "_wide_out"
        casts = ((source, node.input[0], TensorProto.FLOAT), (node.output[0], target, kind))
        before, after = (
            onnx.helper.make_node("Cast", [a], [b], name=f"{node.name}/{b}", to=to)
            for a, b, to in casts
        )
        nodes += [before, node, after]
    del graph.node[:]
    graph.node.extend(nodes)


def check_dtypes(path: Path, precision: ExportPrecision) -> None:
    """Check that matrix products are in `precision`, and sensitive operations in fp32.

    Raises:
        VerificationError: a node has another type.
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
    products: Counter[int] = Counter()
    for node in graph.node:
        kind = kinds.get(node.input[0])
        product = node.op_type in PRODUCTS
        named = [*node.input, *([node.name] if product else [])]
        needs_fp32 = node.op_type in safe or any(name.startswith(WIDE) for name in named)
        if needs_fp32 and kind not in (TensorProto.FLOAT, TensorProto.INT64):
            raise VerificationError(f"{node.op_type} {node.name} is not computed in fp32")
        if product and not needs_fp32:
            products[kind or 0] += 1
    if set(products) != {ELEMENTS[precision]}:
        names = {TensorProto.DataType.Name(k): n for k, n in products.items()}
        raise VerificationError(f"matrix products are {names}; expected {precision}")
