"""Measure the fused kernel against PyTorch, eager and compiled, with a correctness gate first.

    python bench/fused.py --json bench/results/fused.json
    python bench/fused.py --tune

Inputs are uint8 pixels and outputs bf16 images. Calls are captured as CUDA graphs over several sets
of tensors that do not fit into L2, so that neither the host nor a cache is measured. Bytes are
counted, not measured: those that a pass must move once, including backward's partial sums. Rows:
`copy`; `masks` of 10,000 images; the kernels alone by shape; each form of the prompt forward,
forward and backward, and backward as the difference of the two. Without a CUDA device, only the
gate runs, in Triton's interpreter.
"""

import os
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Annotated, Any, Literal

import torch
import tyro

if not torch.cuda.is_available():
    # Set before the imports below: Triton reads it when imported, which open_clip does.
    os.environ["TRITON_INTERPRET"] = "1"

from torch import Tensor

from adavipro_fast import cli
from adavipro_fast.device import full_fp32, torch_device
from adavipro_fast.method.functional import Edge
from lib.launches import Launches, Shape, moved_bytes, partial_sum_bytes
from lib.table import Append, Json, Rows
from lib.timing import graphed, interleaved_ms, paired_ratio, summary, timed_ms
from lib.variants import (
    NAMES,
    Setting,
    Variant,
    copy_gb_s,
    errors,
    gate,
    mask_differences,
    pixels_of,
    variants,
)

Part = Literal["masks", "kernels", "variants"]
PARTS: tuple[Part, ...] = ("kernels", "masks", "variants")
ODD = (Shape(5, 14, side=56), Shape(3, 32, side=96), Shape(17, 7, side=28))


@dataclass(frozen=True)
class FusedConfig:
    """Time the fused kernel against PyTorch, eager and compiled."""

    batch: int = 256
    """images per call"""
    region_size: int = 32
    """side of a region, pixels"""
    edge: Edge = "laplacian-magnitude"
    """edge detector of the forms; the kernels alone run the default"""
    rounds: int = 30
    """timed calls of each row"""
    part: Annotated[tuple[Part, ...], tyro.conf.UseAppendAction] = ()
    """measure these rows only; repeatable (default: all)"""
    tune: bool = False
    """time launch options instead, to choose those of `launch_options`"""
    build: bool = False
    """compile what would be timed, and time nothing"""
    launch: Literal["no", "shape", "odd"] = "no"
    """launch both kernels and time nothing, for a profiler or a memory checker"""
    rehearse: bool = False
    """run every row tiny on a CPU, to see that the bench works; its times mean nothing"""
    json: Json = None
    append: Append = False
    side: tyro.conf.Suppress[int] = 224


def shapes(config: FusedConfig) -> list[Shape]:
    """Return the shapes for the rows of the kernels alone, the configuration's first."""
    first = Shape(config.batch, config.region_size, side=config.side)
    if config.rehearse:
        return [replace(first, dtype=torch.float32)]
    others = [replace(first, region=region) for region in (16, 56, 8, 14)]
    sizes = [replace(first, batch=batch) for batch in (8 * config.batch, 32)]
    return list(dict.fromkeys([first, *sizes, *others, replace(first, dtype=torch.float32)]))


def kernel_rows(config: FusedConfig, device: torch.device, rows: Rows) -> None:
    """Time the kernels alone by shape, as a share of the copy bandwidth."""
    size = 2**20 if config.rehearse else 2**31
    copied = rows.attempt("copy", lambda: copy_gb_s(device, size, config.rounds)) or float("nan")
    rows.append({"name": "copy", "gb_s": copied, "bytes": size})
    for shape in shapes(config):
        name = f"kernels_{shape.batch}_{shape.region}"
        rows.attempt(name, partial(one_shape, shape, config, copied, rows))


def one_shape(shape: Shape, config: FusedConfig, copied: float, rows: Rows) -> None:
    """Time both kernels at one shape."""
    device, large = rows.device, shape.batch > 256
    launches = Launches(shape, device, sets=1 if config.rehearse else 2 if large else 4)
    calls = 1 if config.rehearse else 4 if large else 16
    works = {p: graphed(getattr(launches, p), device, calls=calls) for p in ("forward", "backward")}
    if config.build:
        return
    times = interleaved_ms(works, device, rounds=config.rounds, warm_up=0 if config.rehearse else 2)
    for part in works:
        figures = {key: value / calls for key, value in summary(times[part]).items()}
        gb_s = launches.moved_bytes(part) / figures["median_ms"] / 1e6
        about = {"batch": shape.batch, "region": shape.region, "dtype": str(shape.dtype)[6:]}
        chosen = {key: launches.constants[key] for key in ("IMAGES", "num_warps")}
        bandwidth = {
            "bytes": launches.moved_bytes(part),
            "gb_s": gb_s,
            "share_of_copy": gb_s / copied,
        }
        rows.append({"name": f"kernel_{part}", **about, **chosen, **figures, **bandwidth})


def captured(
    found: dict[str, Variant], pixels: list[Tensor], device: torch.device, rows: Rows
) -> dict[str, tuple[Any, int]]:
    """Capture forward, and forward with backward, of every form; return replays and calls."""
    upstream = torch.randn(pixels[0].shape, device=device)
    upstream = upstream.bfloat16() if device.type == "cuda" else upstream
    replays = {}
    for (name, variant), part in product(found.items(), ("forward", "both")):

        def forward(call: int, variant: Variant = variant) -> Tensor:
            with torch.no_grad():
                return variant.forward(pixels[call % len(pixels)])

        def both(call: int, variant: Variant = variant) -> tuple[Tensor, ...]:
            return variant.both(pixels[call % len(pixels)], upstream)

        # The paper form's maps need gigabytes per call.
        calls = 1 if name.startswith("paper") else len(pixels)
        work = forward if part == "forward" else both
        replay = rows.attempt(f"{name}_{part}", partial(graphed, work, device, calls=calls))
        if replay is not None:
            replays[f"{name}_{part}"] = (replay, calls)
    return replays


def variant_rows(config: FusedConfig, device: torch.device, rows: Rows) -> None:
    """Time complete prompts in every form, forward and backward."""
    setting = Setting(config.batch, config.region_size, config.edge, config.side, device)
    found = variants(setting)
    if config.rehearse:
        found = {name: one for name, one in found.items() if "compiled" not in name}
    pixels = [pixels_of(setting) for _ in range(1 if config.rehearse else 3)]
    replays = captured(found, pixels, device, rows)
    if config.build:
        return
    works = {name: replay for name, (replay, _) in replays.items()}
    raw = interleaved_ms(works, device, rounds=config.rounds, warm_up=0 if config.rehearse else 2)
    times = {name: [ms / replays[name][1] for ms in raw[name]] for name in raw}
    for name in found:
        if {f"{name}_forward", f"{name}_both"} <= times.keys():
            pairs = zip(times[f"{name}_both"], times[f"{name}_forward"], strict=True)
            times[f"{name}_backward"] = [both - forward for both, forward in pairs]
    moved = bytes_moved(config)
    for name, taken in times.items():
        part = name.rpartition("_")[2]
        figures: dict[str, Any] = {"name": name, "batch": config.batch, **summary(taken)}
        if base := times.get(f"fused_{part}"):
            figures["ratio_to_fused"] = paired_ratio(taken, base)
        if part == "forward":
            figures["call_ms"] = timed_ms(partial(captured_once, found, name, pixels), device)
        rows.append(figures | {"gb_s": moved[part] / figures["median_ms"] / 1e6})


def captured_once(found: dict[str, Variant], name: str, pixels: list[Tensor]) -> Tensor:
    """Call a form's forward pass eagerly, so that the host's time is included."""
    with torch.no_grad():
        return found[name.removesuffix("_forward")].forward(pixels[0])


def bytes_moved(config: FusedConfig) -> dict[str, int]:
    """Count the bytes that each pass of a prompt must move; partial sums are written and read."""
    from adavipro_fast.kernels.adaptive_prompt import launch_options

    shape = Shape(config.batch, config.region_size, side=config.side)
    images = launch_options(config.side, config.region_size, config.batch)["IMAGES"]
    moved = {part: moved_bytes(part, shape, images) for part in ("forward", "backward")}
    moved["backward"] += partial_sum_bytes(config.side, config.region_size, config.batch, images)
    return moved | {"both": sum(moved.values())}


def mask_rows(config: FusedConfig, device: torch.device, rows: Rows) -> None:
    """Compare with float64 at full size, and the masks of 10,000 images with the plain form's."""
    setting = Setting(min(config.batch, 64), config.region_size, config.edge, config.side, device)
    full = rows.attempt("full_size_errors", lambda: errors(setting))
    if full is not None:
        rows.append({"name": "full_size_errors", "batch": setting.batch, **full})
    setting = replace(setting, batch=2 if config.rehearse else 250)
    images = 2 if config.rehearse else 10_000
    masks = rows.attempt("masks", lambda: mask_differences(setting, images))
    if masks is not None:
        rows.append({"name": "masks", **masks})


def tuned_rows(config: FusedConfig, device: torch.device, rows: Rows) -> None:
    """Time launch options of the kernels around the chosen ones."""
    shape = shapes(config)[0]
    calls = 1 if config.rehearse else 16
    for images, warps in ((1, 2),) if config.rehearse else product((4, 8, 16), (2, 4, 8)):
        options = {"IMAGES": images, "num_warps": warps, "BLOCK": 32 * warps}
        launches = Launches(shape, device, sets=1 if config.rehearse else 4, **options)
        works = {
            part: graphed(getattr(launches, part), device, calls=calls)
            for part in ("forward", "backward")
        }
        if config.build:
            continue
        times = interleaved_ms(
            works, device, rounds=config.rounds, warm_up=0 if config.rehearse else 2
        )
        medians = {f"{p}_ms": summary(t)["median_ms"] / calls for p, t in times.items()}
        rows.append({"name": f"images_{images}_warps_{warps}", **options, **medians})


def launched(config: FusedConfig, device: torch.device) -> dict[str, Any]:
    """Launch both kernels, at the configuration's shape or at odd ones."""
    chosen = ODD if config.launch == "odd" else shapes(config)[:1] * 4
    for shape in chosen:
        # Triton's interpreter cannot store bf16.
        dtype = shape.dtype if device.type == "cuda" else torch.float32
        launches = Launches(replace(shape, dtype=dtype), device, sets=1)
        launches.forward(0)
        launches.backward(0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return {"launched": len(chosen)}


def skipped_rows() -> list[dict[str, Any]]:
    """Return rows with the reason why nothing was timed."""
    reason = "times need a CUDA device; here the kernel runs in Triton's interpreter"
    names = [f"{name}_{part}" for name, part in product(NAMES, ("forward", "backward", "both"))]
    return [{"name": name, "skipped": reason} for name in ("kernel_forward", *names)]


@full_fp32()
def command(config: FusedConfig) -> dict[str, Any]:
    """Run the gate, then the measurements that the device allows."""
    device = torch_device("auto")
    if config.rehearse:
        config = replace(config, batch=1, region_size=8, side=16, rounds=2)
        device = torch.device("cpu")
    if config.launch != "no":
        return launched(config, device)
    rows = Rows(device, config.json, append=config.append)
    if not (config.tune or config.build):
        small = Setting(3, config.region_size, config.edge, 2 * config.region_size, device)
        rows.append({"name": "gate", "largest_error": gate(small)})
    measured = {"kernels": kernel_rows, "masks": mask_rows, "variants": variant_rows}
    if device.type != "cuda" and not config.rehearse:
        rows += skipped_rows()
    elif config.tune:
        rows.attempt("tune", lambda: tuned_rows(config, device, rows))
    else:
        for part in config.part or PARTS:
            rows.attempt(part, partial(measured[part], config, device, rows))
    return rows.published("fused kernel", ("bytes", "IMAGES", "num_warps", "BLOCK"))


def main() -> None:
    """Parse, measure, print."""
    cli.main(FusedConfig, command)


if __name__ == "__main__":
    main()
