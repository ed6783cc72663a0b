"""Estimate a compiled kernel's instructions and time from its assembly.

Counts are static: each instruction is multiplied by the trip counts of the loops around it. The
time is a roofline, which ignores latency, the instruction cache and the last wave of programs.
"""

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


@dataclass(frozen=True)
class Gpu:
    """A GPU's specifications, as its vendor states them."""

    name: str
    multiprocessors: int
    clock_ghz: float
    memory_gb_s: float
    float_rate: float
    """fp32 warp instructions per cycle and multiprocessor"""
    load_store_rate: float
    """loads, stores and shuffles per cycle and multiprocessor"""
    warps: int
    """largest number per multiprocessor"""
    programs: int
    """largest number per multiprocessor"""
    shared_bytes: int
    """per multiprocessor"""


GPUS = {
    80: Gpu("A100 80 GB", 108, 1.41, 2039, 2, 1, 64, 32, 167_936),
    86: Gpu("RTX 3090", 82, 1.70, 936, 4, 0.5, 48, 16, 102_400),
    89: Gpu("RTX 4090", 128, 2.52, 1008, 4, 0.5, 48, 24, 102_400),
    90: Gpu("H200", 132, 1.75, 4800, 4, 1, 64, 32, 233_472),
    100: Gpu("B200", 148, 1.85, 8000, 4, 1, 64, 32, 233_472),
    120: Gpu("RTX 5090", 170, 2.41, 1792, 4, 0.5, 48, 24, 102_400),
}
DISPATCH_RATE, INTEGER_RATE = 4, 2
RULES = (
    "Estimates from static counts, not measurements. Warp instructions of the assembly, times the "
    "trips of the loops around them. issue_ns: the slowest of 4 instructions a cycle and "
    "multiprocessor in all, 2 integer and logic ones, and float_rate fp32 ones, which share a pipe "
    "with 2 integer multiply-adds. load_store_ns: global and shared accesses and shuffles by "
    "load_store_rate, an access wider than 4 bytes a thread counting once for every 4. memory_ns: "
    "what has to cross the memory's bus: images once, prompted images or their gradient once, "
    "partial sums written and read. Not modelled: latency, instruction cache, L2, bank conflicts, "
    "the last wave."
)

CLASSES = {
    "global": "LDG STG",
    "shared": "LDS STS LDSM STSM",
    "shuffle": "SHFL",
    "barrier": "BAR SYNCS",
    "spill": "LDL STL",
    "float": "FADD FADD2 FMUL FMUL2 FFMA FFMA2 HADD2 HFMA2 HMUL2",
    "multiply": "IMAD UIMAD IDP",
    "special": "MUFU I2F F2I F2F FRND POPC FLO",
    "integer": "FMNMX FMNMX3 FSETP FSEL FCHK FSET LOP3 IADD IADD3 SHF PRMT ISETP SEL LEA PLOP3 "
    "IMNMX VIMNMX VIMNMX3 VIADD VIADDMNMX IABS SGXT MOV BMSK P2R R2P I2FP F2FP CS2R I2IP",
    "control": "BRA BSSY BSYNC EXIT RET CALL NOP BMOV YIELD WARPSYNC VOTE BREAK S2R LDC LDCU ULDC "
    "R2UR S2UR REDUX DEPBAR ELECT PREEXIT ACQBULK LEPC CCTL ERRBAR MEMBAR FENCE",
}
CLASS_OF = {name: kind for kind, names in CLASSES.items() for name in names.split()}
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
WARP = 32


@dataclass(frozen=True)
class Instruction:
    """A line of assembly: the operation with its modifiers, and the label it jumps to."""

    operation: str
    target: str | None

    @property
    def kind(self) -> str:
        """Return the instruction's class.

        Raises:
            ValueError: the instruction is unknown.
        """
        name = self.operation.split(".")[0]
        if name in CLASS_OF:
            return CLASS_OF[name]
        # Uniform instructions use an issue slot of the warp, but none of its pipes.
        if name.startswith("U"):
            return "control"
        raise ValueError(f"instruction {self.operation} is of no class; add it to CLASSES")

    @property
    def width(self) -> int:
        """Return the bytes that a thread loads, stores or shuffles; 0 for other instructions."""
        if self.kind not in ("global", "shared", "shuffle"):
            return 0
        return next((WIDTHS[part] for part in self.operation.split(".") if part in WIDTHS), 4)


def disassemble(cubin: bytes) -> tuple[list[Instruction], dict[str, int]]:
    """Return a kernel's instructions, and the positions of its labels."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = subprocess.run([NVDISASM, "-c", path], capture_output=True, text=True, check=True)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.stdout.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            target = re.search(r"\.L_x_\d+", found[1])
            instructions.append(Instruction(found[1].split()[0], target and target[0]))
    while instructions[-1].operation == "NOP" or instructions[-1].operation.startswith("BRA"):
        instructions.pop()
    return instructions, labels


def repeats(
    instructions: Sequence[Instruction], labels: dict[str, int], trips: Sequence[int]
) -> list[int]:
    """Return how often one warp executes each instruction.

    Args:
        instructions: of a kernel whose only branches are loops.
        labels: their positions.
        trips: trip counts of the loops, in order; loops with one trip are not in the assembly.

    Raises:
        ValueError: the assembly has other loops.
    """
    loops = [
        (labels[ins.target], end)
        for end, ins in enumerate(instructions)
        if ins.operation.startswith("BRA") and ins.target and labels[ins.target] <= end
    ]
    wanted = [count for count in trips if count > 1]
    if len(loops) != len(wanted):
        raise ValueError(f"{len(loops)} loops in the assembly, {len(wanted)} in the source")
    around = list(zip(sorted(loops), wanted, strict=True))
    return [
        math.prod(count for (start, end), count in around if start <= place <= end)
        for place in range(len(instructions))
    ]


def executed(
    instructions: Sequence[Instruction], labels: dict[str, int], trips: Sequence[int]
) -> Counter[str]:
    """Count a warp's instructions by class, with `total`, `wavefronts` and `l1_bytes`.

    Arguments and errors are those of `repeats`.
    """
    counts: Counter[str] = Counter()
    for instruction, times in zip(instructions, repeats(instructions, labels, trips), strict=True):
        counts[instruction.kind] += times
        counts["total"] += times
        counts["wavefronts"] += times * -(-instruction.width // 4)
        if instruction.operation.startswith("LDG"):
            counts["l1_bytes"] += times * WARP * instruction.width
    return counts


def resident_warps(gpu: Gpu, *, registers: int, shared_bytes: int, warps: int) -> int:
    """Return how many warps fit on a multiprocessor, given a program's resources."""
    by_registers = 65_536 // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = gpu.shared_bytes // (shared_bytes + 1024)
    return warps * min(by_registers, by_shared, gpu.programs, gpu.warps // warps)


def estimate_ns(gpu: Gpu, counts: Counter[str], memory_bytes: float) -> dict[str, float]:
    """Return an image's time by each limit.

    Args:
        gpu: the GPU.
        counts: warp instructions per image.
        memory_bytes: bytes to and from memory per image.
    """
    cycles_per_ns = gpu.multiprocessors * gpu.clock_ghz
    ports = (
        counts["total"] / DISPATCH_RATE,
        counts["integer"] / INTEGER_RATE,
        counts["float"] / gpu.float_rate + counts["multiply"] / INTEGER_RATE,
    )
    return {
        "issue_ns": max(ports) / cycles_per_ns,
        "load_store_ns": counts["wavefronts"] / gpu.load_store_rate / cycles_per_ns,
        "memory_ns": memory_bytes / gpu.memory_gb_s,
    }
