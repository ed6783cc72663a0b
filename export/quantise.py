"""INT8 and FP8: quantise the encoder's matrix products with QDQ nodes.

Weights have one scale per column and activations one per tensor, both symmetric, as TensorRT
requires. First, outliers in a LayerNorm's channels are moved into the weights of the following
product, which is exact (SmoothQuant, Xiao et al., 2023). After such a LayerNorm, the range is the
largest magnitude on calibration images. Elsewhere, the range is clipped where the product's error
is smallest, because GELU's outputs have a long tail. Mask, patch embedding, LayerNorms, products
inside attention, softmax and head are not quantised, and neither are the most sensitive products
(`search`).
"""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from adavipro_fast.artifact.onnx import session_options
from adavipro_fast.export.onnx_file import WIDE
from adavipro_fast.method.config import ExportPrecision

Kind = Literal["int8", "fp8"]
Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]
# Element type and its largest value.
ELEMENTS: dict[Kind, tuple[int, float]] = {
    "int8": (TensorProto.INT8, 127.0),
    "fp8": (TensorProto.FLOAT8E4M3FN, 448.0),
}
# SmoothQuant's migration strength: the share of an outlier that moves into the weights. With the
# authors' 0.5, these products change a ViT-Tiny's embeddings 1.5 times as much (1 - cosine).
SHARE = 0.65
# Clipping points to try for a range, relative to the largest magnitude.
CUTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
# Tokens sampled per batch to choose where a range is clipped.
TOKENS = 64
LEAST = 1e-5
NORM = "LayerNormalization"


class Quantiser:
    """Quantises any of a graph's products; ranges are calibrated once.

    Args:
        model: in fp32; smoothed in place.
        kind: int8 or fp8.
        feeds: inputs of several hundred images, in batches.

    Raises:
        ValueError: the encoder has no product with constant weights.
    """

    def __init__(self, model: onnx.ModelProto, kind: Kind, feeds: Iterable[Feeds]) -> None:
        self.model, self.kind = model, kind
        self.products = {node.name: node for node in products(model)}
        if not self.products:
            raise ValueError(f"this encoder has no matrix product that can be quantised to {kind}")
        read = {node.input[0] for node in self.products.values()}
        norms = norms_of(model)
        channels, tokens = observed(model, read, read - norms.keys(), feeds)
        smooth(model, self.products.values(), norms, channels)
        drop_unused(model)
        self.ranges = {name: float(largest.max()) for name, largest in channels.items()}
        weights = {tensor.name: tensor for tensor in model.graph.initializer}
        for name, values in tokens.items():
            readers = [node for node in self.products.values() if node.input[0] == name]
            columns = [numpy_helper.to_array(weights[node.input[1]]) for node in readers]
            self.ranges[name] = self.cut_off(self.ranges[name], values, np.hstack(columns))

    def quantised(self, chosen: Sequence[str]) -> onnx.ModelProto:
        """Return a copy of the graph with the named products quantised."""
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
        """The largest value of a quantised element."""
        return ELEMENTS[self.kind][1]

    def with_weight(self, graph: onnx.GraphProto, tensor: onnx.TensorProto) -> onnx.NodeProto:
        """Add a weight's quantised values to a graph; return the node that reads them."""
        values = numpy_helper.to_array(tensor)
        scale = np.maximum(np.abs(values).max(0), LEAST).astype(np.float32) / self.most
        rounded = self.cast(values / scale)
        element = ELEMENTS[self.kind][0]
        graph.initializer.append(
            helper.make_tensor(
                f"{tensor.name}_quantised", element, values.shape, rounded.tobytes(), raw=True
            )
        )
        graph.initializer.extend(self.constants(tensor.name, scale))
        return self.node(False, tensor.name, axis=1)

    def cut_off(self, largest: float, tokens: Array, weight: Array) -> float:
        """Return the clipped range with the smallest error of the product.

        Args:
            largest: largest magnitude of the activations.
            tokens: sampled activations (N, C).
            weight: (C, M).
        """

        def error(cut: float) -> float:
            scale = cut * max(largest, LEAST) / self.most
            rounded = self.cast(tokens / scale).astype(np.float32) * scale
            return float(np.square((rounded - tokens) @ weight).sum())

        return largest * min(CUTS, key=error)

    def cast(self, values: Array) -> Array:
        """Round to the element type."""
        limited = np.clip(values, -self.most, self.most)
        integer = self.kind == "int8"
        rounded: Array = (
            np.rint(limited).astype(np.int8) if integer else limited.astype(ml_dtypes.float8_e4m3fn)
        )
        return rounded

    def constants(self, name: str, scale: Any) -> list[onnx.TensorProto]:
        """Make a tensor's scale and zero point."""
        shape = np.shape(scale)
        zero = bytes(int(np.prod(shape)))
        return [
            numpy_helper.from_array(np.asarray(scale, np.float32), f"{name}_scale"),
            helper.make_tensor(f"{name}_zero", ELEMENTS[self.kind][0], shape, zero, raw=True),
        ]

    def node(self, quantise: bool, name: str, axis: int | None = None) -> onnx.NodeProto:
        """Make the node that quantises a tensor, or the one that dequantises it."""
        source, target = ("", "_quantised") if quantise else ("_quantised", "_dequantised")
        return helper.make_node(
            "QuantizeLinear" if quantise else "DequantizeLinear",
            [name + source, f"{name}_scale", f"{name}_zero"],
            [name + target],
            name=name + target,
            axis=axis,
        )


def products(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield the encoder's products of an activation and a constant weight that can be quantised."""
    weights = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    for node in model.graph.node:
        named = (node.name, *node.input)
        if any(name.startswith(WIDE) for name in named):
            continue
        transposed = any(a.name in ("transA", "transB") and a.i for a in node.attribute)
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights and not transposed:
            yield node


def norms_of(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Return LayerNorms with constant weights and a single consumer, by their output's name."""
    tensors = {tensor.name for tensor in model.graph.initializer}
    uses = Counter(name for node in model.graph.node for name in node.input)
    return {
        node.output[0]: node
        for node in model.graph.node
        if node.op_type == NORM and set(node.input[1:]) <= tensors and uses[node.output[0]] == 1
    }


def observed(
    model: onnx.ModelProto, names: Iterable[str], sampled: Container[str], feeds: Iterable[Feeds]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Run a graph and record some of its tensors, whose last axis is channels C.

    Args:
        model: in fp32.
        names: of the tensors.
        sampled: tensors of which tokens are kept.
        feeds: inputs.

    Returns:
        The largest magnitude of each channel (C,), and tokens (N, C), both by name.
    """
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    names = sorted(names)
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    run = runner(watched, "fp32", names)
    channels: dict[str, Array] = {}
    kept: dict[str, list[Array]] = {}
    generator = np.random.default_rng(0)
    for fed in feeds:
        for name, value in zip(names, run(fed), strict=True):
            tokens = value.reshape(-1, value.shape[-1])
            most = np.abs(tokens).max(0)
            channels[name] = np.maximum(channels.get(name, most), most)
            if name in sampled:
                drawn = generator.integers(len(tokens), size=TOKENS)
                kept.setdefault(name, []).append(tokens[drawn])
    return channels, {name: np.concatenate(parts) for name, parts in kept.items()}


def smooth(
    model: onnx.ModelProto,
    chosen: Iterable[onnx.NodeProto],
    norms: dict[str, onnx.NodeProto],
    channels: dict[str, Array],
) -> None:
    """Move outliers of LayerNorms into the weights of the products after them.

    Args:
        model: its weights are changed.
        chosen: the products.
        norms: from `norms_of`.
        channels: from `observed`; updated.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for product in chosen:
        source = product.input[0]
        norm = norms.get(source)
        if norm is None:
            continue
        weight = numpy_helper.to_array(tensors[product.input[1]])
        strongest = np.maximum(np.abs(weight).max(1), LEAST)
        scale = np.maximum(channels[source], LEAST) ** SHARE / strongest ** (1 - SHARE)
        channels[source] = channels[source] / scale
        # New tensors, since nodes with equal weights may share one.
        changed = [(product, 1, weight * scale[:, None])]
        changed += [
            (norm, index, numpy_helper.to_array(tensors[norm.input[index]]) / scale)
            for index in range(1, len(norm.input))
        ]
        for node, index, value in changed:
            name = f"{product.name}_smooth_{node.op_type}_{index}"
            tensor = numpy_helper.from_array(value.astype(np.float32), name)
            model.graph.initializer.append(tensor)
            node.input[index] = name


def drop_unused(model: onnx.ModelProto) -> None:
    """Drop weights that no node reads."""
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def runner(
    model: onnx.ModelProto, precision: ExportPrecision, names: Sequence[str]
) -> Callable[[Feeds], list[Array]]:
    """Return a function that runs a graph on the CPU and returns the named outputs."""
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
    """Keep the most sensitive products in fp32 until the loss is small enough.

    A product's sensitivity is the change of the embedding when only that product is quantised.

    Args:
        quantiser: of the graph.
        loss_of: returns a graph's loss, points.
        sample: inputs for measuring sensitivity.
        most: largest accepted loss.

    Returns:
        The graph, or None if the loss is too large even with half of the products in fp32; its
        loss; the products in fp32, the most sensitive first.
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
