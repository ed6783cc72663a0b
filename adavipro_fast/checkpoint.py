"""Read and write `checkpoint.safetensors`; every artefact appears only when it is whole."""

import json
import os
import secrets
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from adavipro_fast.clip import FrozenEncoder, Preprocess
from adavipro_fast.functional import check_region
from adavipro_fast.prompt import PROMPTED, AdaViPro, PromptConfig, frame

FORMAT = "adavipro-fast/1"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under its final name only when all of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, and never a file or link that is there already.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Serialise tensors and JSON metadata, the same bytes for the same content.

    safetensors itself writes metadata in a random order.
    """
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    content = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, texts)
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and JSON metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole safetensors file, metadata not JSON, or values not finite.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            metadata = {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # Not only SafetensorError: types that torch lacks, nesting without end, ...
    except Exception as error:
        raise ValueError(
            f"{path} is not a whole safetensors file of ours: {error}; make it again"
        ) from error
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.float().isfinite().all()):
            raise ValueError(f"{path}: tensor {name!r} holds NaN or infinity; train it again")
    return tensors, metadata


@dataclass(frozen=True)
class EncoderIdentity:
    """Which frozen encoder a checkpoint belongs to."""

    name: str
    pretrained: str
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A trained prompt without its encoder; see `save` for the tensors."""

    tensors: dict[str, Tensor]
    config: PromptConfig
    class_names: tuple[str, ...]
    encoder: EncoderIdentity
    preprocess: Preprocess

    def save(self, path: Path) -> None:
        """Write `prompt` (3,S,S), generator weights, `class_embeddings` (K,E), `logit_scale` ()."""
        metadata = {
            "format": FORMAT,
            "config": asdict(self.config),
            "class_names": self.class_names,
            "encoder": asdict(self.encoder),
            "preprocess": self.preprocess.stored(),
        }
        write_whole(path, safetensors_bytes(self.tensors, metadata))

    def model(self, encoder: FrozenEncoder) -> AdaViPro:
        """Put the prompt in front of its encoder, in evaluation mode.

        Raises:
            ValueError: the encoder's weights or images are not those of the prompt's training.
        """
        if encoder.sha256 != self.encoder.sha256:
            raise ValueError(
                f"the encoder {encoder.name!r} ({encoder.sha256[:12]}) is not the one this "
                f"checkpoint was trained on, {self.encoder.name!r} ({self.encoder.sha256[:12]}); "
                "name that one with --model and --pretrained"
            )
        encoder.prepare_by(self.preprocess)
        model = AdaViPro(encoder, self.tensors["class_embeddings"], self.config)
        load_prompt(model, self.tensors)
        encoder.logit_scale = self.tensors["logit_scale"].item()
        return model.eval()


def prompt_tensors(model: AdaViPro) -> dict[str, Tensor]:
    """Copy the trained tensors of a model, named as in the checkpoint."""
    tensors = {"prompt": model.prompt.template()}
    if model.prompt.generator is not None:
        tensors |= model.prompt.generator.state_dict()
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


def load_prompt(model: AdaViPro, tensors: Mapping[str, Tensor]) -> None:
    """Give a model the trained tensors that `prompt_tensors` named."""
    model.prompt.template.load(tensors["prompt"])
    if model.prompt.generator is not None:
        names = model.prompt.generator.state_dict()
        model.prompt.generator.load_state_dict({name: tensors[name] for name in names})


def checkpoint_of(model: AdaViPro, class_names: tuple[str, ...]) -> Checkpoint:
    """Take a model's trained prompt as a checkpoint."""
    encoder = model.encoder
    tensors = prompt_tensors(model)
    tensors["class_embeddings"] = model.class_embeddings.detach().cpu().clone()
    tensors["logit_scale"] = torch.tensor(encoder.logit_scale)
    identity = EncoderIdentity(encoder.name, encoder.pretrained, encoder.sha256)
    return Checkpoint(tensors, model.prompt.config, class_names, identity, encoder.preprocess)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint.

    Raises:
        FileNotFoundError: no such file.
        ValueError: cut short, not ours, a tensor missing or of the wrong shape, or not finite.
    """
    return checked_checkpoint(path, *read_safetensors(path))


def checked_checkpoint(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]
) -> Checkpoint:
    """Check what `read_safetensors` gave; errors are `load_checkpoint`'s."""
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} has format {metadata.get('format')!r}; {FORMAT!r} is needed")
    try:
        checkpoint = Checkpoint(
            tensors,
            parse(PromptConfig, metadata["config"]),
            tuple(str(name) for name in metadata["class_names"]),
            parse(EncoderIdentity, metadata["encoder"]),
            parse(Preprocess, metadata["preprocess"]),
        )
        if checkpoint.config.method not in PROMPTED:
            raise ValueError(f"method {checkpoint.config.method} has no prompt")
        check_region(checkpoint.preprocess.size, checkpoint.config.region_size)
        frame(checkpoint.preprocess.size, checkpoint.config.prompt_size)
        _check_shapes(checkpoint)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint that can be used: {error}") from error
    return checkpoint


def parse(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """Build a frozen dataclass from JSON, checking names, types and literal choices."""
    hints = get_type_hints(kind)
    known = {field.name for field in fields(kind)}
    arguments = {key: value for key, value in values.items() if key in known}
    for name, value in arguments.items():
        choices = get_args(hints[name])
        if hints[name] in (int, str) and type(value) is not hints[name]:
            raise ValueError(f"{name} is {value!r}; {hints[name].__name__} is needed")
        if isinstance(value, list):
            try:
                arguments[name] = tuple(float(number) for number in value)
            except OverflowError as error:
                raise ValueError(f"{name} holds a number too large") from error
        elif choices and Ellipsis not in choices and value not in choices:
            raise ValueError(f"{name} is {value!r}; use one of {', '.join(map(str, choices))}")
    return kind(**arguments)


def _check_shapes(checkpoint: Checkpoint) -> None:
    side, config = checkpoint.preprocess.size, checkpoint.config
    width, region = config.embed_dim, config.region_size
    expected: dict[str, tuple[int | None, ...]] = {
        "prompt": (3, side, side),
        "class_embeddings": (len(checkpoint.class_names), None),
        "logit_scale": (),
    }
    if config.method == "adavipro":
        expected |= {
            "convergence.weight": (width, 3, 3, 3),
            "convergence.bias": (width,),
            "policy.weight": (2, width, region, region),
            "policy.bias": (2,),
        }
    for name, shape in expected.items():
        if name not in checkpoint.tensors:
            raise ValueError(f"tensor {name!r} is missing")
        got = tuple(checkpoint.tensors[name].shape)
        if len(got) != len(shape) or any(
            w not in (None, g) for w, g in zip(shape, got, strict=True)
        ):
            raise ValueError(f"tensor {name!r} has shape {got}; {shape} is needed")
        if checkpoint.tensors[name].dtype != torch.float32:
            raise ValueError(f"tensor {name!r} is {checkpoint.tensors[name].dtype}; fp32 is needed")
