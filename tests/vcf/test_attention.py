"""Attention: the rule that chooses a GPU's kernel, as a function of a description, and the layers that use it."""

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0
from PIL import Image
from torch.nn.attention import _cur_sdpa_kernel_backends

from support import ip_adapters
from support.tiny_models import build_pipeline
from vcf_batch.errors import NodeError, UsageError
from vcf_batch.vcf import attention
from vcf_batch.vcf.attention import (
    FALLBACKS,
    MAX_HEAD_DIM,
    MIN_CUDNN,
    Gpu,
    TokenBiasAttention,
    choose_kernel,
    cudnn_attention,
    refuse_node,
)
from vcf_batch.vcf.pipeline import VCFPipeline

HOPPER = Gpu((9, 0), cudnn_built=91501, cudnn=91501, flash3=False)
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("gpu", "dtype", "chosen"),
    [
        (HOPPER, BF16, "cudnn"),
        (HOPPER, torch.float16, "cudnn"),
        (HOPPER, torch.float32, "efficient"),
        (dataclasses.replace(HOPPER, flash3=True), BF16, "cudnn"),
        (dataclasses.replace(HOPPER, capability=(10, 0)), BF16, "cudnn"),
        (dataclasses.replace(HOPPER, cudnn_built=91002, flash3=True), BF16, "flash3"),
        (dataclasses.replace(HOPPER, cudnn_built=91002), BF16, "flash2"),
        (dataclasses.replace(HOPPER, cudnn_built=None, cudnn=None), BF16, "flash2"),
        (Gpu((8, 0), 91501, 91501, flash3=True), BF16, "flash2"),
        (Gpu((12, 0), 91501, 91501, flash3=False), BF16, "flash2"),
        (Gpu((7, 5), 91501, 91501, flash3=False), torch.float16, "efficient"),
    ],
)
def test_one_rule_chooses_the_kernel_of_attention(gpu: Gpu, dtype: torch.dtype, chosen: str) -> None:
    """cuDNN where the GPU and torch's build provide for it, then FlashAttention 3 if installed, then 2."""
    assert choose_kernel(gpu, dtype) == chosen


@pytest.mark.parametrize("loaded", [None, 90100, MIN_CUDNN - 1])
def test_a_node_where_another_cudnn_shadows_torchs_own_is_refused(loaded: int | None) -> None:
    """It does not fall back in silence; the node is to blame, not the settings, so other nodes go on."""
    shadowed = dataclasses.replace(HOPPER, cudnn=loaded, flash3=True)
    chosen = choose_kernel(shadowed, BF16)
    with pytest.raises(
        NodeError, match=rf"node-b loads cuDNN .*must be {MIN_CUDNN} or newer.*LD_LIBRARY_PATH"
    ) as error:
        refuse_node(shadowed, chosen, None, "node-b")
    assert not isinstance(error.value, UsageError)


def test_a_cudnn_that_torch_refuses_is_refused_whatever_computes_attention() -> None:
    """Convolutions need it, and would fail in the middle of a shard."""
    ampere = Gpu((8, 0), cudnn_built=91002, cudnn=None, flash3=False)
    with pytest.raises(NodeError, match=r"node-b loads cuDNN that torch refuses; it must be 91002 or newer"):
        refuse_node(ampere, choose_kernel(ampere, BF16), None, "node-b")
    refuse_node(dataclasses.replace(ampere, cudnn=91002), "flash2", None, "node-b")


def test_the_kernels_of_a_process_stay_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch restores its own choice when the context is left, or forgotten."""
    before = _cur_sdpa_kernel_backends(with_priority=True)
    monkeypatch.setattr(attention, "describe_gpu", lambda: HOPPER)
    monkeypatch.setattr(attention, "_try_out", lambda *_: None)
    try:
        assert attention.pin_kernel(BF16) == attention.pin_kernel(BF16) == "cudnn"
        gc.collect()
        assert _cur_sdpa_kernel_backends(with_priority=True)[: len(FALLBACKS)] == FALLBACKS
        monkeypatch.setattr(attention, "_try_out", lambda *_: [][0])
        with pytest.raises(NodeError, match=r"fails on .*IndexError"):
            attention.pin_kernel(BF16)
    finally:
        attention._fixed.pop().__exit__(None, None, None)
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


def test_a_node_whose_kernel_fails_is_refused_with_the_reason() -> None:
    with pytest.raises(NodeError, match=r"flash2 on this GPU, and it fails on node-b: no kernel image\. Install"):
        refuse_node(dataclasses.replace(HOPPER, cudnn_built=None), "flash2", "no kernel image", "node-b")
    refuse_node(HOPPER, "cudnn", None, "node-b")
    refuse_node(dataclasses.replace(HOPPER, cudnn=92000), "cudnn", None, "node-b")


def test_the_kernel_called_by_name_takes_what_it_is_given() -> None:
    """torch has the operator, with these arguments, in builds without CUDA too."""
    tokens = torch.ones(1, 2, 8, 8, device="meta", dtype=BF16)
    assert cudnn_attention(tokens, tokens, tokens).shape == tokens.shape


@pytest.mark.parametrize("cross", [False, True])
def test_a_kernel_of_its_own_gives_what_torch_gives(cross: bool) -> None:
    """Layers of a UNet are computed alike with it, to the bit where the kernel is torch's."""
    layer, hidden, tokens = _layer(head_dim=8, cross=cross)
    calls: list[torch.Size] = []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        calls.append(query.shape)
        return F.scaled_dot_product_attention(query, key, value)

    with torch.no_grad():
        ours = TokenBiasAttention(kernel)(layer, hidden, tokens)
        assert torch.equal(ours, AttnProcessor2_0()(layer, hidden, tokens))
    assert calls == [torch.Size([2, 2, 9, 8])]


def test_what_the_kernel_does_not_take_is_left_to_torch() -> None:
    """Gradients, a bias and other head dimensions: a function of the call alone, whatever the node."""

    def never(*_: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    layer, hidden, tokens = _layer(head_dim=8, cross=True)
    TokenBiasAttention(never)(layer, hidden, tokens)
    with torch.no_grad():
        TokenBiasAttention(never)(layer, hidden, tokens, token_bias=torch.zeros(2, 1, 5))
        for head_dim in (4, MAX_HEAD_DIM + 8):
            TokenBiasAttention(never)(*_layer(head_dim, cross=False))


def _layer(head_dim: int, cross: bool) -> tuple[Attention, torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(0)
    layer = Attention(16, cross_attention_dim=12 if cross else None, heads=2, dim_head=head_dim)
    return layer, torch.randn(2, 9, 16), torch.randn(2, 5, 12) if cross else None


# Processors that somebody has set


PICTURE = Image.radial_gradient("L").convert("RGB")


class Halved(AttnProcessor2_0):
    """A processor of somebody's own, with another result than attention."""

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().__call__(*args, **kwargs) / 2


@pytest.mark.parametrize("cross", [False, True])
def test_fused_projections_are_computed_by_their_own_weights(cross: bool) -> None:
    """With a bias too, and in layers with norms of their own; to the bit as diffusers computes them."""
    layer, hidden, tokens = _layer(head_dim=8, cross=cross)
    with torch.no_grad():
        layer.fuse_projections()
        (layer.to_kv if cross else layer.to_qkv).weight.mul_(1.5)  # so that the result tells which weights were used
        expected = FusedAttnProcessor2_0()(layer, hidden, tokens)
        ours = TokenBiasAttention.in_place_of(FusedAttnProcessor2_0())
        assert torch.equal(ours(layer, hidden, tokens), expected)
        assert not torch.equal(TokenBiasAttention()(layer, hidden, tokens), expected)
        layer.residual_connection = True
        assert torch.equal(ours(layer, hidden, tokens), FusedAttnProcessor2_0()(layer, hidden, tokens))


def test_fused_projections_stay_in_use_with_references() -> None:
    pipeline = build_pipeline()
    settings: dict[str, Any] = {"seeds": [1], "strength": 0.5}
    plain = pipeline.generate(["a cat"], [PICTURE], **settings)
    own = pipeline.unet.attn_processors
    pipeline.fuse_qkv_projections()
    torch.testing.assert_close(pipeline.generate(["a cat"], [PICTURE], **settings), plain, atol=1e-5, rtol=0)
    for name, module in pipeline.unet.named_modules():
        if name.endswith("attn2"):
            assert isinstance(module.processor, TokenBiasAttention)
            module.to_kv.weight.data.zero_()
    assert not torch.allclose(pipeline.generate(["a cat"], [PICTURE], **settings), plain, atol=1e-3)
    pipeline.unfuse_qkv_projections()
    assert pipeline.unet.attn_processors == own
    assert torch.equal(pipeline.generate(["a cat"], [PICTURE], **settings), plain)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_processors_of_somebodys_own_are_used_where_nothing_needs_a_bias(strength: float) -> None:
    """Prompts alone, and one reference at strength 1 of a batch in which nothing is padded."""
    pipeline = build_pipeline()
    settings: dict[str, Any] = {"seeds": [1], "strength": strength}
    plain = pipeline.generate(["a cat"], [PICTURE], **settings)
    pipeline.unet.set_attn_processor(Halved())
    assert not torch.allclose(pipeline.generate(["a cat"], [PICTURE], **settings), plain, atol=1e-3)
    assert {type(each) for each in pipeline.unet.attn_processors.values()} == {Halved}


def test_processors_of_somebodys_own_are_refused_where_they_would_be_dropped(tmp_path: Path) -> None:
    """By name, and with the way back: for a strength, when the pipeline is set up, and for an IP-Adapter."""
    pipeline = build_pipeline()
    adapter = _adapter(tmp_path, pipeline)
    message = r"down_blocks\.0.* of the UNet is Halved, which cannot take .*set_attn_processor\(AttnProcessor2_0\(\)\)"

    def refused() -> None:
        with pytest.raises(UsageError, match=message):
            pipeline.generate(["a cat"], [PICTURE], seeds=[1], strength=0.5)
        with pytest.raises(UsageError, match=message):
            pipeline.set_up("cpu")
        with pytest.raises(UsageError, match=message):
            pipeline.use_ip_adapter(*adapter)

    pipeline.unet.set_attn_processor(Halved())
    refused()
    pipeline.unet.set_attn_processor(AttnProcessor2_0())
    pipeline.generate(["a cat"], [PICTURE], seeds=[1], strength=0.5)
    pipeline.enable_attention_slicing(1)
    message = "SlicedAttnProcessor, which cannot take"
    refused()
    pipeline.unet.set_attn_processor(AttnProcessor())  # computes the same without torch's kernels
    pipeline.generate(["a cat"], [PICTURE], seeds=[1], strength=0.5)


def _adapter(folder: Path, pipeline: VCFPipeline) -> tuple[str, str]:
    """Weights and encoder of an IP-Adapter for a pipeline."""
    encoder = ip_adapters.save_encoder(folder / "encoder")
    return str(ip_adapters.save_adapter(folder / "base.safetensors", pipeline.unet)), str(encoder)


def test_an_adapter_whose_processors_were_replaced_is_refused(tmp_path: Path) -> None:
    """Its references would have no effect."""
    pipeline = build_pipeline()
    adapter = _adapter(tmp_path, pipeline)
    pipeline.use_ip_adapter(*adapter)
    settings: dict[str, Any] = {"seeds": [1], "fusion": "ip_adapter"}
    expected = pipeline.generate(["a cat"], [PICTURE], **settings)
    pipeline.fuse_qkv_projections()
    with pytest.raises(UsageError, match=r"were replaced after use_ip_adapter, .*: call use_ip_adapter again"):
        pipeline.generate(["a cat"], [PICTURE], **settings)
    pipeline.use_ip_adapter(*adapter)
    torch.testing.assert_close(pipeline.generate(["a cat"], [PICTURE], **settings), expected, atol=1e-5, rtol=0)
