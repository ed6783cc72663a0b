"""Compile the fused kernels for every architecture without a GPU and report their resources.

    python bench/kernels_aot.py --json bench/results/kernels-aot.json

Rows: kernel, arch, region_size, registers per thread, shared_bytes and spill_bytes per program, and
how many 16-byte stores the assembly holds.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from adavipro_fast import cli
from adavipro_fast.checkpoint import write_whole
from adavipro_fast.kernels import adaptive_prompt as kernels

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SIDE = 224
# uint8 pixels in, bf16 images out: the training path.
POINTERS = {"images_ptr": "*u8", "prompted_ptr": "*bf16", "grad_ptr": "*bf16"}
SCALARS = {"batch": "i32", "tau": "fp32", "seed": "i64", "offset": "i64"}


@dataclass(frozen=True)
class AotConfig:
    """Compile the fused kernels ahead of time for many architectures."""

    region_sizes: tuple[int, ...] = (8, 16, 32, 56)
    """region sides to compile for"""
    json: Path | None = None
    """file for the rows"""


def compiled(name: str, arch: int, region_size: int) -> Any:
    """Compile `forward` or `backward` as the launcher would start it."""
    function = {"forward": kernels._forward, "backward": kernels._backward}[name]
    options = kernels.launch_options(region_size, name)
    constants = {
        "SIDE": SIDE,
        "R": region_size,
        "H": kernels.piece_size(region_size),
        "LANES": triton.next_power_of_2(kernels.piece_size(region_size)),
        "IMAGES": options["IMAGES"],
        "UINT8": True,
        "REPLICATE": True,
        "MAGNITUDE": True,
        "MODE": "hard",
        "GIVEN": False,
    }
    names = function.arg_names
    signature = {
        n: "constexpr" if n in constants else SCALARS.get(n) or POINTERS.get(n, "*fp32")
        for n in names
    }
    # torch aligns its allocations to 16 bytes and more.
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr")}
    source = ASTSource(
        function, signature, {(names.index(n),): v for n, v in constants.items()}, attrs=aligned
    )
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options={"num_warps": options["num_warps"]})


def resources(ptx: str) -> dict[str, int]:
    """Assemble PTX and read what ptxas says of registers and spills."""
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


def rows(config: AotConfig) -> Iterator[dict[str, Any]]:
    """Compile everything asked for."""
    for region_size in config.region_sizes:
        for name in ("forward", "backward"):
            for arch in ARCHITECTURES:
                binary = compiled(name, arch, region_size)
                ptx = binary.asm["ptx"]
                yield {
                    "kernel": name,
                    "arch": f"sm_{arch}",
                    "region_size": region_size,
                    **resources(ptx),
                    "shared_bytes": binary.metadata.shared,
                    "vector_stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
                    "cubin_bytes": len(binary.asm["cubin"]),
                }


def command(config: AotConfig) -> dict[str, Any]:
    """Compile and write."""
    result: dict[str, Any] = {"rows": []}
    for row in rows(config):
        print(" ".join(f"{k}={v}" for k, v in row.items()), file=sys.stderr)
        result["rows"].append(row)
    result["machine"] = {"triton": triton.__version__, "gpu": None}
    if config.json is not None:
        write_whole(config.json, (json.dumps(result, indent=1) + "\n").encode())
    return result


def main() -> None:
    """Parse, compile, print."""
    config = cli.parse(AotConfig)
    cli.run(lambda: command(config))


if __name__ == "__main__":
    main()
