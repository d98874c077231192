"""What an IP-Adapter must have, told from configurations and headers alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from support import hub_server, ip_adapters
from support.tiny_models import build_pipeline
from vcf_batch.errors import ModelError
from vcf_batch.models.adapter_layout import check_files, cross_attention_layers, encoder_widths
from vcf_batch.models.adapters import encoder_beside, resolve_adapter
from vcf_batch.models.names import ADAPTERS, ADAPTERS_ID

SD15: dict[str, Any] = {"cross_attention_dim": 768}
UNETS: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1.5": SD15,
    "Stable Diffusion 2.1": {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "deeper": SD15 | {"layers_per_block": 1, "transformer_layers_per_block": 2, "block_out_channels": (32, 64, 96, 96)},
    "two levels": {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
}


@pytest.mark.parametrize("name", UNETS)
def test_the_layers_of_a_configuration_are_those_of_the_unet(name: str) -> None:
    """Their number, order and shapes, at full size."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
    modules = [unet.get_submodule(place.removesuffix(".processor")) for place in [*unet.attn_processors][1::2]]
    assert cross_attention_layers(unet.config) == [tuple(module.to_k.weight.shape) for module in modules]


@pytest.mark.parametrize(
    "change",
    [{"down_block_types": ("AttnDownBlock2D",)}, {"only_cross_attention": True}, {"cross_attention_dim": [1, 2]}],
    ids=str,
)
def test_a_unet_of_other_blocks_is_left_to_the_workers(change: dict[str, Any]) -> None:
    known = build_pipeline().unet.config
    assert cross_attention_layers(known) is not None
    assert cross_attention_layers({**known, **change}) is None


def test_widths_are_those_of_the_vision_tower() -> None:
    """The projection of a CLIP with both towers stands outside of their configurations."""
    assert encoder_widths({"hidden_size": 1280, "projection_dim": 1024}) == (1280, 1024)
    assert encoder_widths({"vision_config": {"hidden_size": 1280}, "projection_dim": 768}) == (1280, 768)
    assert encoder_widths({}) == (None, None)


@pytest.mark.parametrize("name", ["ip-adapter-sd15", "ip-adapter-plus-sd15", "ip-adapter-full-face-sd15"])
def test_the_header_alone_is_read_from_the_hub(name: str, tmp_path: Path) -> None:
    """A file that fits passes, one that does not is refused, and neither is downloaded."""
    unet, file = build_pipeline().unet, Path(ADAPTERS[name].file)
    kind = next((kind for kind in ("plus", "full") if kind in name), "base")
    ip_adapters.save_adapter(tmp_path / file, unet, kind)
    ip_adapters.save_encoder(tmp_path / "models" / "image_encoder")
    with hub_server.running() as hub:
        hub.repositories[ADAPTERS_ID] = tmp_path
        adapter = resolve_adapter(name)
        encoder = encoder_beside(adapter)
        check_files(adapter, encoder, unet.config)
        with pytest.raises(ModelError, match=f"{name} gives tokens of width 32, but .* is conditioned on width 768"):
            check_files(adapter, encoder, {**unet.config, "cross_attention_dim": 768})
        (tmp_path / file).write_bytes(b"<html>")
        with pytest.raises(ModelError, match="safetensors"):
            check_files(adapter, encoder, unet.config)
        assert not any("image_encoder/model" in request for request in hub.requests)


def test_an_encoder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    unet = build_pipeline().unet
    file = ip_adapters.save_adapter(tmp_path / "x.safetensors", unet)
    (ip_adapters.save_encoder(tmp_path / "image_encoder") / "config.json").unlink()
    adapter = resolve_adapter(str(file))
    with pytest.raises(ModelError, match=r"image_encoder has no config\.json; .* name another with --image-encoder"):
        check_files(adapter, encoder_beside(adapter), unet.config)
