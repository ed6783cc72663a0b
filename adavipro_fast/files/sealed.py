"""Exported files that carry their own digest: a file that is not what was written is refused."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adavipro_fast.files.about import Description
from adavipro_fast.files.checked import read
from adavipro_fast.files.whole import file_sha256

# An .onnx file carries its own sha256, computed with zeros in the place of the digest.
SEAL_KEY, UNSEALED = "content_sha256", "0" * 64
# How protobuf stores the entry: key, then a string of 64 bytes.
SEAL = SEAL_KEY.encode() + b"\x12\x40"
LARGEST_SIDECAR = 64 * 2**20


@dataclass(frozen=True)
class Built:
    """What a sidecar says of how its engine was built."""

    runtime: Literal["tensorrt", "tensorrt-rtx"]
    runtime_version: str
    compute_capabilities: tuple[str, ...]
    batch: tuple[int, ...]
    """smallest, usual and largest"""
    engine_sha256: str

    def __post_init__(self) -> None:
        if len(self.batch) != 3 or not 1 <= self.batch[0] <= self.batch[1] <= self.batch[2]:
            raise ValueError(f"batch is {list(self.batch)}; expected MIN, OPT, MAX")


def describe(path: Path) -> Description:
    """Read what an .onnx file or an engine says about itself; errors are theirs."""
    if path.suffix == ".engine":
        return Description.of(read_sidecar(path), path)
    if path.suffix != ".onnx" and path.is_file():
        raise ValueError(f"{path} is not an .onnx or .engine file; export it with adavipro-to-onnx")
    return describe_onnx(path)


def seal(content: bytes) -> bytes:
    """Put the content's own sha256 into its metadata."""
    place = content.rindex(SEAL) + len(SEAL)
    digest = hashlib.sha256(content).hexdigest().encode()
    return content[:place] + digest + content[place + len(digest) :]


def describe_onnx(path: Path) -> Description:
    """Read what a file says about itself, once it is found to be as it was exported.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged or not one of ours.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    content = path.read_bytes()
    place = content.rfind(SEAL) + len(SEAL)
    if place < len(SEAL):
        raise ValueError(
            f"{path} is truncated or was not exported by adavipro_fast; export a checkpoint with "
            "adavipro-to-onnx"
        )
    digest = content[place : place + 64]
    unsealed = content[:place] + UNSEALED.encode() + content[place + 64 :]
    if hashlib.sha256(unsealed).hexdigest().encode() != digest:
        raise ValueError(
            f"{path} is damaged: its content does not match its checksum; export it again"
        )
    import onnx

    data = path.with_name(path.name + ".data")
    try:
        model = onnx.load_model_from_string(content)
        values = metadata_of(model)
    except Exception as error:  # protobuf's own errors, nesting without end, ...
        raise ValueError(f"{path} is not an ONNX file of adavipro_fast: {error}") from error
    # A file may name any other file as the place of its weights.
    places = {
        entry.value
        for tensor in tensors_of(model)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    if places and (places != {data.name} or "data_sha256" not in values):
        own = next(iter(places))
        renamed = len(places) == 1 and own.endswith(".onnx.data") and own != data.name
        if renamed and Path(own).name == own:
            raise ValueError(
                f"{path} was exported as {own.removesuffix('.data')} with its weights in {own}; "
                "rename both files back"
            )
        raise ValueError(
            f"{path} refers to weights outside {data.name}, which is not allowed; export it again"
        )
    if places and not data.is_file():
        raise FileNotFoundError(f"{data} is missing; it contains the weights of {path.name}")
    if "data_sha256" in values and values["data_sha256"] != file_sha256(data):
        raise ValueError(
            f"{data} is damaged: its content does not match its checksum; export it again"
        )
    return Description.of(values, path)


def metadata_of(model: Any) -> dict[str, Any]:
    """Return what a graph says about itself, without its seal."""
    return {p.key: json.loads(p.value) for p in model.metadata_props if p.key != SEAL_KEY}


def tensors_of(message: Any) -> Iterator[Any]:
    """Yield every tensor inside a protobuf message: weights, constants, those of subgraphs."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if hasattr(value, "ListFields") else value:
            if type(part).__name__ == "TensorProto":
                yield part
            else:
                yield from tensors_of(part)


def save_sealed(model: Any, path: Path, metadata: dict[str, Any]) -> None:
    """Write a graph, what it says about itself and its own sha256, and check the file."""
    import onnx

    properties = {key: json.dumps(value) for key, value in metadata.items()}
    onnx.helper.set_model_props(model, properties | {SEAL_KEY: UNSEALED})
    path.write_bytes(seal(model.SerializeToString()))
    # Weights in a file of their own are more than the checker takes.
    onnx.checker.check_model(path, full_check="data_sha256" not in metadata)


def sidecar_path(engine: Path) -> Path:
    """Where an engine's sidecar lies."""
    return engine.with_name(engine.name + ".json")


def sidecar_sha256(values: dict[str, Any]) -> str:
    """Hash a sidecar's content, its own digest aside."""
    rest = {k: v for k, v in values.items() if k != "sidecar_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_sidecar(engine: Path) -> dict[str, Any]:
    """Read what an engine's sidecar says, once both files are found to be as they were built.

    Raises:
        FileNotFoundError: one of the two is missing.
        ValueError: one of the two is damaged.
    """
    path = sidecar_path(engine)
    for file in (engine, path):
        if not file.is_file():
            raise FileNotFoundError(f"no such file: {file}; build with adavipro-to-tensorrt")
    try:
        if path.stat().st_size > LARGEST_SIDECAR:
            raise ValueError(f"it is larger than {LARGEST_SIDECAR} bytes")
        values = json.loads(path.read_text())
        if sidecar_sha256(values) != values["sidecar_sha256"]:
            raise ValueError("its content does not match its checksum")
        expected = read(Built, values).engine_sha256
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"sidecar {path} is damaged: {error}; build the engine again") from error
    if file_sha256(engine) != expected:
        raise ValueError(f"{path.name} describes another engine than {engine}; build it again")
    return dict(values)


def write_sidecar(engine: Path, values: dict[str, Any]) -> None:
    """Write the sidecar with its own digest."""
    # Tuples become the lists that will be read back.
    values = json.loads(json.dumps(values))
    text = json.dumps(values | {"sidecar_sha256": sidecar_sha256(values)}, indent=1)
    sidecar_path(engine).write_text(text + "\n")
