"""The fused kernel as Triton compiles it, executed on a CPU by ../shared/tools/ptx."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from adavipro_fast.kernels import adaptive_prompt as kernels
from adavipro_fast.kernels import regions
from lib import sass

HERE = Path(__file__).parent
EMULATOR = HERE.parents[1] / "shared" / "tools" / "ptx"
inside = pytest.mark.skipif(
    "on_compiled_code" not in sys.modules, reason="runs with -p on_compiled_code"
)


def run_tests(arch, *arguments):
    """Run tests of the kernel on compiled code."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PTX_ARCH": str(arch),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(EMULATOR)]),
    }
    done = subprocess.run(
        [*(sys.executable, "-m", "pytest", "-p", "on_compiled_code", "-q"), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE.parent,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 5, done.stdout


@pytest.mark.real
@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_compiled_code_is_right_and_its_threads_agree(arch):
    names = "8-3-2-5 or 14-2-3-5 or 16-2-3-16 or 32-2-5-5 or near_ties or static or closed_mask"
    run_tests(arch, HERE / "test_kernel.py", __file__, "-k", names)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", [80, 90, 120])
def test_all_tests_of_the_kernel_pass_on_compiled_code(arch):
    run_tests(arch, HERE / "test_kernel.py", __file__, "-k", "not cubins")


def problem(region, side, batch):
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
    kernel = torch.randn(3, region + 2, region + 2) / region
    return images, torch.ones(3, side, side), kernel


OPTIONS = {
    "edge": "laplacian-magnitude", "replicate": True, "tau": 1.0, "seed": 0, "offset": 0,
    "mean": [0.5] * 3, "std": [0.25] * 3,
}  # fmt: skip


@inside
@pytest.mark.parametrize("region", [8, 16])
def test_near_ties_prompt_a_region_as_a_whole_or_not_at_all(region):
    grid = 3
    images, template, kernel = problem(region, region * grid, 1)

    def run(bias):
        return kernels.adaptive_prompt(
            images, template, kernel, torch.tensor(float(bias)), None,
            mode="argmax", dtype=torch.float32, **OPTIONS,
        )  # fmt: skip

    whole, delta, _ = run(0.0)
    closed = run(-1e6)[0]
    for place in range(0, grid * grid, 2):
        y, x = divmod(place, grid)
        pixels = (0, slice(None), slice(y * region, (y + 1) * region))
        pixels += (slice(x * region, (x + 1) * region),)
        for direction in (-1e9, 0, 1e9):
            bias = -delta[0, y, x]
            bias = torch.nextafter(bias, torch.tensor(direction)) if direction else bias
            prompted, _, mask = run(bias)
            added = (prompted - closed)[pixels].round()
            assert torch.equal(added, mask[0, y, x].expand_as(added))
    assert whole.isfinite().all()


# What both levels execute one to one.
CLASSES = {
    "global": ("ld.global", "st.global"),
    "shared": ("ld.shared", "st.shared"),
    "shuffle": ("shfl",),
    "barrier": ("bar.sync",),
}
FLOATS = ("fp add", "fp fma", "fp mul")


def ptx_counts(program, trips):
    """Count PTX instructions as bench/lib/sass.py counts assembly: in loops, times their trips."""
    instructions = [
        sass.Instruction("BRA" if ins.parts[0] == "bra" else ins.op, None) for ins in program.code
    ]
    labels = {}
    for place, ins in enumerate(program.code):
        if ins.parts[0] == "bra":
            labels[ins.args[0]] = program.target[ins.args[0]]
            instructions[place] = sass.Instruction("BRA", ins.args[0])
    counts = Counter()
    for place, times in enumerate(sass.repeats(instructions, labels, trips)):
        counts[program.code[place].op] += times
    return counts


@inside
@pytest.mark.parametrize("region", [16, 32])
def test_static_counts_are_what_is_executed(region, monkeypatch):
    monkeypatch.setattr(kernels, "ENOUGH_WARPS", 1)
    side, batch = 2 * region, 16
    images, template, kernel = problem(region, side, batch)
    leaves = [t.requires_grad_() for t in (template, kernel, torch.randn(()))]
    for launched in (kernels._forward, kernels._backward):
        launched.counts.clear()
    prompted = kernels.adaptive_prompt(
        images, *leaves, None, mode="hard", dtype=torch.bfloat16, **OPTIONS
    )[0]
    torch.autograd.grad(prompted, leaves, torch.randn(images.shape).bfloat16())
    options = kernels.launch_options(side, region, batch)
    parts = [
        regions.edge_parts(region, options["BLOCK"]),
        regions.pixel_parts(region, options["BLOCK"], options["PIXELS"]),
    ]
    for launched, trips in ((kernels._forward, parts), (kernels._backward, parts[::-1])):
        executed, warps = launched.counts, launched.counts["programs"] * options["num_warps"]
        static = sass.executed(*sass.disassemble(launched.binary.asm["cubin"]), trips)
        for kind, names in CLASSES.items():
            expected = sum(executed[f"warp {name}"] for name in names) / warps
            assert static[kind] == pytest.approx(expected, rel=0.05), kind
        floats = sum(executed[f"warp {name}"] for name in FLOATS) / warps
        # From Blackwell on PTX has pairs of floats, which the assembly may take apart.
        if "f32x2" not in launched.binary.asm["ptx"]:
            assert static["float"] == pytest.approx(floats, rel=0.05)
        ptx = ptx_counts(sys.modules["ptx"].Program(launched.binary.asm["ptx"]), trips)
        assert sum(ptx.values()) == pytest.approx(executed["warp total"] / warps, rel=0.05)
