import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU

from adavipro_fast import AdaViPro, PromptConfig
from adavipro_fast.data.metrics import mask_figures
from adavipro_fast.method.clip import load_encoder
from adavipro_fast.method.encoder import LeanAttention
from adavipro_fast.method.functional import dilate
from adavipro_fast.method.prompt import AdaptivePrompt, MaskGenerator, frame, frame_regions

BATCH = 3


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8)


@pytest.fixture
def embeddings():
    return torch.nn.functional.normalize(torch.randn(4, 64), dim=-1)


def count(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("size", "expected"), [(5, 13_140), (30, 69_840), (60, 118_080), (90, 144_720), (112, 150_528)]
)
def test_a_frame_has_the_papers_parameter_count(size, expected):
    assert count(AdaptivePrompt(224, PromptConfig(method="vp", prompt_size=size))) == expected


def test_the_generator_has_the_papers_parameter_count():
    assert count(AdaptivePrompt(224, PromptConfig()).generator) == 132_866
    assert round(count(AdaptivePrompt(224, PromptConfig(embed_dim=8))) / 1000) == 86


@pytest.mark.parametrize(("size", "expected"), [(5, 24), (30, 24), (60, 40), (90, 48), (112, 49)])
def test_the_frame_touches_these_many_regions(size, expected):
    assert frame_regions(224, PromptConfig(prompt_size=size)).sum() == expected


def test_a_prompt_wider_than_half_the_image_is_refused():
    with pytest.raises(ValueError, match="113 does not fit an image of side 224; use 1 to 112"):
        frame(224, 113)


def test_only_the_prompt_learns_and_the_encoder_never_leaves_evaluation(
    encoder, embeddings, pixels
):
    model = AdaViPro(encoder, embeddings, PromptConfig(embed_dim=4)).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert not any(module.training for module in encoder.modules())
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    model(pixels).logits.square().sum().backward()
    optimiser.step()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "prompt.template.values",
        "prompt.generator.convergence.weight",
        "prompt.generator.convergence.bias",
        "prompt.generator.policy.weight",
        "prompt.generator.policy.bias",
    }
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_uint8_pixels_and_normalised_images_give_the_same(encoder, embeddings, pixels):
    model = AdaViPro(encoder, embeddings).eval()
    from_pixels, from_floats = model(pixels), model(model.prompt.normalised(pixels))
    for got, expected in zip(from_pixels, from_floats, strict=True):
        assert torch.equal(got, expected)


def test_collapsed_and_general_path_agree(pixels):
    fast = AdaptivePrompt(224, PromptConfig(embed_dim=5)).eval()
    edges = fast.edges(fast.normalised(pixels))
    torch.testing.assert_close(fast(pixels).delta, fast.generator(edges), rtol=1e-3, atol=1e-2)


def test_relu_takes_the_general_path_and_trains(pixels):
    prompt = AdaptivePrompt(224, PromptConfig(embed_dim=4, activation="relu")).train()
    prompt(pixels, tau=2.0).images.sum().backward()
    assert all(p.grad.isfinite().all() for p in prompt.parameters())


def test_vp_is_always_open(pixels):
    prompt = AdaptivePrompt(224, PromptConfig(method="vp")).eval()
    prompted = prompt(pixels)
    assert prompted.mask.eq(1).all()
    assert torch.equal(prompted.images, prompt.normalised(pixels) + prompt.template())


def test_evaluation_masks_are_argmax_and_training_masks_follow_the_seed(pixels):
    prompt = AdaptivePrompt(224, PromptConfig(embed_dim=4))
    with torch.no_grad():
        prompt.generator.policy.weight.zero_()  # undecided: the noise decides
    first, again, other = (prompt.train()(pixels, seed=s).mask for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    prompted = prompt.eval()(pixels)
    assert torch.equal(prompted.mask, (prompted.delta > 0).float())


def test_a_generator_that_avoids_edges_opens_flat_regions_first():
    images = torch.zeros(16, 3, 64, 64)
    images[:, :, :32, 32:] = torch.randn(16, 3, 32, 32)
    config = PromptConfig(
        prompt_size=32, edge="laplacian-magnitude", edge_padding="replicate",
        generator_init="avoid-edges", embed_dim=4,
    )  # fmt: skip
    prompt = AdaptivePrompt(64, config).eval()
    prompt.initialise(images)
    expected = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert prompt(images).mask.eq(expected).all()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_stays_near_and_leaves_the_original_alone(encoder, pixels, precision):
    images = pixels / 127.5 - 1
    twin = encoder.with_(precision=precision)
    assert torch.nn.functional.cosine_similarity(twin(images), encoder(images)).min() > 0.999
    assert twin(images).dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in encoder.parameters())


@pytest.mark.parametrize("gradient", [True, False])
def test_lean_attention_is_pytorchs_attention(gradient):
    torch.manual_seed(0)
    stock = torch.nn.MultiheadAttention(12, 3, batch_first=True).double().eval()
    results = []
    for attention in (stock, LeanAttention(stock)):
        tokens = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1)).double()
        tokens.requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            out = attention(tokens, tokens, tokens, need_weights=False, attn_mask=None)[0]
        if gradient:
            out.square().sum().backward()
            results.append((out.detach(), tokens.grad))
        else:
            results.append((out,))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_the_twin_of_an_encoder_attends_leanly(encoder):
    kinds = [type(m) for m in encoder.with_(precision="fp32").modules()]
    assert LeanAttention in kinds
    assert torch.nn.MultiheadAttention not in kinds
    assert LeanAttention not in [type(m) for m in encoder.modules()]


def test_mask_figures_tell_adapting_from_placing():
    inside = torch.ones(2, 2, dtype=torch.bool)
    same = torch.ones(4, 2, 2)
    assert mask_figures(same, inside) == (1.0, 0.0, 0.0)
    all_or_nothing = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(4, 1, 1).expand(4, 2, 2)
    assert mask_figures(all_or_nothing, inside) == (0.5, 0.5, 0.0)
    corners = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    placed = torch.stack([corners, 1 - corners] * 2)
    assert mask_figures(placed, inside) == (0.5, 0.5, 0.5)


def test_the_dilated_mask_matches_the_template(pixels):
    prompt = AdaptivePrompt(224, PromptConfig(embed_dim=4)).eval()
    prompted = prompt(pixels)
    added = prompted.images - prompt.normalised(pixels)
    expected = dilate(prompted.mask, 32)[:, None] * prompt.template()
    torch.testing.assert_close(added, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_the_generators_gradients_match_finite_differences(activation):
    config = PromptConfig(region_size=3, embed_dim=2, activation=activation, prompt_size=2)
    generator = MaskGenerator(config).double()
    edges = torch.randn(2, 3, 6, 6, dtype=torch.double)
    names = [name for name, _ in generator.named_parameters()]

    def delta(*values):
        named = dict(zip(names, values, strict=True))
        return torch.func.functional_call(generator, named, (edges,))

    assert torch.autograd.gradcheck(delta, tuple(generator.parameters()))


def test_weights_trained_with_quickgelu_get_it(monkeypatch):
    create = open_clip.create_model

    def without_download(name, pretrained, **options):
        assert pretrained in ("openai", "laion2b_e16")
        return create(name, **options)

    monkeypatch.setattr(open_clip, "create_model", without_download)
    for tag, expected in (("openai", True), ("laion2b_e16", False)):
        modules = load_encoder("ViT-B-32", tag).modules()
        assert any(isinstance(module, QuickGELU) for module in modules) == expected
