"""Supported encoders: train, export, run and build a prompt for each family.

    python bench/encoders.py --json rows.json --markdown docs/pages/encoders.md

Weights are random, since only the architecture matters. Errors are reported as users see them.
"""

import gc
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tqdm import tqdm

from adavipro_fast import AdaViPro, PromptConfig, cli
from adavipro_fast.errors import VerificationError
from adavipro_fast.export import onnx_export, to_tensorrt
from adavipro_fast.export.graph import GraphKind
from adavipro_fast.export.patches import folding_obstacle
from adavipro_fast.files.checkpoint import checkpoint_of
from adavipro_fast.files.whole import write_whole
from adavipro_fast.method.clip import NoText, TextTower, load_clip
from adavipro_fast.method.config import Precision
from adavipro_fast.method.encoder import FrozenEncoder
from lib.families import ENCODERS, Encoder
from lib.machine import machine
from lib.table import Json

Form = tuple[GraphKind | None, Precision]

NAMES = ("cat", "dog", "bird")
LARGEST_REGION = 32
# TensorRT-RTX builds for these without a GPU: the GeForce 40 and 50 series.
BUILT_FOR = ("8.9", "12.0")


@dataclass(frozen=True)
class EncodersConfig:
    """Try each family of encoders."""

    encoder: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """names in lib/families.py; repeatable (default: all)"""
    engines: bool = True
    """build TensorRT-RTX engines too"""
    json: Json = None
    markdown: Annotated[Path | None, tyro.conf.arg(help="page for the table")] = None


def command(config: EncodersConfig) -> dict[str, Any]:
    """Try the encoders one after another."""
    chosen = [e for e in ENCODERS if not config.encoder or e.name in config.encoder]
    rows = []
    for encoder in tqdm(chosen, "encoders", disable=None):
        rows.append(tried(encoder, config.engines))
        gc.collect()
    result = {"machine": machine(torch.device("cpu")), "rows": rows}
    if config.json is not None:
        write_whole(config.json, (json.dumps(result, indent=1) + "\n").encode())
    if config.markdown is not None:
        write_whole(config.markdown, page(rows).encode())
    return result


def tried(encoder: Encoder, engines: bool) -> dict[str, Any]:
    """Train a prompt for an encoder by one step, then export it in every form."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, pretrained = encoder.written(folder)
        frozen, text = load_clip(model, pretrained)
        prompted = stepped(frozen, text)
        checkpoint = folder / "checkpoint.safetensors"
        checkpoint_of(prompted, NAMES).save(checkpoint)
        row: dict[str, Any] = {
            "family": encoder.family,
            "encoder": encoder.name,
            "loader": "timm" if isinstance(text, NoText) else "open_clip",
            "parameters": sum(p.numel() for p in frozen.visual.parameters()),
            "side": frozen.preprocess.size,
            "not_folded": folding_obstacle(frozen.visual),
            "head": prompted.config.head,
        }
        del prompted, frozen, text
        forms: list[Form] = [("pixel", "fp32"), (None, "fp32"), (None, "fp16")]
        for graph, precision in forms[1 if row["not_folded"] else 0 :]:
            form = f"{graph or 'own'}_{precision}"
            path = folder / f"{form}.onnx"
            config = onnx_export.OnnxConfig(
                checkpoint, path, graph=graph, precision=precision, input="uint8",
                model=model, pretrained=pretrained,
            )  # fmt: skip
            row |= exported(form, config)
        if engines and path.exists():
            row |= built(path)
    return row


def stepped(frozen: FrozenEncoder, text: TextTower | NoText) -> AdaViPro:
    """Put a prompt in front of an encoder, and train it by one step.

    Raises:
        VerificationError: no gradient reaches the template.
    """
    side = frozen.preprocess.size
    region = max(r for r in range(1, LARGEST_REGION + 1) if side % r == 0)
    linear = isinstance(text, NoText)
    config = PromptConfig(
        region_size=region, prompt_size=side // 6, embed_dim=3, edge="laplacian-magnitude",
        head="linear" if linear else "text",
    )  # fmt: skip
    pixels = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8)
    if isinstance(text, TextTower):
        rows, bias = text.class_embeddings(NAMES, ["{}"]), None
    else:
        with torch.no_grad():
            width = frozen.embed(torch.zeros(1, 3, side, side))[0].shape[1]
        rows, bias = torch.nn.functional.normalize(torch.randn(3, width)), torch.zeros(3)
    model = AdaViPro(frozen, rows, config, class_bias=bias).train()
    model.prompt.initialise(pixels)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    logits = model(pixels, seed=1).logits
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    assert model.prompt.template is not None
    if not any(p.grad is not None and p.grad.any() for p in model.prompt.template.parameters()):
        raise VerificationError("no gradient reaches the template")
    optimiser.step()
    return model.eval()


def exported(form: str, config: onnx_export.OnnxConfig) -> dict[str, Any]:
    """Export; return the file's difference from PyTorch, or the error."""
    try:
        result = onnx_export.export(config)
    except (ValueError, VerificationError) as error:
        return {f"{form}_refused": str(error).split("\n")[0]}
    return {
        f"{form}_graph": result["graph"],
        f"{form}_error": result["max_abs_error"],
        f"{form}_cosine": result["min_cosine"],
        f"{form}_masks": result["mask_agreement"],
        f"{form}_nodes": result["nodes"],
    }


def built(path: Path) -> dict[str, Any]:
    """Build a TensorRT-RTX engine; return its result, or the error."""
    config = to_tensorrt.TensorRtConfig(
        path, path.with_suffix(".engine"), runtime="tensorrt-rtx",
        compute_capability=BUILT_FOR, batch="1,4,16", builder_level=0,
    )  # fmt: skip
    try:
        result = to_tensorrt.command(config)
    except (ValueError, VerificationError, RuntimeError) as error:
        return {"engine": False, "engine_refused": str(error).split("\n")[0]}
    return {"engine": True, "engine_bytes": result["bytes"]}


HEADER = """# Encoders

`bench/encoders.py` writes this page. For each family it builds a small architecture with random
weights, trains a prompt for one step, and exports it. Larger models of a family differ in width
and depth only.

- *Graph*: `folded` adds the prompt to the patch tokens, `pixel` adds it to the image.
- *fp32*: the largest difference from PyTorch in an element of the unit-length embedding.
- *fp16*: the cosine similarity with PyTorch's embedding, of the worst image.
- *Engine*: whether TensorRT-RTX built the fp16 file for compute capability {built}. The engines
  were not run.

Masks agree with PyTorch on every region, except where the decision is within rounding of 0.

| family | tried with | loaded by | graph | fp32 | fp16 | engine |
| --- | --- | --- | --- | --- | --- | --- |
"""


def page(rows: list[dict[str, Any]]) -> str:
    """Format the rows as a page, with errors below the table."""
    text = HEADER.format(built=" and ".join(BUILT_FOR))
    refused = []
    for row in rows:
        shown = {}
        for column, key in (("own_fp32", "error"), ("own_fp16", "cosine"), ("engine", "")):
            reason = row.get(f"{column}_refused")
            if reason:
                refused.append(f"- {row['family']}, {column.removeprefix('own_')}: {reason}")
            value = row.get(f"{column}_{key}" if key else column)
            shown[column] = "refused" if reason or value in (None, False) else value
        error, cosine = shown["own_fp32"], shown["own_fp16"]
        cells = [
            row["family"],
            row["encoder"],
            row["loader"],
            row.get("own_fp32_graph", "-"),
            error if isinstance(error, str) else f"{error:.0e}",
            cosine if isinstance(cosine, str) else f"{cosine:.6f}",
            shown["engine"] if isinstance(shown["engine"], str) else "built",
        ]
        text += f"| {' | '.join(cells)} |\n"
    return text + ("\n## Not supported\n\n" + "\n".join(refused) + "\n" if refused else "")


def main() -> None:
    """Parse, run, print."""
    cli.main(EncodersConfig, command)


if __name__ == "__main__":
    main()
