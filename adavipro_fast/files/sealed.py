"""Read and write exported files with a checksum; damaged files are rejected."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adavipro_fast.files.about import Description
from adavipro_fast.files.checked import read
from adavipro_fast.files.whole import file_sha256

# An .onnx file contains its own sha256, computed with zeros where the digest goes.
SEAL_KEY, UNSEALED = "content_sha256", "0" * 64
# The entry's encoding in protobuf: the key, then a string of 64 bytes.
SEAL = SEAL_KEY.encode() + b"\x12\x40"
LARGEST_SIDECAR = 64 * 2**20


@dataclass(frozen=True)
class Built:
    """How an engine was built, from its sidecar."""

    runtime: Literal["tensorrt", "tensorrt-rtx"]
    runtime_version: str
    compute_capabilities: tuple[str, ...]
    batch: tuple[int, ...]
    """smallest, optimal and largest"""
    engine_sha256: str

    def __post_init__(self) -> None:
        if len(self.batch) != 3 or not 1 <= self.batch[0] <= self.batch[1] <= self.batch[2]:
            raise ValueError(f"batch is {list(self.batch)}; expected MIN, OPT, MAX")


def describe(path: Path) -> Description:
    """Read the description of an .onnx file or an engine.

    Raises the errors of `describe_onnx` and `read_sidecar`.
    """
    if path.suffix == ".engine":
        return Description.of(read_sidecar(path), path)
    if path.suffix != ".onnx" and path.is_file():
        raise ValueError(f"{path} is not an .onnx or .engine file; export it with adavipro-to-onnx")
    return describe_onnx(path)


def seal(content: bytes) -> bytes:
    """Insert the content's sha256 into its metadata."""
    start = content.rindex(SEAL) + len(SEAL)
    digest = hashlib.sha256(content).hexdigest().encode()
    return content[:start] + digest + content[start + len(digest) :]


def describe_onnx(path: Path) -> Description:
    """Verify an .onnx file's checksums and read its description.

    Raises:
        FileNotFoundError: the file or its weights do not exist.
        ValueError: the file is damaged or not one of ours.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    content = path.read_bytes()
    start = content.rfind(SEAL) + len(SEAL)
    if start < len(SEAL):
        raise ValueError(
            f"{path} is truncated or was not exported by adavipro_fast; export a checkpoint with "
            "adavipro-to-onnx"
        )
    digest = content[start : start + 64]
    unsealed = content[:start] + UNSEALED.encode() + content[start + 64 :]
    if hashlib.sha256(unsealed).hexdigest().encode() != digest:
        raise ValueError(
            f"{path} is damaged: its content does not match its checksum; export it again"
        )
    import onnx

    data = path.with_name(path.name + ".data")
    try:
        model = onnx.load_model_from_string(content)
        values = metadata_of(model)
    except Exception as error:  # protobuf's errors, RecursionError, ...
        raise ValueError(f"{path} is not an ONNX file of adavipro_fast: {error}") from error
    # A hostile file could name any other file as the location of its weights.
    locations = {
        entry.value
        for tensor in tensors_of(model)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    if locations and (locations != {data.name} or "data_sha256" not in values):
        own = next(iter(locations))
        renamed = len(locations) == 1 and own.endswith(".onnx.data") and own != data.name
        if renamed and Path(own).name == own:
            raise ValueError(
                f"{path} was exported as {own.removesuffix('.data')} with its weights in {own}; "
                "rename both files back"
            )
        raise ValueError(
            f"{path} refers to weights outside {data.name}, which is not allowed; export it again"
        )
    if locations and not data.is_file():
        raise FileNotFoundError(f"{data} is missing; it contains the weights of {path.name}")
    if "data_sha256" in values and values["data_sha256"] != file_sha256(data):
        raise ValueError(
            f"{data} is damaged: its content does not match its checksum; export it again"
        )
    return Description.of(values, path)


def metadata_of(model: Any) -> dict[str, Any]:
    """Return a graph's metadata without the checksum."""
    return {p.key: json.loads(p.value) for p in model.metadata_props if p.key != SEAL_KEY}


def tensors_of(message: Any) -> Iterator[Any]:
    """Yield every tensor in a protobuf message: weights, constants, and those of subgraphs."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if hasattr(value, "ListFields") else value:
            if type(part).__name__ == "TensorProto":
                yield part
            else:
                yield from tensors_of(part)


def save_sealed(model: Any, path: Path, metadata: dict[str, Any]) -> None:
    """Write a graph with its metadata and sha256, and check the file with onnx."""
    import onnx

    properties = {key: json.dumps(value) for key, value in metadata.items()}
    onnx.helper.set_model_props(model, properties | {SEAL_KEY: UNSEALED})
    path.write_bytes(seal(model.SerializeToString()))
    # The full check does not support weights in a separate file.
    onnx.checker.check_model(path, full_check="data_sha256" not in metadata)


def sidecar_path(engine: Path) -> Path:
    """Return the path of an engine's sidecar."""
    return engine.with_name(engine.name + ".json")


def sidecar_sha256(values: dict[str, Any]) -> str:
    """Hash a sidecar's content except its own digest."""
    rest = {k: v for k, v in values.items() if k != "sidecar_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_sidecar(engine: Path) -> dict[str, Any]:
    """Verify the checksums of an engine and its sidecar, and read the sidecar.

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
    # Convert to the form in which it is read back: tuples become lists.
    values = json.loads(json.dumps(values))
    text = json.dumps(values | {"sidecar_sha256": sidecar_sha256(values)}, indent=1)
    sidecar_path(engine).write_text(text + "\n")
