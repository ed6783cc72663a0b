"""Read and write checkpoints: `checkpoint.safetensors`, and the files of the baselines.

`head.safetensors` contains a linear probe, `encoder.safetensors` a fine-tuned image tower.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adavipro_fast.files.checked import read
from adavipro_fast.files.hub import CHECKPOINT
from adavipro_fast.files.whole import (
    check_tensors,
    read_safetensors,
    safetensors_bytes,
    write_whole,
)
from adavipro_fast.method.calibration import UNCALIBRATED, Calibration
from adavipro_fast.method.config import PROMPTED, EncoderIdentity, Kernel, Method, PromptConfig
from adavipro_fast.method.functional import check_region
from adavipro_fast.method.head import BIAS, ROWS, SCALE, Head, HeadRows
from adavipro_fast.method.model import AdaViPro
from adavipro_fast.method.preprocess import Preprocess, completed
from adavipro_fast.method.prompt import frame

if TYPE_CHECKING:
    from adavipro_fast.method.encoder import FrozenEncoder

FORMAT, BASELINE_FORMAT = "adavipro-fast/1", "adavipro-fast-baseline/1"
FILES = {"linear_probe": "head.safetensors", "full_finetune": "encoder.safetensors"}
TOWER = "visual."
# Names of a probe's tensors in head.safetensors.
PROBE = {"head.weight": ROWS, "head.bias": BIAS}


def file_of(method: Method) -> str:
    """Return the name of the file in which training keeps a method's model."""
    return FILES.get(method, CHECKPOINT)


@dataclass(frozen=True)
class Checkpoint:
    """A trained model without its frozen encoder.

    Tensors: `prompt` (3, S, S) and the generator's weights; `class_embeddings` (K, E), or (K, F)
    for a head on features; `class_bias` (K,) of a linear head; `logit_scale` (); those of a
    fine-tuned tower, prefixed `visual.`.
    """

    tensors: dict[str, Tensor]
    config: PromptConfig
    class_names: tuple[str, ...]
    encoder: EncoderIdentity
    preprocess: Preprocess
    calibration: Calibration = UNCALIBRATED
    templates: tuple[str, ...] = ()
    """text templates that class names were embedded with; empty for other heads and in older
    files"""

    @property
    def head(self) -> HeadRows:
        """The head's stored rows and bias, unscaled."""
        reads = self.config.head_input or "embedding"
        return HeadRows(self.tensors[ROWS], self.tensors.get(BIAS), reads)

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        baseline = self.config.method in FILES
        metadata = {
            "format": BASELINE_FORMAT if baseline else FORMAT,
            "config": self.config.stored(),
            "class_names": self.class_names,
            "encoder": self.encoder.stored(),
            "preprocess": self.preprocess.stored(),
            "calibration": asdict(self.calibration),
            "templates": self.templates,
        }
        tensors = self.tensors
        if self.config.method == "linear_probe":
            tensors = {name: tensors[ours] for name, ours in PROBE.items()}
        write_whole(path, safetensors_bytes(tensors, metadata))

    def model(self, encoder: "FrozenEncoder", kernel: Kernel = "auto") -> AdaViPro:
        """Put the prompt in front of its encoder, in evaluation mode.

        Raises:
            ValueError: the encoder's weights or image size differ from those of training.
        """
        self.check_encoder(encoder)
        encoder = encoder.with_(preprocess=replace(self.preprocess, margin=0))
        if self.config.method == "full_finetune":
            encoder = encoder.thawed()
        scale, projection, rows = self.tensors.get(SCALE), encoder.projection, self.tensors[ROWS]
        if projection is not None:
            width = projection.shape[0 if self.config.head_input == "features" else 1]
            if rows.shape[1] != width:
                got = tuple(rows.shape)
                raise ValueError(
                    f"the head has shape {got}, but the encoder's output has {width} elements"
                )
        model = AdaViPro(
            encoder,
            rows,
            self.config,
            class_bias=self.tensors.get(BIAS),
            logit_scale=None if scale is None else scale.item(),
            kernel=kernel,
        )
        load_trained(model, self.tensors)
        model.encoder.requires_grad_(False)
        return model.eval()

    def check_encoder(self, encoder: "FrozenEncoder") -> None:
        """Raise ValueError unless the prompt was trained with this encoder's weights."""
        if encoder.sha256 != self.encoder.sha256:
            raise ValueError(
                f"the encoder {encoder.name!r} ({encoder.sha256[:12]}) is not the one this "
                f"checkpoint was trained on, {self.encoder.name!r} ({self.encoder.sha256[:12]}); "
                "select that one with --model and --pretrained"
            )


def trained_tensors(model: AdaViPro) -> dict[str, Tensor]:
    """Copy the trained tensors of a model, named as in the checkpoint."""
    tensors = {}
    if model.prompt.template is not None:
        tensors["prompt"] = model.prompt.template()
    if model.prompt.generator is not None:
        tensors |= model.prompt.generator.state_dict()
    tensors |= model.head.trained()
    if model.config.method == "full_finetune":
        tower = model.encoder.visual.state_dict()
        tensors |= {TOWER + name: value for name, value in tower.items()}
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


def load_trained(model: AdaViPro, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors named as by `trained_tensors` into a model."""
    if model.prompt.template is not None:
        model.prompt.template.load(tensors["prompt"])
    if model.prompt.generator is not None:
        names = model.prompt.generator.state_dict()
        model.prompt.generator.load_state_dict({name: tensors[name] for name in names})
    model.head.load(tensors)
    if model.config.method == "full_finetune":
        tower = {k.removeprefix(TOWER): v for k, v in tensors.items() if k.startswith(TOWER)}
        try:
            model.encoder.visual.load_state_dict(tower)
        except RuntimeError as error:
            raise ValueError(f"the weights do not fit this image encoder: {error}") from error


def checkpoint_of(
    model: AdaViPro, class_names: tuple[str, ...], templates: tuple[str, ...] = ()
) -> Checkpoint:
    """Make a checkpoint of a model."""
    encoder = model.encoder
    tensors = trained_tensors(model) | model.head.stored()
    identity = EncoderIdentity(encoder.name, encoder.pretrained, encoder.sha256, encoder.quick_gelu)
    return Checkpoint(
        tensors, model.config, class_names, identity, model.preprocess, templates=templates
    )


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated or not ours, or a tensor is missing, has the wrong shape
            or is not finite.
    """
    if path.suffix in (".onnx", ".engine") and path.is_file():
        raise ValueError(
            f"{path} is an exported file; expected a checkpoint, such as checkpoint.safetensors"
        )
    return checked_checkpoint(path, *read_safetensors(path))


def checked_checkpoint(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]
) -> Checkpoint:
    """Check the output of `read_safetensors`; raises the errors of `load_checkpoint`."""
    if metadata.get("format") not in (FORMAT, BASELINE_FORMAT):
        raise ValueError(f"{path} has format {metadata.get('format')!r}; expected {FORMAT!r}")
    try:
        config, preprocess = read_settings(metadata)
        if config.method == "linear_probe":
            tensors = {PROBE.get(name, name): value for name, value in tensors.items()}
            config = replace(config, head="linear", head_input=config.head_input or "features")
        checkpoint = Checkpoint(
            tensors,
            config,
            tuple(str(name) for name in metadata["class_names"]),
            read(EncoderIdentity, metadata["encoder"]),
            preprocess,
            read(Calibration, metadata.get("calibration", {})),
            tuple(str(template) for template in metadata.get("templates", ())),
        )
        _check_shapes(checkpoint)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a valid checkpoint: {error}") from error
    return checkpoint


def read_settings(metadata: Mapping[str, Any]) -> tuple[PromptConfig, Preprocess]:
    """Read the settings of the prompt and the preprocessing from a file's metadata.

    Raises:
        KeyError: one of the two is missing.
        ValueError: one of the two is invalid, or they do not fit together.
    """
    preprocess: Preprocess = read(Preprocess, completed(metadata["preprocess"]))
    config: PromptConfig = read(PromptConfig, metadata["config"])
    config = replace(config, margin=preprocess.margin)
    check_region(preprocess.size, config.region_size)
    if config.method in PROMPTED:
        frame(preprocess.size, config.prompt_size)
    return config, preprocess


def _check_shapes(checkpoint: Checkpoint) -> None:
    side, config = checkpoint.preprocess.size, checkpoint.config
    width, region, classes = config.embed_dim, config.region_size, len(checkpoint.class_names)
    expected = Head.shapes(config, classes)
    if config.method in PROMPTED:
        expected["prompt"] = (3, side, side)
    if config.method == "adavipro":
        expected |= {
            "convergence.weight": (width, 3, 3, 3),
            "convergence.bias": (width,),
            "policy.weight": (2, width, region, region),
            "policy.bias": (2,),
        }
    check_tensors(checkpoint.tensors, expected)
