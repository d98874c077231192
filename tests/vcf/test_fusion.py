"""Fusion against the authors' recorded vectors, and what must hold for every input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcf_batch.config.limits import ALIGNED_FUSIONS
from vcf_batch.config.strengths import DEFAULT_STRENGTHS
from vcf_batch.errors import UsageError
from vcf_batch.vcf.fusion import Fusion, condition, fuse

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "vcf_golden.npz")


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[name])


@pytest.mark.parametrize(
    ("mode", "name"), [("naive", "naive_fused"), ("cross_attention", "xattn_fused"), ("concat", "concat_fused")]
)
def test_equals_the_authors(mode: str, name: str) -> None:
    fused = fuse(golden("txt"), golden("img"), mode, 0.3)
    torch.testing.assert_close(fused, golden(name), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=25)
@given(
    mode=st.sampled_from(ALIGNED_FUSIONS),
    batch=st.integers(1, 4),
    text=st.integers(1, 6),
    image=st.integers(1, 6),
    strength=st.floats(0, 2),
    seed=st.integers(0, 100),
)
def test_a_batch_equals_its_samples(mode: str, batch: int, text: int, image: int, strength: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, text, 8, generator=generator)
    i = torch.randn(batch, image, 8, generator=generator) * torch.arange(1, batch + 1).reshape(-1, 1, 1)
    together = fuse(x, i, mode, strength)
    alone = torch.cat([fuse(x[n : n + 1], i[n : n + 1], mode, strength) for n in range(batch)])
    assert together.shape == (batch, text + image if mode == "concat" else text, 8)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["naive", "cross_attention"])
def test_strength_0_is_exactly_the_text(mode: str) -> None:
    assert torch.equal(fuse(golden("txt"), golden("img"), mode, 0.0), golden("txt"))


@pytest.mark.parametrize("mode", ["naive", "cross_attention"])
def test_order_of_image_tokens_does_not_matter(mode: str) -> None:
    text, image = golden("txt"), golden("img")
    torch.testing.assert_close(fuse(text, image.flip(1), mode, 0.7), fuse(text, image, mode, 0.7))


@pytest.mark.parametrize("mode", ["naive", "cross_attention"])
def test_a_token_of_weight_2_counts_as_two(mode: str) -> None:
    text, image = golden("txt"), golden("img")
    weights = torch.ones(image.shape[:2])
    torch.testing.assert_close(fuse(text, image, mode, 0.7, weights), fuse(text, image, mode, 0.7))
    weights[:, 2] = 2
    doubled = fuse(text, torch.cat([image, image[:, 2:3]], dim=1), mode, 0.7)
    torch.testing.assert_close(fuse(text, image, mode, 0.7, weights), doubled)


def test_weights_of_concat_are_shares_of_its_strength() -> None:
    """The definition of docs/method.md, section 8; the unconditional side has one image of weight 1."""
    text, image = golden("txt")[0], golden("img")[0]
    fusion = Fusion([image, image[:2], image], strength=0.8, weights=[1, 3, 0])
    tokens, bias = fusion.positive(text)
    assert torch.equal(tokens, torch.cat([text, image, image[:2]]))
    expected = torch.cat([torch.ones(len(text)), torch.full([len(image)], 0.2), torch.full([2], 0.6)])
    torch.testing.assert_close(bias.exp(), expected)
    tokens, bias = fusion.negative(text)
    assert torch.equal(tokens, torch.cat([text, torch.zeros_like(image)]))
    torch.testing.assert_close(bias.exp(), torch.cat([torch.ones(len(text)), torch.full([len(image)], 0.8)]))


@pytest.mark.parametrize("mode", ALIGNED_FUSIONS)
def test_keeps_the_dtype_of_the_text(mode: str) -> None:
    fused = fuse(golden("txt").bfloat16(), golden("img"), mode, DEFAULT_STRENGTHS[mode])
    assert fused.dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ALIGNED_FUSIONS)
def test_is_differentiable(mode: str) -> None:
    text, image = golden("txt").requires_grad_(), golden("img").requires_grad_()
    fuse(text, image, mode, DEFAULT_STRENGTHS[mode]).square().sum().backward()
    assert text.grad is not None and text.grad.isfinite().all() and text.grad.abs().sum() > 0
    assert image.grad is not None and image.grad.isfinite().all() and image.grad.abs().sum() > 0


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'blend'.*naive, concat, cross_attention"):
        fuse(golden("txt"), golden("img"), "blend", 0.5)


def test_no_bias_where_none_is_needed() -> None:
    text, image = golden("txt")[:2], list(golden("img")[:2])

    def bias(*fusions: Fusion) -> torch.Tensor | None:
        return condition(text, text, fusions).select((True, True), guided=True)[1].get("token_bias")

    assert bias(Fusion(image[:1]), Fusion(image[1:])) is None
    assert bias(Fusion(image, "naive", 0.3), Fusion(image[:1], "cross_attention")) is None
    assert bias(Fusion(), Fusion(strength=0.5)) is None
    assert bias(Fusion(image[:1], strength=0.0), Fusion(image, strength=0.0)) is None


def test_bias_and_padding() -> None:
    text, image = golden("txt")[:2], golden("img")[0]
    length = text.shape[1]
    conditioning = condition(text, text, [Fusion([image], strength=0.5), Fusion()])
    tokens, settings = conditioning.select((True, True), guided=True)
    bias = settings["token_bias"]
    assert tokens.shape == (4, length + len(image), image.shape[1])
    assert torch.equal(tokens[2, length:], image)
    assert not tokens[:2, length:].any()
    assert bias.shape == (4, 1, length + len(image))
    assert not bias[:, :, :length].any()
    torch.testing.assert_close(bias[::2, 0, length:], torch.full((2, len(image)), 0.5).log())
    assert bias[1::2, 0, length:].isneginf().all()


def test_samples_out_of_their_range_are_text_alone() -> None:
    """Each sample has a range of its own, with both ends included; where all are outside, no token is hidden."""
    text, image = golden("txt")[:2], golden("img")[0]
    conditioning = condition(text, -text, [Fusion([image], "naive", lo=0.2, hi=0.5), Fusion([image], lo=0.5)])
    found = {time: conditioning.inside(time) for time in (0.1, 0.2, 0.5, 0.6)}
    assert found == {0.1: (False, False), 0.2: (True, False), 0.5: (True, True), 0.6: (False, True)}
    length, (tokens, settings) = text.shape[1], conditioning.select((False, True), guided=True)
    bias = settings["token_bias"]
    assert torch.equal(tokens[2, :length], text[0]) and torch.equal(tokens[3, length:], image)
    assert bias[::2, 0, length:].isneginf().all() and not bias[1::2].any()
    tokens, settings = conditioning.select((False, False), guided=True)
    assert torch.equal(tokens, torch.cat([-text, text])) and not settings


@pytest.mark.parametrize("mode", ["naive", "cross_attention", "concat"])
def test_tokens_are_fused_in_float32_within_autocast_too(mode: str) -> None:
    """Under bfloat16 autocast, sampling may round; what it is conditioned on does not."""
    generator = torch.Generator().manual_seed(0)
    text, image = (torch.randn(2, count, 16, generator=generator) for count in (5, 7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = fuse(text, image, mode, 0.3)
    assert torch.equal(within, fuse(text, image, mode, 0.3))
