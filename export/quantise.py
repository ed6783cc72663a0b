"""INT8 and FP8: the encoder's matrix products on quantised tensors, as QDQ nodes.

A weight has one scale a column, an activation one a tensor, of the largest magnitude on
calibration images; zero is zero, as TensorRT wants it. Before that, outliers of a LayerNorm's
channels move into the product behind it, exactly (SmoothQuant, Xiao et al., 2023). Mask path, patch
embedding, LayerNorms, attention's own products, softmax and head stay as they are, and so do the
products whose rounding costs most (`search`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from adavipro_fast.artifact.onnx import session_options
from adavipro_fast.export.graph import WIDE
from adavipro_fast.method.config import ExportPrecision

Kind = Literal["int8", "fp8"]
Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]
# Element type, its largest number.
ELEMENTS: dict[Kind, tuple[int, float]] = {
    "int8": (TensorProto.INT8, 127.0),
    "fp8": (TensorProto.FLOAT8E4M3FN, 448.0),
}
# Of SmoothQuant: how much of an outlier moves into the weights.
SHARE = 0.5
LEAST = 1e-5
NORM = "LayerNormalization"


class Quantiser:
    """Quantises a graph's products, all of them or some; ranges are found once.

    Args:
        model: in fp32; is smoothed in place.
        kind: int8 or fp8.
        feeds: inputs of some hundred images, in batches.

    Raises:
        ValueError: there is no product with weights in the encoder.
    """

    def __init__(self, model: onnx.ModelProto, kind: Kind, feeds: Iterable[Feeds]) -> None:
        self.model, self.kind = model, kind
        self.products = {node.name: node for node in products(model)}
        if not self.products:
            raise ValueError(f"this encoder has no matrix product to compute in {kind}")
        channels = largest_of(model, [n.input[0] for n in self.products.values()], feeds)
        smooth(model, self.products.values(), channels)
        drop_unused(model)
        self.ranges = {name: float(largest.max()) for name, largest in channels.items()}

    def quantised(self, chosen: Sequence[str]) -> onnx.ModelProto:
        """Return a copy of the graph with some products, by their names, quantised."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        graph = model.graph
        weights = {tensor.name: tensor for tensor in graph.initializer}
        nodes, done = [], set()
        for node in graph.node:
            if node.name in chosen:
                activation, weight = node.input[0], node.input[1]
                if activation not in done:
                    scale = np.float32(max(self.ranges[activation], LEAST) / self.most)
                    graph.initializer.extend(self.constants(activation, scale))
                    nodes += [self.node(True, activation), self.node(False, activation)]
                    done.add(activation)
                if weight not in done:
                    nodes.append(self.with_weight(graph, weights[weight]))
                    done.add(weight)
                node.input[0], node.input[1] = f"{activation}_dequantised", f"{weight}_dequantised"
            nodes.append(node)
        del graph.node[:]
        graph.node.extend(nodes)
        drop_unused(model)
        return model

    @property
    def most(self) -> float:
        """The largest number that a quantised element holds."""
        return ELEMENTS[self.kind][1]

    def with_weight(self, graph: onnx.GraphProto, tensor: onnx.TensorProto) -> onnx.NodeProto:
        """Add a weight's quantised values to a graph; return the node that reads them."""
        values = numpy_helper.to_array(tensor)
        scale = np.maximum(np.abs(values).max(0), LEAST).astype(np.float32) / self.most
        whole = self.cast(values / scale)
        element = ELEMENTS[self.kind][0]
        graph.initializer.append(
            helper.make_tensor(
                f"{tensor.name}_quantised", element, values.shape, whole.tobytes(), raw=True
            )
        )
        graph.initializer.extend(self.constants(tensor.name, scale))
        return self.node(False, tensor.name, axis=1)

    def cast(self, values: Array) -> Array:
        """Round to what the element type holds."""
        limited = np.clip(values, -self.most, self.most)
        whole = self.kind == "int8"
        rounded: Array = (
            np.rint(limited).astype(np.int8) if whole else limited.astype(ml_dtypes.float8_e4m3fn)
        )
        return rounded

    def constants(self, name: str, scale: Any) -> list[onnx.TensorProto]:
        """Make a tensor's scale and its zero."""
        shape = np.shape(scale)
        zero = bytes(int(np.prod(shape)))
        return [
            numpy_helper.from_array(np.asarray(scale, np.float32), f"{name}_scale"),
            helper.make_tensor(f"{name}_zero", ELEMENTS[self.kind][0], shape, zero, raw=True),
        ]

    def node(self, quantise: bool, name: str, axis: int | None = None) -> onnx.NodeProto:
        """Make the node that quantises a tensor, or its counterpart."""
        source, target = ("", "_quantised") if quantise else ("_quantised", "_dequantised")
        return helper.make_node(
            "QuantizeLinear" if quantise else "DequantizeLinear",
            [name + source, f"{name}_scale", f"{name}_zero"],
            [name + target],
            name=name + target,
            axis=axis,
        )


def products(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield the encoder's products of an activation and a weight, whose columns are channels."""
    weights = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    for node in model.graph.node:
        named = (node.name, *node.input)
        if any(name.removeprefix("module.").startswith(WIDE) for name in named):
            continue
        transposed = any(a.name in ("transA", "transB") and a.i for a in node.attribute)
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights and not transposed:
            yield node


def largest_of(
    model: onnx.ModelProto, names: Sequence[str], feeds: Iterable[Feeds]
) -> dict[str, Array]:
    """Find the largest magnitude of each channel of some tensors, whose last axis is channels."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    names = list(dict.fromkeys(names))
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    run = runner(watched, "fp32", names)
    found: dict[str, Array] = {}
    for fed in feeds:
        for name, value in zip(names, run(fed), strict=True):
            most = np.abs(value).max(tuple(range(value.ndim - 1)))
            found[name] = np.maximum(found.get(name, most), most)
    return found


def smooth(
    model: onnx.ModelProto, chosen: Iterable[onnx.NodeProto], channels: dict[str, Array]
) -> None:
    """Move a LayerNorm's outliers into the product behind it, where that alone reads it.

    Args:
        model: whose weights change.
        chosen: the products.
        channels: of `largest_of`; follows.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    uses = Counter(name for node in model.graph.node for name in node.input)
    norms = {node.output[0]: node for node in model.graph.node if node.op_type == NORM}
    for product in chosen:
        source = product.input[0]
        norm = norms.get(source)
        if norm is None or uses[source] != 1 or not set(norm.input[1:]) <= tensors.keys():
            continue
        weight = numpy_helper.to_array(tensors[product.input[1]])
        strongest = np.maximum(np.abs(weight).max(1), LEAST)
        scale = np.maximum(channels[source], LEAST) ** SHARE / strongest ** (1 - SHARE)
        channels[source] = channels[source] / scale
        # Tensors of their own: equal ones may be shared.
        places = [(product, 1, weight * scale[:, None])]
        places += [
            (norm, place, numpy_helper.to_array(tensors[norm.input[place]]) / scale)
            for place in range(1, len(norm.input))
        ]
        for node, place, value in places:
            name = f"{product.name}_smooth_{node.op_type}_{place}"
            tensor = numpy_helper.from_array(value.astype(np.float32), name)
            model.graph.initializer.append(tensor)
            node.input[place] = name


def drop_unused(model: onnx.ModelProto) -> None:
    """Drop weights that no node reads."""
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def runner(
    model: onnx.ModelProto, precision: ExportPrecision, names: Sequence[str]
) -> Callable[[Feeds], list[Array]]:
    """Return what runs a graph on the CPU and gives some of its outputs."""
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), session_options(precision), providers=["CPUExecutionProvider"]
    )
    return lambda fed: list(session.run(list(names), fed))


def search(
    quantiser: Quantiser,
    loss_of: Callable[[onnx.ModelProto], float],
    sample: Feeds,
    most: float,
) -> tuple[onnx.ModelProto | None, float, list[str]]:
    """Leave the most sensitive products wide until the loss is small enough.

    A product's sensitivity is measured: how far the embedding moves when it alone is quantised.

    Args:
        quantiser: of the graph.
        loss_of: a graph to its loss, points.
        sample: inputs to measure sensitivity with.
        most: loss that is accepted.

    Returns:
        The graph, none where even half of the products wide was not enough; its loss; which
        products are wide, the most sensitive one first.
    """
    names = list(quantiser.products)
    model = quantiser.quantised(names)
    loss = loss_of(model)
    if loss <= most:
        return model, loss, []
    (exact,) = runner(quantiser.model, "fp32", ["embedding"])(sample)

    def moved(name: str) -> float:
        (got,) = runner(quantiser.quantised([name]), quantiser.kind, ["embedding"])(sample)
        return float(1 - (got * exact).sum(1).mean())

    errors = {name: moved(name) for name in names}
    order = sorted(names, key=lambda name: -errors[name])
    half = len(order) // 2
    for count in [2**power for power in range(half.bit_length()) if 2**power < half] + [half]:
        model = quantiser.quantised(order[count:])
        loss = loss_of(model)
        if loss <= most:
            return model, loss, order[:count]
    return None, loss, order[:half]
