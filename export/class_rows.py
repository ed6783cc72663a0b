"""The class rows of an ONNX file's text head: read them, or write a file with others."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from adavipro_fast.artifact.onnx import describe_onnx, metadata_of, tensors_of
from adavipro_fast.export.graph import save_sealed
from adavipro_fast.files.checked import read
from adavipro_fast.files.checkpoint import Checkpoint
from adavipro_fast.method.config import PROMPTED
from adavipro_fast.method.encoder import EncoderIdentity

# As `Head` calls the rows; a graph that resizes holds the head in a module.
ROWS = ("head.classes", "module.head.classes")
# The sigmoid encoders' bias, one number for all classes.
BIAS = ("head.bias", "module.head.bias")


def head_of(path: Path) -> Checkpoint:
    """Read the head of an ONNX file, as a checkpoint that holds no more.

    Raises:
        ValueError: damaged, or a file of several tasks.
    """
    about = describe_onnx(path)
    if about.tasks or about.open_for is not None:
        raise ValueError(f"{path} holds tasks; relabel a task's checkpoint and export that")
    model = onnx.load(path, load_external_data=False)
    values = metadata_of(model)
    config = about.config
    if about.baseline and config.method in PROMPTED:
        config = replace(config, method="zero_shot", margin=0)
    tensors = {}
    if config.head == "text":
        columns = numpy_helper.to_array(rows_of(model), str(path.parent))
        rows = torch.from_numpy(columns.copy()).t().double()
        # The rows are unit ones times the factor.
        scale = rows.norm(dim=1).mean()
        tensors = {"class_embeddings": (rows / scale).float(), "logit_scale": scale.float()}
    return Checkpoint(
        tensors,
        config,
        about.class_names,
        read(EncoderIdentity, values.get("encoder")),
        about.preprocess,
        about.calibration,
        templates=tuple(values.get("templates", ())),
    )


def rows_of(model: onnx.ModelProto) -> TensorProto:
    """Return the initializer that holds the class rows, (E, K) times the factor.

    Raises:
        ValueError: it has another name, as in files of older versions.
    """
    rows = initializer_of(model, ROWS)
    if rows is None:
        raise ValueError(
            "this file comes from an older version, which named its class rows differently; "
            "export it again"
        )
    return rows


def initializer_of(model: onnx.ModelProto, names: tuple[str, ...]) -> TensorProto | None:
    """Return the initializer that has one of these names, if there is one."""
    return next((t for t in model.graph.initializer if t.name in names), None)


def write_head(source: Path, path: Path, new: Checkpoint) -> None:
    """Write a graph with other class rows; weights beside it are copied."""
    model = onnx.load(source, load_external_data=False)
    metadata, rows = metadata_of(model), rows_of(model)
    columns = scaled_rows(new).t().contiguous()
    rows.CopyFrom(numpy_helper.from_array(columns.numpy(), rows.name))
    bias = initializer_of(model, BIAS)
    if bias is not None:
        value = float(numpy_helper.to_array(bias, str(source.parent))[0])
        filled = np.full(columns.shape[1], value, np.float32)
        bias.CopyFrom(numpy_helper.from_array(filled, bias.name))
    heads = [node for node in model.graph.node if rows.name in node.input]
    wide = {rows.name, "logits", *(name for node in heads for name in node.output)}
    for item in [*model.graph.value_info, *model.graph.output]:
        if item.name in wide:
            item.type.tensor_type.shape.dim[1].dim_value = columns.shape[1]
        if bias is not None and item.name == bias.name:
            item.type.tensor_type.shape.dim[0].dim_value = columns.shape[1]
    if "data_sha256" in metadata:
        data = path.with_name(path.name + ".data")
        shutil.copyfile(source.with_name(source.name + ".data"), data)
        for entry in (e for tensor in tensors_of(model) for e in tensor.external_data):
            if entry.key == "location":
                entry.value = data.name
    labels = {
        "class_names": new.class_names,
        "calibration": asdict(new.calibration),
        "templates": new.templates,
    }
    save_sealed(model, path, metadata | labels)


def scaled_rows(checkpoint: Checkpoint) -> Tensor:
    """Return the rows (K, E) whose product with an embedding is the logits."""
    return checkpoint.tensors["class_embeddings"] * checkpoint.tensors["logit_scale"].item()
