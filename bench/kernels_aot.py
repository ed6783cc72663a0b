"""Compile the fused kernels for every architecture without a GPU; estimate their time.

    python bench/kernels_aot.py --json bench/results/kernels-aot.json

A row is a kernel at one architecture and region size: registers per thread; spill_bytes and
shared_bytes per program; warps_per_sm, the resident warps that these allow; warp_instructions by
class for one region of one image; bytes per image through L1 and to and from memory; and the
estimated time per image by three limits, with the name of the binding one. `rules` explains the
estimates.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from adavipro_fast import cli
from adavipro_fast.files.whole import write_whole
from adavipro_fast.kernels import adaptive_prompt as kernels
from adavipro_fast.kernels import regions
from lib import sass
from lib.launches import Shape, moved_bytes, partial_sum_bytes
from lib.table import Json

SIDE, BATCH = 224, 256
# uint8 pixels in, bf16 images out: the training path.
POINTERS = {"images_ptr": "*u8", "prompted_ptr": "*bf16", "grad_ptr": "*bf16"}
SCALARS = {
    "batch": "i32",
    "tau": "fp32",
    "seed": "i64",
    "offset": "i64",
    **{f"{part}_{channel}": "fp32" for part in ("scale", "shift") for channel in "rgb"},
}
PEER = (
    "No row of torch.compile's code of the plain version: without a driver, fake CUDA tensors fail "
    "in the device guard before Inductor generates any."
)
PASSES = (("forward", "hard"), ("forward", "argmax"), ("backward", "hard"))


@dataclass(frozen=True)
class AotConfig:
    """Compile the fused kernels ahead of time for many architectures."""

    region_sizes: tuple[int, ...] = (8, 14, 16, 28, 32, 56)
    """region sides to compile for"""
    architectures: tuple[int, ...] = tuple(sass.GPUS)
    """compute capabilities to compile for, times 10"""
    json: Json = None


def compiled(name: str, mode: str, arch: int, region_size: int) -> Any:
    """Compile `forward` or `backward` with the launcher's options."""
    function = {"forward": kernels._forward, "backward": kernels._backward}[name]
    options = kernels.launch_options(SIDE, region_size, BATCH)
    warps = options.pop("num_warps")
    constants = options | {
        "SIDE": SIDE,
        "R": region_size,
        "UINT8": True,
        "REPLICATE": True,
        "MAGNITUDE": True,
        "MODE": mode,
        "GIVEN": False,
    }
    names = function.arg_names
    signature = {
        n: "constexpr" if n in constants else SCALARS.get(n) or POINTERS.get(n, "*fp32")
        for n in names
    }
    # torch aligns its allocations to at least 16 bytes.
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr")}
    source = ASTSource(
        function, signature, {(names.index(n),): v for n, v in constants.items()}, attrs=aligned
    )
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options={"num_warps": warps})


def resources(ptx: str) -> dict[str, int]:
    """Assemble PTX and return the registers and spills that ptxas reports."""
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target is not None
    assembler = get_ptxas(int(re.sub(r"\D", "", target[1]))).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        done = subprocess.run(
            [assembler, "-v", f"--gpu-name={target[1]}", "-o", Path(folder, "out"), source],
            capture_output=True,
            text=True,
            check=True,
        )
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    assert registers is not None
    return {"registers": int(registers[1]), "spill_bytes": sum(map(int, spills))}


def trips(name: str, region_size: int) -> list[int]:
    """Return the trip counts of a kernel's loops, in order."""
    options = kernels.launch_options(SIDE, region_size, BATCH)
    block = options["BLOCK"]
    parts = [
        regions.edge_parts(region_size, block),
        regions.pixel_parts(region_size, block, options["PIXELS"]),
    ]
    return parts if name == "forward" else parts[::-1]


def memory_bytes(name: str, region_size: int) -> float:
    """Count an image's bytes to and from memory: pixels, bf16 image, its share of the sums."""
    images = kernels.launch_options(SIDE, region_size, BATCH)["IMAGES"]
    # Each program writes its partial sums, which are read once to add them.
    sums = partial_sum_bytes(SIDE, region_size, BATCH, images) if name == "backward" else 0
    return moved_bytes(name, Shape(BATCH, region_size), images) / BATCH + sums / BATCH


def row(name: str, mode: str, arch: int, region_size: int) -> dict[str, Any]:
    """Compile one kernel, count and estimate."""
    binary, gpu = compiled(name, mode, arch, region_size), sass.GPUS[arch]
    options = kernels.launch_options(SIDE, region_size, BATCH)
    used = resources(binary.asm["ptx"]) | {"shared_bytes": binary.metadata.shared}
    warps = options["num_warps"]
    counts = sass.executed(*sass.disassemble(binary.asm["cubin"]), trips(name, region_size))
    share = warps / options["IMAGES"]
    region_image = {kind: count * share for kind, count in sorted(counts.items())}
    return {
        "kernel": name,
        "mode": mode,
        "arch": f"sm_{arch}",
        "gpu": gpu.name,
        "region_size": region_size,
        **{key: value for key, value in options.items() if key in ("IMAGES", "num_warps")},
        **used,
        "warps_per_sm": sass.resident_warps(
            gpu, registers=used["registers"], shared_bytes=used["shared_bytes"], warps=warps
        ),
        "warp_instructions": {
            kind: round(n, 1)
            for kind, n in region_image.items()
            if kind not in ("l1_bytes", "wavefronts")
        },
        **estimate(gpu, name, region_size, region_image),
    }


def estimate(
    gpu: sass.Gpu, name: str, region_size: int, region_image: dict[str, float]
) -> dict[str, Any]:
    """Estimate an image's bytes and times from the counts of one region of it."""
    regions_of_image, moved = (SIDE // region_size) ** 2, memory_bytes(name, region_size)
    of_image = Counter({kind: n * regions_of_image for kind, n in region_image.items()})
    limits = sass.estimate_ns(gpu, of_image, moved)
    return {
        "l1_bytes": round(of_image["l1_bytes"]),
        "memory_bytes": round(moved),
        **{key: round(value, 1) for key, value in limits.items()},
        "bound": max(limits, key=lambda key: limits[key]).removesuffix("_ns"),
        "times_memory": round(max(limits.values()) / limits["memory_ns"], 2),
    }


def command(config: AotConfig) -> dict[str, Any]:
    """Compile all chosen kernels, and save the rows."""
    rows = []
    for region_size, (name, mode), arch in product(
        config.region_sizes, PASSES, config.architectures
    ):
        rows.append(row(name, mode, arch, region_size))
        shown = {k: v for k, v in rows[-1].items() if k != "warp_instructions"}
        print(" ".join(f"{k}={v}" for k, v in shown.items()), file=sys.stderr)
    result = {
        "rows": rows,
        "rules": sass.RULES,
        "peer": PEER,
        "gpus": {f"sm_{arch}": asdict(gpu) for arch, gpu in sass.GPUS.items()},
        "machine": {"triton": triton.__version__, "gpu": None},
    }
    if config.json is not None:
        write_whole(config.json, (json.dumps(result, indent=1) + "\n").encode())
    return result


def main() -> None:
    """Parse, compile, print."""
    cli.main(AotConfig, command)


if __name__ == "__main__":
    main()
