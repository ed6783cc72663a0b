"""The fused kernel against plain PyTorch and float64; without a GPU in Triton's interpreter."""

import ast
import json
import math
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from adavipro_fast.data.images import read_pixels
from adavipro_fast.device import full_fp32
from adavipro_fast.method import functional
from adavipro_fast.method.config import PromptConfig
from adavipro_fast.method.preprocess import Preprocess
from adavipro_fast.method.prompt import AdaptivePrompt, frame

pytest.importorskip("triton")
from adavipro_fast.kernels import adaptive_prompt as kernels
from adavipro_fast.kernels import regions

SHARED = Path(__file__).parents[2] / "shared"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]

# region, grid, batch, prompt size, mode, edge, replicate, pixels
CASES = [
    (8, 3, 2, 5, "hard", "laplacian", False, torch.uint8),
    (16, 3, 1, 24, "soft", "laplacian-magnitude", True, torch.float32),
    (16, 2, 3, 16, "hard", "laplacian-magnitude", True, torch.uint8),
    (16, 2, 5, 5, "soft", "laplacian", True, torch.float16),
    (32, 3, 1, 30, "hard", "laplacian-magnitude", False, torch.float32),
    (32, 2, 3, 32, "argmax", "laplacian", False, torch.uint8),
    (32, 2, 5, 5, "soft", "laplacian", False, torch.float32),
    (32, 4, 1, 60, "soft", "laplacian-magnitude", True, torch.uint8),
    (56, 4, 1, 112, "hard", "laplacian-magnitude", True, torch.uint8),
    (56, 2, 3, 30, "soft", "laplacian", False, torch.float16),
    (14, 3, 2, 11, "hard", "laplacian", True, torch.float32),
    (7, 3, 2, 10, "argmax", "laplacian-magnitude", False, torch.float16),
    (2, 2, 5, 2, "hard", "laplacian", False, torch.float32),
    (7, 2, 5, 4, "soft", "laplacian-magnitude", False, torch.uint8),
    (14, 2, 3, 5, "hard", "laplacian", False, torch.uint8),
    (28, 2, 3, 20, "hard", "laplacian-magnitude", False, torch.uint8),
    (8, 2, 17, 7, "hard", "laplacian-magnitude", True, torch.uint8),
]


CHOSEN = kernels.launch_options
INTERPRETED = "Interpreted" in type(kernels._forward).__name__


@pytest.fixture(autouse=True)
def several_images_a_program(monkeypatch):
    monkeypatch.setattr(kernels, "ENOUGH_WARPS", 1)
    if INTERPRETED:
        # The interpreter takes as long for a large block as for a small one.
        def wide(*sizes):
            options = CHOSEN(*sizes)
            return options | {"BLOCK": 4 * options["BLOCK"]}

        monkeypatch.setattr(kernels, "launch_options", wide)
    # On a GPU, plain PyTorch's fp32 is the measure.
    with full_fp32():
        yield


def problem(region, grid, batch, prompt_size, pixels):
    side = region * grid
    if pixels == torch.uint8:
        images = torch.randint(0, 256, (batch, 3, side, side), dtype=pixels)
    else:
        images = torch.randn(batch, 3, side, side).to(pixels)
    template = torch.randn(3, side, side) * frame(side, prompt_size)
    kernel = torch.randn(3, region + 2, region + 2) / region
    noise = functional.logistic_noise(1, 0, (batch, grid, grid))
    return [t.to(DEVICE) for t in (images, template, kernel, torch.randn(()), noise)]


def fused(images, template, kernel, bias, noise, **options):
    defaults = {
        "mode": "hard", "edge": "laplacian", "replicate": False, "tau": 1.0, "seed": 0,
        "offset": 0, "mean": MEAN, "std": STD, "dtype": torch.float32,
    }  # fmt: skip
    return kernels.adaptive_prompt(images, template, kernel, bias, noise, **(defaults | options))


def plain(images, template, kernel, bias, noise, *, mode, edge, replicate, tau, dtype):
    """The specification, computed in `dtype`."""
    if images.dtype == torch.uint8:
        mean, std = (torch.tensor(v, dtype=dtype, device=images.device) for v in (MEAN, STD))
        images = functional.normalise(images, mean, std)
    template, kernel, bias, noise = (t.to(dtype) for t in (template, kernel, bias, noise))
    padding = "replicate" if replicate else "zero"
    return functional.adaptive_prompt(
        images.to(dtype), template, kernel, bias,
        mode=mode, tau=tau, noise=noise, edge=edge, edge_padding=padding,
    )  # fmt: skip


def with_gradients(function, images, parameters, noise, upstream, **options):
    """Outputs and gradients; a decision is no gradient in argmax mode."""
    leaves = [p.detach().clone().requires_grad_() for p in parameters]
    outputs = function(images, *leaves, noise, **options)
    wanted = leaves if options["mode"] != "argmax" else leaves[:1]
    grads = torch.autograd.grad(outputs[0], wanted, upstream.to(outputs[0].dtype))
    return [*outputs, *grads]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)).replace("torch.", ""))
def test_outputs_and_gradients_are_as_exact_as_plain_pytorchs(case):
    assert_as_exact_as_plain(case)


def assert_as_exact_as_plain(case):
    region, grid, batch, prompt_size, mode, edge, replicate, pixels = case
    images, *parameters, noise = problem(region, grid, batch, prompt_size, pixels)
    options = {"mode": mode, "edge": edge, "replicate": replicate, "tau": 1.3}
    upstream = torch.randn(images.shape, device=DEVICE)
    run = (images, parameters, noise, upstream)
    got = with_gradients(fused, *run, **options)
    same_dtype = with_gradients(plain, *run, dtype=torch.float32, **options)
    truth = with_gradients(plain, *run, dtype=torch.float64, **options)
    # db is a sum of s' g P / τ over all pixels, which may cancel: its terms round.
    terms = (upstream * parameters[0]).double().norm().item() / 4 / options["tau"]
    names = ("prompted", "delta", "mask", "template", "kernel", "bias")
    for name, a, b, t in zip(names, got, same_dtype, truth, strict=False):
        size = terms if name == "bias" else t.norm().item()
        wrong, plain_wrong = ((x.double() - t).norm().item() for x in (a, b))
        # 4e-7 is rounding, below which a comparison of errors is a lottery.
        assert wrong <= max(2 * plain_wrong, 4e-7 * size), name
        farthest, plain_farthest = ((x.double() - t).abs().max() for x in (a, b))
        assert farthest <= max(4 * plain_farthest, 2e-5 * t.abs().max()), name


def test_the_prompted_image_is_cast_once_at_the_store():
    images, *parameters, noise = problem(16, 3, 2, 20, torch.float16)
    whole = fused(images, *parameters, noise)[0]
    assert torch.equal(fused(images, *parameters, noise, dtype=torch.float16)[0], whole.half())


def test_a_closed_mask_is_the_identity_bit_for_bit():
    images, template, kernel, bias, noise = problem(16, 3, 3, 24, torch.float32)
    prompted, _, mask = fused(images, template, kernel, bias - 1e6, noise)
    assert not mask.any()
    assert torch.equal(prompted, images)


def test_a_skipped_element_is_caught(monkeypatch):
    case = CASES[4]
    forward = kernels._forward

    class Skipping:
        def __getitem__(self, grid):
            def launch(images, *arguments, **constants):
                forward[grid](images, *arguments, **constants)
                arguments[4][0, 0, 0, 0] = images[0, 0, 0, 0]

            return launch

    monkeypatch.setattr(kernels, "_forward", Skipping())
    with pytest.raises(AssertionError, match="prompted"):
        assert_as_exact_as_plain((*case[:4], "soft", *case[5:]))


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter counts")
def test_in_the_interpreter_every_pixel_is_read_from_memory_and_4_times_an_edge(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    load, loads = InterpreterBuilder.create_masked_load, {}

    def count(self, pointers, mask, *rest):
        kind = str(pointers.get_element_ty())
        loads.setdefault(kind, []).append(pointers.data[mask.data])
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", count)
    monkeypatch.setattr(kernels, "launch_options", CHOSEN)
    region, grid, batch = 16, 2, 3
    images, *parameters, noise = problem(region, grid, batch, 4, torch.uint8)
    leaves = [p.requires_grad_() for p in parameters]
    prompted = fused(images, *leaves, noise, dtype=torch.float16)[0]
    options = kernels.launch_options(region * grid, region, batch)
    threads = options["BLOCK"] * grid**2 * batch
    edges = regions.ROWS.value * regions.edge_parts(region, options["BLOCK"]) * threads
    pixels = options["PIXELS"] * threads * regions.pixel_parts(
        region, options["BLOCK"], options["PIXELS"]
    )  # fmt: skip

    def read(kind):
        addresses = np.concatenate([a.ravel() for a in loads[kind]])
        return len(addresses), len(np.unique(addresses))

    assert read("uint8") == (4 * edges + pixels, images.numel())
    # Threads beyond a region's last edge or pixel read as well, or else these would be equal.
    assert edges < 1.06 * batch * grid**2 * 3 * (region + 2) ** 2
    loads.clear()
    prompted.backward(torch.randn(images.shape, dtype=torch.float16))
    assert read("uint8") == (4 * edges, images.numel())
    assert read("fp16") == (pixels, images.numel())


def test_images_a_program_change_no_output_and_gradients_by_rounding_alone(monkeypatch):
    images, *parameters, noise = problem(8, 2, 5, 4, torch.uint8)
    upstream = torch.randn(images.shape, device=DEVICE)
    results = []
    for most in (1, 2, 16):
        monkeypatch.setattr(kernels, "MOST_IMAGES", most)
        results.append(with_gradients(fused, images, parameters, noise, upstream, mode="hard"))
    for other in results[1:]:
        assert all(map(torch.equal, results[0][:3], other[:3]))
        for a, b in zip(results[0][3:], other[3:], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * a.abs().max().item())


@pytest.mark.parametrize("region", [7, 8, 14, 16, 28, 32, 56, 112, 224])
def test_a_small_batch_fills_the_device_as_far_as_it_can(region, monkeypatch):
    monkeypatch.undo()
    for batch in (1, 2, 21, 22, 64, 256, 1000):
        options = kernels.launch_options(224, region, batch)
        images, warps = options["IMAGES"], options["num_warps"]
        programs = (224 // region) ** 2 * -(-batch // images)
        assert images == 1 or programs * warps >= 2048
        assert options["EVEN"] == (batch % images == 0)
        assert options["BLOCK"] == 32 * warps
        # More images would leave the device short of programs, or there are no more.
        doubled = (224 // region) ** 2 * -(-batch // (2 * images))
        assert images == 16 or doubled * warps < 2048


def test_no_tensor_is_made_from_numbers_which_a_cuda_graph_could_not_hold(monkeypatch):
    images, *parameters, noise = problem(8, 2, 2, 4, torch.uint8)
    upstream = torch.randn(images.shape, device=DEVICE)

    def refuse(*_, **__):
        raise AssertionError("a copy from the host")

    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, refuse)
    with_gradients(fused, images, parameters, noise, upstream, mode="hard")


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    current, launches = [], []

    class Guard:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            current.append(self.tensor)

        def __exit__(self, *_):
            current.pop()

    class Launched:
        def __getitem__(self, grid):
            return lambda first, *_, **__: launches.append(current[-1] is first)

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    for name in ("_forward", "_backward", "_logistic_noise"):
        monkeypatch.setattr(kernels, name, Launched())
    images, *parameters, noise = problem(8, 2, 2, 4, torch.uint8)
    upstream = torch.randn(images.shape, device=DEVICE)
    with_gradients(fused, images, parameters, noise, upstream, mode="hard")
    kernels.logistic_noise(0, 0, 5, DEVICE)
    assert launches == [True, True, True]


@pytest.mark.parametrize("place", [5, 6, 7])
def test_a_gradient_wrong_by_a_thousandth_is_caught(monkeypatch, place):
    backward = kernels._backward

    class Wrong:
        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                backward[grid](*arguments, **constants)
                arguments[place].mul_(1.001)

            return launch

    monkeypatch.setattr(kernels, "_backward", Wrong())
    with pytest.raises(AssertionError, match=("template", "kernel", "bias")[place - 5]):
        assert_as_exact_as_plain((8, 2, 3, 6, "soft", "laplacian", False, torch.float32))


def test_noise_is_drawn_from_the_stream_whatever_the_batch_split():
    images, template, kernel, bias, _ = problem(8, 2, 5, 6, torch.uint8)
    options = {"mode": "soft", "seed": (3 << 32) | 5}
    whole = fused(images, template, kernel, bias, None, **options)[2]
    first = fused(images[:2], template, kernel, bias, None, **options)[2]
    rest = fused(images[2:].contiguous(), template, kernel, bias, None, offset=8, **options)[2]
    assert torch.equal(torch.cat([first, rest]), whole)
    noise = functional.logistic_noise(options["seed"], 0, (5, 2, 2), DEVICE)
    given = fused(images, template, kernel, bias, noise, mode="soft")[2]
    torch.testing.assert_close(given, whole, rtol=0, atol=1e-6)


def test_kernel_noise_is_logistic_and_independent():
    draws = 1_000_000
    noise = kernels.logistic_noise(11, 0, draws, DEVICE).cpu()
    assert stats.kstest(noise.numpy(), "logistic").pvalue > 1e-3
    limit = 5 / math.sqrt(draws)
    grid, images = 49, draws // 49
    table = noise[: grid * images].view(images, grid)
    between_regions = torch.corrcoef(table.T) - torch.eye(grid)
    assert between_regions.abs().max() < 5 / math.sqrt(images)
    lagged = torch.corrcoef(torch.stack([noise[:-grid], noise[grid:]]))[0, 1]
    next_step = kernels.logistic_noise(12, 0, draws // 10, DEVICE).cpu()
    steps = torch.corrcoef(torch.stack([noise[: draws // 10], next_step]))[0, 1]
    assert abs(lagged) < limit
    assert abs(steps) < limit * math.sqrt(10)


def test_backward_is_deterministic():
    images, *parameters, noise = problem(8, 1, 20, 4, torch.uint8)
    upstream = torch.randn(images.shape, device=DEVICE)
    first, second = (
        with_gradients(fused, images, parameters, noise, upstream, mode="hard") for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_operator_keeps_torchs_rules():
    images, template, kernel, bias, noise = problem(8, 2, 2, 6, torch.uint8)
    leaves = [t.requires_grad_() for t in (template, kernel, bias)]
    options = {
        "mode": "soft", "edge": "laplacian", "replicate": True, "tau": 1.0, "seed": 0, "offset": 0,
        "mean": MEAN, "std": STD, "dtype": torch.float32,
    }  # fmt: skip
    opcheck(kernels.adaptive_prompt, (images, *leaves, noise), options)


def test_a_training_step_compiles_without_a_graph_break():
    config = PromptConfig(prompt_size=8, region_size=8, embed_dim=2)
    prompt = AdaptivePrompt(16, config, mean=(0.5,) * 3, std=(0.5,) * 3, kernel="fused")
    prompt.to(DEVICE).train()
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, device=DEVICE)

    def step(images):
        return prompt(images, tau=1.0, seed=3).images.square().mean()

    step(images).backward()
    eager = [p.grad.clone() for p in prompt.parameters()]
    prompt.zero_grad()
    torch.compile(step, fullgraph=True, backend="aot_eager")(images).backward()
    for parameter, expected in zip(prompt.parameters(), eager, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("edge", ["laplacian", "laplacian-magnitude"])
def test_fused_and_plain_module_agree_through_to_the_weights(edge):
    config = PromptConfig(prompt_size=16, region_size=8, embed_dim=3, edge=edge)
    options = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    twins = [AdaptivePrompt(24 + 8, config, kernel=k, **options) for k in ("fused", "plain")]
    twins[1].load_state_dict(twins[0].state_dict())
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
    upstream = torch.randn(3, 3, 32, 32, device=DEVICE)
    for twin in twins:
        twin.to(DEVICE).train()
        (twin(images, tau=2.0, seed=9).images * upstream).sum().backward()
    for a, b in zip(twins[0].parameters(), twins[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.__setitem__(0, p[0].transpose(2, 3)), "must be contiguous"),
        (lambda p: p.__setitem__(1, p[1][:, :-1]), "does not fit images of side 16"),
        (lambda p: p.__setitem__(2, torch.zeros(3, 9, 9)), "region size 7 does not divide"),
        (lambda p: p.__setitem__(0, p[0][:, :2]), r"expected \(B, 3, S, S\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = problem(8, 2, 1, 4, torch.float32)
    change(arguments)
    with pytest.raises(ValueError, match=message):
        fused(*arguments)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PromptConfig(activation="relu"), "it does not support activation relu"),
        (PromptConfig(edge="sobel"), "it does not support edge sobel"),
        (PromptConfig(method="vp"), "method vp has no mask"),
    ],
)
def test_asking_for_the_fused_path_where_it_cannot_run_is_an_error(config, message):
    prompt = AdaptivePrompt(224, config, kernel="fused")
    with pytest.raises(ValueError, match=f"the fused kernel cannot run: {message}"):
        prompt(torch.zeros(1, 3, 224, 224))


def test_auto_is_plain_on_a_cpu_and_fused_on_cuda():
    prompt = AdaptivePrompt(224, PromptConfig())
    assert prompt.path(torch.device("cpu")) == "plain"
    assert prompt.path(torch.device("cuda")) == "fused"


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operator makes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, tuple | list) else [outputs]:
            if isinstance(output, torch.Tensor):
                self.seen.append(tuple(output.shape))
        return outputs


@pytest.mark.parametrize("kernel", ["fused", "plain"])
def test_no_training_path_makes_wide_maps_and_the_fused_one_no_edge_map_nor_dilated_mask(kernel):
    batch, width, side = 4, 5, 16
    config = PromptConfig(prompt_size=8, region_size=8, embed_dim=width)
    prompt = AdaptivePrompt(side, config, kernel=kernel).to(DEVICE).train()
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=DEVICE)
    with Shapes() as shapes:
        prompt(images, seed=1).images.sum().backward()
    assert (batch, width, side, side) not in shapes.seen
    full_size = [s for s in shapes.seen if s[-2:] == (side, side) and s[0] == batch]
    if kernel == "fused":
        # The prompted images, and the gradient that the sum sends back.
        assert len(full_size) == 2
        assert set(full_size) == {(batch, 3, side, side)}


def test_no_assignment_nests_tuples_which_triton_3_6_cannot_read():
    for module in (kernels, regions):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.Assign):
                for part in ast.walk(node.targets[0]):
                    inner = part.elts if isinstance(part, ast.Tuple) else []
                    assert not any(isinstance(e, ast.Tuple) for e in inner), ast.unparse(node)


RESULTS = Path(__file__).parents[1] / "bench" / "results" / "kernels-aot.json"


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the device's own compiler is tested above")
def test_cubins_compile_and_their_counts_are_the_committed_ones():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = RESULTS.parents[1] / "kernels_aot.py"
    arguments = [*(sys.executable, script, "--region-sizes", "16"), "--architectures", "80", "90"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["rows"]) == 6
    for row in result["rows"]:
        assert row["spill_bytes"] == 0, row
        assert row["l1_bytes"] > row["memory_bytes"] > 0, row
    committed = json.loads(RESULTS.read_text())
    # Another compiler gives other figures.
    if result["machine"] == committed["machine"]:
        assert all(row in committed["rows"] for row in result["rows"])


def test_by_the_committed_estimates_the_kernel_is_near_the_memory_s_limit():
    rows = json.loads(RESULTS.read_text())["rows"]
    kinds = {(r["kernel"], r["mode"], r["arch"], r["region_size"]) for r in rows}
    assert len(kinds) == len(rows) == 3 * 6 * 6
    for row in rows:
        assert row["spill_bytes"] == 0, row
        if row["kernel"] == "forward":
            assert row["warps_per_sm"] >= 24, row
        # A B200 has more bandwidth for each of its multiprocessors than L1 can follow.
        if row["arch"] != "sm_100" and row["region_size"] in (8, 16, 32, 56):
            limit = 3 if row["region_size"] == 8 else 1.6
            slowest = max(row["issue_ns"], row["load_store_ns"], row["memory_ns"])
            assert slowest <= limit * row["memory_ns"], row


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("edge", ["laplacian", "laplacian-magnitude"])
def test_argmax_agrees_on_every_region_of_100_real_images(edge, tmp_path):
    with tarfile.open(SHARED / "data" / "dtd10.tar") as archive:
        members = [m for m in archive if m.name.endswith(".jpg")][::12][:100]
        archive.extractall(tmp_path, members, filter="data")
    preprocess = Preprocess(224, (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest")
    files = tuple(sorted(tmp_path.rglob("*.jpg")))
    assert len(files) == 100
    pixels = read_pixels(files, preprocess).to(DEVICE)
    options = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    config = PromptConfig(edge=edge, embed_dim=8)
    twins = [AdaptivePrompt(224, config, kernel=k, **options) for k in ("fused", "plain")]
    twins[1].load_state_dict(twins[0].state_dict())
    with torch.no_grad():
        fused_masks, plain_masks = (t.to(DEVICE).eval()(pixels) for t in twins)
    tie = plain_masks.delta.abs() < 1e-5 * plain_masks.delta.abs().max()
    assert tie.sum() <= 5
    assert torch.equal(fused_masks.mask[~tie], plain_masks.mask[~tie])
