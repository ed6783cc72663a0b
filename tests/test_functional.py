import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from adavipro_fast.method.functional import (
    adaptive_prompt,
    apply_prompt,
    check_region,
    collapse,
    decide,
    dilate,
    edge_map,
    logistic_noise,
    normalise,
    philox_uniform,
    region_logit,
)

EDGES = ("laplacian", "laplacian-magnitude", "sobel", "none")


def generator_weights(width, region):
    shapes = ((width, 3, 3, 3), (width,), (2, width, region, region), (2,))
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def uncollapsed(edges, w_c, b_c, w_p, b_p):
    logits = F.conv2d(F.conv2d(edges, w_c, b_c, padding=1), w_p, b_p, stride=w_p.shape[-1])
    return logits[:, 1] - logits[:, 0]


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    grid=st.integers(1, 4),
    region=st.sampled_from((1, 2, 3, 5, 7, 8)),
    width=st.integers(1, 9),
    edge=st.sampled_from(EDGES),
    padding=st.sampled_from(("zero", "replicate")),
)
def test_collapsed_equals_uncollapsed_whatever_the_shape(batch, grid, region, width, edge, padding):
    assert_collapse_is_exact(batch, grid * region, region, width, edge, padding)


@pytest.mark.parametrize("region", [8, 16, 32, 56])
@pytest.mark.parametrize("edge", EDGES)
def test_collapsed_equals_uncollapsed_at_every_region_size(region, edge):
    assert_collapse_is_exact(2, 112, region, 64 if region < 32 else 8, edge, "zero")


def assert_collapse_is_exact(batch, side, region, width, edge, padding):
    images = torch.randn(batch, 3, side, side, dtype=torch.float64)
    edges = edge_map(images, edge, padding)
    weights = generator_weights(width, region)
    upstream = torch.randn(batch, side // region, side // region, dtype=torch.float64)
    plain = uncollapsed(edges, *weights)
    fast = region_logit(edges, *collapse(*weights))
    assert relative(fast, plain) < 1e-9
    plain_grads = torch.autograd.grad(plain, weights, upstream)
    fast_grads = torch.autograd.grad(fast, weights, upstream)
    for got, expected in zip(fast_grads, plain_grads, strict=True):
        assert relative(got, expected) < 1e-9


@pytest.mark.parametrize("padding", ["zero", "replicate"])
def test_edge_maps_are_the_textbook_filters(padding):
    images = torch.randn(2, 3, 13, 13, dtype=torch.float64)
    padded = F.pad(images, (1, 1, 1, 1), mode="constant" if padding == "zero" else "replicate")

    def filtered(kernel):
        weight = torch.tensor(kernel, dtype=torch.float64).expand(3, 1, 3, 3)
        return F.conv2d(padded, weight, groups=3)

    laplacian = filtered([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    gx = filtered([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    gy = filtered([[-1, -2, -1], [0, 0, 0], [1, 2, 1]])
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(edge_map(images, "laplacian", padding), laplacian, **close)
    torch.testing.assert_close(
        edge_map(images, "laplacian-magnitude", padding), laplacian.abs(), **close
    )
    sobel = (gx**2 + gy**2).sqrt()
    torch.testing.assert_close(edge_map(images, "sobel", padding), sobel, **close)
    assert edge_map(images, "none", padding) is images


def test_an_unknown_edge_detector_is_named():
    with pytest.raises(ValueError, match="'canny' is unknown; use one of"):
        edge_map(torch.zeros(1, 3, 8, 8), "canny", "zero")


def test_a_region_that_does_not_divide_is_named_with_the_way_out():
    with pytest.raises(ValueError, match="48 does not divide image side 224; use one of 8, 14, 16"):
        check_region(224, 48)


def test_logistic_decision_equals_gumbel_softmax_over_two_logits():
    logits = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(torch.rand_like(logits)))
    expected = torch.softmax((logits + gumbel) / 0.7, 1)[:, 1]
    delta, noise = logits[:, 1] - logits[:, 0], gumbel[:, 1] - gumbel[:, 0]
    torch.testing.assert_close(decide(delta, "soft", tau=0.7, noise=noise), expected)


def test_hard_masks_are_binary_and_carry_the_soft_gradient():
    delta = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(4, 3, 3, dtype=torch.float64)
    hard = decide(delta, "hard", tau=2.0, noise=noise)
    assert set(hard.detach().flatten().tolist()) <= {0.0, 1.0}
    soft = decide(delta, "soft", tau=2.0, noise=noise)
    grads = [torch.autograd.grad(m.sum(), delta, retain_graph=True)[0] for m in (hard, soft)]
    torch.testing.assert_close(*grads)


def test_a_tie_discards_as_argmax_over_discard_and_apply_does():
    assert decide(torch.zeros(1, 1, 1), "argmax").item() == 0


@pytest.mark.parametrize("tau", [5.0, 0.5, 1e-3, 1e-12])
def test_noise_and_masks_are_finite_at_any_temperature(tau):
    noise = logistic_noise(0, 0, (1000, 7, 7))
    delta = torch.zeros(1000, 7, 7, requires_grad=True)
    mask = decide(delta, "hard", tau=tau, noise=noise)
    mask.sum().backward()
    assert mask.isfinite().all()
    assert delta.grad.isfinite().all()


def test_philox_gives_the_published_numbers():
    # Random123's known answer for key 0, counter 0: the first word is 0x6627e8d5.
    expected = 0x6627E8D5 * 4.6566127342e-10
    assert philox_uniform(0, 0, 1).item() == pytest.approx(expected, rel=1e-7)


def test_noise_is_logistic_and_independent_of_the_batch_split():
    noise = logistic_noise(7, 0, (200_000,))
    assert stats.kstest(noise.numpy(), "logistic").pvalue > 1e-3
    parts = [logistic_noise(7, start, (50_000,)) for start in range(0, 200_000, 50_000)]
    assert torch.equal(torch.cat(parts), noise)
    other = logistic_noise(8, 0, (200_000,))
    assert abs(torch.corrcoef(torch.stack([noise, other]))[0, 1]) < 4 / math.sqrt(200_000)


def test_a_closed_mask_is_the_identity_bit_for_bit():
    images, template = torch.randn(2, 3, 20, 20), torch.randn(3, 20, 20)
    assert torch.equal(apply_prompt(images, template, torch.zeros(2, 4, 4)), images)


def test_an_open_mask_adds_the_template_and_a_mixed_one_adds_it_by_region():
    images, template = torch.randn(2, 3, 20, 20), torch.randn(3, 20, 20)
    mask = (torch.rand(2, 4, 4) > 0.5).float()
    expected = images + dilate(mask, 5)[:, None] * template
    torch.testing.assert_close(apply_prompt(images, template, mask), expected)
    assert dilate(mask, 5).shape == (2, 20, 20)


def test_pixels_normalise_as_torchvision_does():
    from torchvision.transforms import Normalize

    pixels = torch.randint(0, 256, (2, 3, 9, 9), dtype=torch.uint8)
    mean, std = torch.tensor([0.48, 0.45, 0.40]), torch.tensor([0.26, 0.26, 0.27])
    assert torch.equal(normalise(pixels, mean, std), Normalize(mean, std)(pixels / 255))


@pytest.mark.parametrize("gumbel", ["soft", "hard"])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("padding", ["zero", "replicate"])
def test_gradients_match_finite_differences(gumbel, edge, padding):
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    inputs = [
        torch.randn(3, 9, 9, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 5, 5, dtype=torch.float64, requires_grad=True),
        torch.randn((), dtype=torch.float64, requires_grad=True),
    ]
    noise = torch.randn(2, 3, 3, dtype=torch.float64)
    options = {"tau": 1.5, "noise": noise, "edge": edge, "edge_padding": padding}
    if gumbel == "soft":
        assert torch.autograd.gradcheck(
            lambda *i: adaptive_prompt(images, *i, mode="soft", **options)[0], inputs
        )
        return
    # Straight-through is no true gradient: the mask's is soft, the template's is hard.
    prompted, _, mask = adaptive_prompt(images, *inputs, mode="hard", **options)
    upstream = torch.randn_like(prompted)
    got = torch.autograd.grad(prompted, inputs, upstream)
    torch.testing.assert_close(got[0], (dilate(mask, 3)[:, None] * upstream).sum(0).detach())


@pytest.mark.slow
def test_the_collapsed_generator_compiles_on_a_cpu():
    weights = [weight.detach().float() for weight in generator_weights(4, 4)]
    edges = torch.randn(2, 3, 8, 8)

    def delta(edges):
        return region_logit(edges, *collapse(*weights))

    assert torch.allclose(torch.compile(delta)(edges), delta(edges), atol=1e-5)
