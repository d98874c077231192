"""LoRAs by the names that their tensors have in published files: each is applied as a whole, or refused."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from support import loras, sd_layouts
from support.diffusers_loras import drawn, stock
from vcf_batch.errors import ModelError
from vcf_batch.vcf.lora.switch import LoraSwitch
from vcf_batch.vcf.lora.weights import layers_of, read
from vcf_batch.vcf.pipeline import VCFPipeline

Pairs = Mapping[str, tuple[Tensor, Tensor]]
SAVED: dict[str, Callable[[Path], Path]] = {
    "sd15": sd_layouts.save_sd15,
    "sd21": sd_layouts.save_sd21,
    "sdxl": sd_layouts.save_sdxl,
}


def tower(name: str) -> str:
    """A layer's name as files have it that were written before transformers 5."""
    part, _, layer = name.partition(".")
    return f"{part}.text_model.{layer.removeprefix('text_model.')}" if part == "text_encoder" else name


def by_name(pairs: Pairs, ends: Callable[[str], tuple[str, str]]) -> dict[str, Tensor]:
    return {key: tensor for name, pair in pairs.items() for key, tensor in zip(ends(name), pair, strict=True)}


def older(name: str) -> tuple[str, str]:
    """diffusers up to 0.21: the layers of attention processors."""
    name = re.sub(r"(attn\d)\.to_(\w+?)(\.0)?$", r"\1.processor.to_\2_lora", tower(name))
    name = re.sub(r"\.(q|k|v|out)_proj$", r".to_\1_lora", name)
    stem = name if name.endswith("_lora") else f"{name}.lora{'_linear_layer' if name.startswith('text') else ''}"
    return f"{stem}.down.weight", f"{stem}.up.weight"


def newer(name: str) -> tuple[str, str]:
    """diffusers since 0.22."""
    end = ".lora" if name.startswith("unet") else ".lora_linear_layer"
    return f"{tower(name)}{end}.down.weight", f"{tower(name)}{end}.up.weight"


def peft(name: str) -> tuple[str, str]:
    return f"{tower(name)}.lora_A.weight", f"{tower(name)}.lora_B.weight"


def unet_alone(name: str) -> tuple[str, str]:
    """``save_attn_procs`` of diffusers up to 0.16."""
    down, up = older(name)
    return down.removeprefix("unet."), up.removeprefix("unet.")


def as_convolutions(pairs: Pairs) -> dict[str, tuple[Tensor, Tensor]]:
    """Linear layers around attention as convolutions of one pixel, as sd-scripts train Stable Diffusion 2."""
    return {
        name: (down[..., None, None], up[..., None, None]) if "proj_" in name and down.ndim == 2 else (down, up)
        for name, (down, up) in pairs.items()
    }


def as_linear(pairs: Pairs) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (down.squeeze((2, 3)), up.squeeze((2, 3))) if down.shape[2:] == (1, 1) else (down, up)
        for name, (down, up) in pairs.items()
    }


ALL, ATTENTION = re.compile(r".*"), re.compile(r"unet\..*attn.*")
LAYOUTS: dict[str, tuple[re.Pattern[str], Callable[[VCFPipeline, Pairs], dict[str, Tensor]]]] = {
    "kohya, names of diffusers": (ALL, lambda pipeline, pairs: loras.kohya(pipeline, pairs, 4.0)),
    "kohya, original names": (ALL, lambda pipeline, pairs: loras.kohya(pipeline, pairs, 4.0, loras.original)),
    "kohya, other projections": (ALL, lambda pipeline, pairs: loras.kohya(pipeline, as_convolutions(pairs), 4.0)),
    "kohya, linear projections": (ALL, lambda pipeline, pairs: loras.kohya(pipeline, as_linear(pairs), 4.0)),
    "kohya, text encoders alone": (loras.TEXT, lambda pipeline, pairs: loras.kohya(pipeline, pairs, 4.0)),
    "queries and keys of text encoders": (
        re.compile(r"text_encoder.*\.[qk]_proj"),
        lambda pipeline, pairs: loras.kohya(pipeline, pairs, 4.0),
    ),
    "diffusers, processors": (ALL, lambda _, pairs: by_name(pairs, older)),
    "diffusers": (ALL, lambda _, pairs: by_name(pairs, newer)),
    "diffusers, a UNet alone": (ATTENTION, lambda _, pairs: by_name(pairs, unet_alone)),
    "PEFT": (ALL, lambda _, pairs: by_name(pairs, peft)),
}


@pytest.fixture(scope="module", params=SAVED)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SAVED[request.param](tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> VCFPipeline:
    return VCFPipeline.from_pretrained(str(folder)).set_up("cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layer_of_a_published_layout_gets_its_update(pipeline: VCFPipeline, layout: str) -> None:
    """Each linear layer and convolution of UNet and text encoders, with the tensors that the file has for it."""
    which, write = LAYOUTS[layout]
    pairs = loras.updates(pipeline, which, seed=1)
    found = read(save(write(pipeline, pairs)), "x", pipeline, layers_of(pipeline))
    assert {update.layer for update in found.updates} == pairs.keys()
    for update in found.updates:
        down, up = pairs[update.layer]
        assert torch.equal(update.down, down.flatten(1)) and torch.equal(update.up, up.flatten(1))


READ_BY_DIFFUSERS = re.compile(r"(?!unet\.add_embedding|.*text_projection).*")
"""Layers that diffusers reads in all of these layouts."""


@pytest.mark.parametrize(
    ("folder", "layout"),
    [
        ("sd15", "kohya, names of diffusers"),
        ("sd21", "diffusers, processors"),
        ("sdxl", "kohya, names of diffusers"),
        ("sdxl", "kohya, original names"),
        ("sdxl", "diffusers, processors"),
    ],
    indirect=["folder"],
)
def test_images_are_those_of_diffusers_with_all_layers(
    folder: Path, pipeline: VCFPipeline, tmp_path: Path, layout: str
) -> None:
    pairs = loras.updates(pipeline, READ_BY_DIFFUSERS, seed=2, size=0.1)
    save_file(LAYOUTS[layout][1](pipeline, pairs), tmp_path / "a.safetensors")
    theirs = stock(folder)
    theirs.load_lora_weights(str(tmp_path), weight_name="a.safetensors", adapter_name="one")
    theirs.set_adapters(["one"], [0.7])
    lora = read((tmp_path / "a.safetensors").read_bytes(), "x", pipeline, layers_of(pipeline))
    base, switch = drawn(pipeline), LoraSwitch(layers_of(pipeline))
    switch.use([(lora, 0.7)])
    found = drawn(pipeline)
    switch.use([])
    assert abs(found - drawn(theirs)).max() < 1e-4
    assert abs(found - base).max() > 1e-2


def test_names_of_two_layouts_at_once_are_refused(pipeline: VCFPipeline) -> None:
    """diffusers leaves one of them out in silence."""
    pairs = loras.updates(pipeline, re.compile(r"unet\.mid_block.*to_k"), seed=1)
    tensors = loras.kohya(pipeline, pairs) | loras.kohya(pipeline, pairs, named=loras.original)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(ModelError, match=r"x has .* of them have names of another layout than the rest"):
        read(save(tensors), "x", pipeline, layers_of(pipeline))
