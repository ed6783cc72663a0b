"""The Open Inference Protocol (KServe v2) over HTTP: tensors in JSON or as bytes after it.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol, with the binary
tensors of NVIDIA's extension, so that `tritonclient` works unchanged.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
HEADER = "Inference-Header-Content-Length"
DTYPES: dict[str, np.dtype[Any]] = {
    "UINT8": np.dtype(np.uint8),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP32": np.dtype(np.float32),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_TENSORS, MOST_DIMENSIONS = 16, 8
SHOWN = 80


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a model; -1 means any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Wanted:
    """An output that a request asks for."""

    name: str
    binary: bool


@dataclass(frozen=True)
class Request:
    """A parsed inference request."""

    id: str
    inputs: dict[str, Array]
    outputs: tuple[Wanted, ...]
    """empty means all outputs"""
    binary: bool
    """return outputs as bytes if `outputs` is empty"""


def parse(body: bytes, header_length: str | None, takes: Sequence[TensorSpec]) -> Request:
    """Read a request.

    Args:
        body: of the HTTP request.
        header_length: value of the HTTP header with the number of bytes of JSON, if binary tensors
            follow.
        takes: the model's inputs.

    Raises:
        ValueError: the request is invalid, or does not fit the model.
    """
    try:
        length = len(body) if header_length is None else int(header_length)
    except ValueError:
        raise ValueError(f"{HEADER} is not a number") from None
    if not 0 <= length <= len(body):
        raise ValueError(f"{HEADER} is {length}, but the body has {len(body)} bytes")
    try:
        values = json.loads(body[:length])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the request is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError("the request is not a JSON object")
    known = {spec.name: spec for spec in takes}
    inputs: dict[str, Array] = {}
    rest = memoryview(body)[length:]
    for entry in objects(values, "inputs"):
        name = entry.get("name")
        if not isinstance(name, str) or name not in known or name in inputs:
            raise ValueError(f"input {short(name)} is unknown or repeated; {listed(known)}")
        inputs[name], rest = tensor(entry, known[name], rest)
    if len(rest):
        raise ValueError(f"{len(rest)} bytes follow the last tensor")
    wanted = []
    for entry in objects(values, "outputs"):
        if not isinstance(entry.get("name"), str):
            raise ValueError("an output has no name")
        if "classification" in parameters(entry):
            raise ValueError("classification is not supported here; use the model NAME_classify")
        wanted.append(Wanted(entry["name"], parameters(entry).get("binary_data") is True))
    identity = values.get("id", "")
    if not isinstance(identity, str):
        raise ValueError("id is not a string")
    return Request(
        identity, inputs, tuple(wanted), parameters(values).get("binary_data_output") is True
    )


def objects(values: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return a field that is a list of JSON objects; empty if it is missing.

    Raises:
        ValueError: the field is not such a list, or is too long.
    """
    entries = values.get(name, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{name} is not a list of objects")
    if len(entries) > MOST_TENSORS:
        raise ValueError(f"got {len(entries)} {name}; the limit is {MOST_TENSORS}")
    return entries


def parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object's parameters."""
    value = values.get("parameters", {})
    if not isinstance(value, dict):
        raise ValueError("parameters is not an object")
    return value


def tensor(
    entry: Mapping[str, Any], spec: TensorSpec, rest: memoryview
) -> tuple[Array, memoryview]:
    """Read one tensor; return it and the bytes that follow it.

    Raises:
        ValueError: the tensor does not fit the model, or its values do not fit its shape.
    """
    shape, datatype = entry.get("shape"), entry.get("datatype")
    valid = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not valid or len(shape or ()) > MOST_DIMENSIONS:
        raise ValueError(f"input {spec.name!r} has no shape")
    assert isinstance(shape, list)
    fits = len(shape) == len(spec.shape) and all(
        want in (-1, size) for want, size in zip(spec.shape, shape, strict=True)
    )
    if datatype != spec.datatype or not fits:
        raise ValueError(
            f"input {spec.name!r} is {short(datatype)} {short(shape)}; expected {spec.datatype} "
            f"{list(spec.shape)}"
        )
    count, size = math.prod(shape), parameters(entry).get("binary_data_size")
    if size is not None:
        if type(size) is not int or not 0 <= size <= len(rest):
            raise ValueError(f"input {spec.name!r} declares {size} bytes, but {len(rest)} are left")
        return from_bytes(rest[:size], spec, shape, count), rest[size:]
    if "data" not in entry:
        raise ValueError(f"input {spec.name!r} has no data")
    return from_json(entry["data"], spec, shape, count), rest


def from_bytes(content: memoryview, spec: TensorSpec, shape: list[int], count: int) -> Array:
    """Read a tensor's little-endian bytes; each string follows its length in 4 bytes."""
    if spec.datatype != "BYTES":
        dtype = DTYPES[spec.datatype]
        if len(content) != count * dtype.itemsize:
            raise ValueError(
                f"input {spec.name!r} has {len(content)} bytes, which does not fit shape {shape}"
            )
        return np.frombuffer(content, dtype).reshape(shape)
    parts: list[bytes] = []
    offset = 0
    while offset < len(content):
        if len(parts) == count or offset + 4 > len(content):
            break
        (size,) = struct.unpack_from("<I", content, offset)
        offset += 4
        if offset + size > len(content):
            break
        parts.append(bytes(content[offset : offset + size]))
        offset += size
    if offset != len(content) or len(parts) != count:
        raise ValueError(f"input {spec.name!r} is truncated or has more than {count} strings")
    return strings(parts, shape)


def from_json(data: Any, spec: TensorSpec, shape: list[int], count: int) -> Array:
    """Read a tensor's JSON values, nested or flat."""
    flat: list[Any] = []
    flatten(data, flat, count)
    if len(flat) != count:
        raise ValueError(f"input {spec.name!r} does not have the {count} values of shape {shape}")
    if spec.datatype == "BYTES":
        if not all(isinstance(value, str) for value in flat):
            raise ValueError(f"input {spec.name!r} contains values that are not strings")
        return strings([value.encode(errors="replace") for value in flat], shape)
    dtype = DTYPES[spec.datatype]
    allowed: tuple[type, ...] = (int, float) if dtype.kind == "f" else (int,)
    if not all(type(value) in allowed for value in flat):
        raise ValueError(f"input {spec.name!r} contains values that are not {spec.datatype}")
    try:
        array: Array = np.array(flat, dtype).reshape(shape)
    except OverflowError:
        raise ValueError(
            f"input {spec.name!r} has values outside the range of {spec.datatype}"
        ) from None
    return array


def flatten(data: Any, flat: list[Any], most: int, depth: int = 0) -> None:
    """Collect the values of nested lists, up to one more than `most`."""
    if not isinstance(data, list) or depth > MOST_DIMENSIONS:
        raise ValueError("data is not a list of values")
    for value in data:
        if isinstance(value, list):
            flatten(value, flat, most, depth + 1)
        else:
            flat.append(value)
        if len(flat) > most:
            return


def strings(parts: Sequence[bytes], shape: list[int]) -> Array:
    """Make an array of strings."""
    array = np.empty(len(parts), object)
    array[:] = parts
    return array.reshape(shape)


def respond(
    request: Request, model: str, version: str, results: Mapping[str, Array]
) -> tuple[bytes, dict[str, str]]:
    """Return the body and headers of a response.

    Raises:
        ValueError: the request asks for an output that the model does not have.
    """
    wanted = request.outputs or tuple(Wanted(name, request.binary) for name in results)
    entries, blobs = [], []
    for output in wanted:
        if output.name not in results:
            raise ValueError(f"output {short(output.name)} is unknown; {listed(results)}")
        array = results[output.name]
        is_text = array.dtype == object
        entry: dict[str, Any] = {
            "name": output.name,
            "datatype": "BYTES" if is_text else NAMES[array.dtype],
            "shape": list(array.shape),
        }
        if output.binary:
            blob = packed(array) if is_text else array.tobytes()
            entry["parameters"] = {"binary_data_size": len(blob)}
            blobs.append(blob)
        elif is_text:
            entry["data"] = [value.decode() for value in array.ravel()]
        else:
            entry["data"] = array.ravel().tolist()
        entries.append(entry)
    values = {"model_name": model, "model_version": version, "outputs": entries}
    head = json.dumps(values | ({"id": request.id} if request.id else {})).encode()
    if not blobs:
        return head, {"Content-Type": "application/json"}
    return b"".join([head, *blobs]), {
        "Content-Type": "application/octet-stream",
        HEADER: str(len(head)),
    }


def packed(array: Array) -> bytes:
    """Write strings as bytes, each after its length."""
    return b"".join(struct.pack("<I", len(value)) + value for value in array.ravel())


def short(value: object) -> str:
    """Quote a client's value in ASCII, truncated."""
    return ascii(value)[:SHOWN]


def listed(names: Mapping[str, Any]) -> str:
    """List the valid names for an error message."""
    return f"use {', '.join(names)}" if names else "there are none"


def metadata(
    name: str, version: str, takes: Sequence[TensorSpec], gives: Sequence[TensorSpec]
) -> dict[str, Any]:
    """Return a model's metadata response."""

    def described(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
        return [{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in specs]

    return {
        "name": name,
        "versions": [version],
        "platform": "adavipro_fast",
        "inputs": described(takes),
        "outputs": described(gives),
    }
