"""Other ways to run the model: Hugging Face, OpenVINO's converter, a plain export.

Peers use the same weights and images as our rows, and must pass the same check before they are
timed.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from adavipro_fast import AdaViPro
from adavipro_fast.artifact.openvino import SETTINGS
from adavipro_fast.export.onnx_file import quiet
from adavipro_fast.method.config import DTYPES
from adavipro_fast.method.encoder import FrozenEncoder
from lib.machine import no_openvino
from lib.paper_form import in_paper_form
from lib.subject import Outputs, Row, Subject

PEERS = "pip install 'adavipro_fast[peers]'"


def hugging_face(encoder: FrozenEncoder) -> nn.Module:
    """Return transformers' CLIP vision model with the weights of an open_clip image tower.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the tower is not a CLIP vision transformer.
    """
    try:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    except ImportError as error:
        raise ImportError(f"transformers is not installed; {PEERS}") from error
    visual = encoder.visual
    if not isinstance(visual, VisionTransformer):
        raise ValueError("transformers' CLIP has no such image tower")
    blocks: Any = visual.transformer.resblocks
    first = blocks[0]
    if (
        type(first) is not ResidualAttentionBlock
        or visual.pool_type != "tok"
        or isinstance(visual.ln_pre, nn.Identity)
        or not isinstance(first.ls_1, nn.Identity)
    ):
        raise ValueError("transformers' CLIP has no such image tower")
    weights = visual.state_dict()
    width, out = weights["proj"].shape
    settings = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=first.mlp.c_fc.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=first.attn.num_heads,
        image_size=encoder.preprocess.size,
        patch_size=visual.conv1.kernel_size[0],
        projection_dim=out,
        hidden_act="gelu" if isinstance(first.mlp.gelu, nn.GELU) else "quick_gelu",
    )
    twin: nn.Module = CLIPVisionModelWithProjection(settings)
    twin.load_state_dict(renamed(weights))
    return nn.Module.eval(twin).requires_grad_(False)


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of open_clip's vision transformer to transformers' names."""
    head = "vision_model."
    found = {
        f"{head}embeddings.class_embedding": weights["class_embedding"],
        f"{head}embeddings.patch_embedding.weight": weights["conv1.weight"],
        f"{head}embeddings.position_embedding.weight": weights["positional_embedding"],
        "visual_projection.weight": weights["proj"].t(),
    }
    names = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for name, value in weights.items():
        kind = name.rsplit(".", 1)[-1]
        if name.startswith(("ln_pre.", "ln_post.")):
            norm = "pre_layrnorm" if "pre" in name else "post_layernorm"
            found[f"{head}{norm}.{kind}"] = value
        if not name.startswith("transformer.resblocks."):
            continue
        number, rest = name.removeprefix("transformer.resblocks.").split(".", 1)
        layer = f"{head}encoder.layers.{number}."
        if rest.startswith("attn.in_proj_"):
            for part, share in zip("qkv", value.chunk(3), strict=True):
                found[f"{layer}self_attn.{part}_proj.{kind.removeprefix('in_proj_')}"] = share
        else:
            found[f"{layer}{names[rest.rsplit('.', 1)[0]]}.{kind}"] = value
    return found


def hugging_face_rows(
    encoder: FrozenEncoder, images: Tensor, *, precision: str, compiled: bool
) -> list[Row]:
    """Build transformers' rows on normalised images (B, 3, S, S)."""
    eager = Row("transformers_eager", "encoder_eager", "encoder", peer=True)
    rows = [eager, replace(eager, name="transformers_compiled", base="encoder_compiled")]
    try:
        twin = hugging_face(encoder).to(images.device, DTYPES[precision])
    except (ImportError, ValueError) as error:
        return [replace(row, skipped=str(error)) for row in rows]
    images = images.to(DTYPES[precision])

    @torch.inference_mode()
    def run(module: Callable[..., Any]) -> Outputs:
        embedding = module(pixel_values=images).image_embeds.float()
        return {"embedding": nn.functional.normalize(embedding, dim=-1)}

    rows[0] = replace(eager, work=lambda: run(twin))
    if compiled:
        optimised = torch.compile(twin, dynamic=False)
        rows[1] = replace(rows[1], work=lambda: run(optimised))
    else:
        rows[1] = replace(rows[1], skipped="--quick: no compiled rows")
    return rows


class Exported(nn.Module):
    """A model for a plain torch.onnx.export: tensors in, tensors out."""

    def __init__(self, model: AdaViPro, *, prompted: bool) -> None:
        super().__init__()
        self.model, self.prompted = model, prompted

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Embed normalised images (B, 3, S, S); the second output is the mask."""
        if not self.prompted:
            return (self.model.encoder(image),)
        prediction = self.model(image)
        return prediction.embedding, prediction.mask.to(torch.int32)


def plain_onnx_rows(model: AdaViPro, images: Tensor, folder: Path) -> list[Row]:
    """Build the rows of plain exports: the encoder, and the paper's form in front of it."""
    device = images.device
    if model.encoder.precision != "fp32":
        reason = "torch.onnx.export writes open_clip's half-precision graph with autocast's casts"
        return [
            Row(name, "onnx_baseline", contract, peer=True, skipped=reason)
            for name, contract in (
                ("onnx_plain_encoder", "encoder"),
                ("onnx_paper_form", "prompt + encoder"),
            )
        ]
    return [
        plain_onnx_row(Exported(in_paper_form(model), prompted=prompted), images, folder, device)
        for prompted in (False, True)
    ]


def plain_onnx_row(module: Exported, images: Tensor, folder: Path, device: torch.device) -> Row:
    """Export a module with torch.onnx.export alone, and open it in ONNX Runtime."""
    import onnxruntime

    name = "onnx_paper_form" if module.prompted else "onnx_plain_encoder"
    outputs = ["embedding", "mask"] if module.prompted else ["embedding"]
    path, began = folder / f"{name}.onnx", time.perf_counter()
    if not path.exists():
        with quiet():
            program = torch.onnx.export(
                copy.deepcopy(module).cpu(),
                (torch.zeros(2, *images.shape[1:]),),
                dynamo=True,
                input_names=["image"],
                output_names=outputs,
                dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1, max=4096)}},
                verbose=False,
            )
        assert program is not None
        program.save(path)
    cuda = device.type == "cuda"
    provider = "CUDAExecutionProvider" if cuda else "CPUExecutionProvider"
    exact = [{"use_tf32": "0"}] if cuda else None
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        str(path), options, providers=[provider], provider_options=exact
    )
    contract = "prompt + encoder" if module.prompted else "encoder"
    build_s = time.perf_counter() - began
    row = Row(name, "onnx_baseline", contract, peer=True, build_s=build_s)
    if session.get_providers()[0] != provider:
        return replace(row, skipped=f"ONNX Runtime has no {provider} here")
    feed = {"image": images.cpu().numpy()}

    def run() -> Outputs:
        arrays = session.run(outputs, feed)
        return dict(zip(outputs, map(torch.from_numpy, arrays), strict=True))

    return replace(row, work=run)


def converted_row(model: AdaViPro, images: Tensor) -> Row:
    """Build the row of open_clip's tower converted by OpenVINO."""
    row = Row("openvino_open_clip", "openvino_baseline", "encoder", peer=True)
    if model.encoder.precision != "fp32":
        return replace(row, skipped="OpenVINO is measured in fp32")
    if reason := no_openvino(images.device):
        return replace(row, skipped=reason)
    import openvino

    began = time.perf_counter()
    module, shape = Exported(model, prompted=False), images.shape[1:]
    example = torch.zeros(2, *shape)
    with quiet():
        converted = openvino.convert_model(module, input=[-1, *shape], example_input=example)
    compiled = openvino.Core().compile_model(converted, "CPU", SETTINGS)
    request, array = compiled.create_infer_request(), images.numpy()

    def run() -> Outputs:
        found = request.infer([array], share_inputs=True)
        return {"embedding": torch.from_numpy(found[0])}

    return replace(row, work=run, build_s=time.perf_counter() - began)


def peer_rows(subject: Subject, count: int, folder: Path, *, quick: bool) -> list[Row]:
    """Build the rows of a plain export, and of open_clip converted by OpenVINO."""
    images = subject.model.prompt.normalised(subject.sample[:count]).to(subject.device)
    if quick:
        names = ("onnx_plain_encoder", "onnx_paper_form", "openvino_open_clip")
        return [Row(name, name, "", skipped="--quick: no peer rows") for name in names]
    model = subject.twin(lean=False)
    return [*plain_onnx_rows(model, images, folder), converted_row(model, images)]
