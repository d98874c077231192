"""LoRAs in the formats of kohya's sd-scripts and of diffusers, on random models of published layouts."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from support import loras, sd_layouts
from support.diffusers_loras import drawn, stock
from vcf_batch.errors import ModelError
from vcf_batch.vcf.lora.switch import LoraSwitch
from vcf_batch.vcf.lora.weights import LoraWeights, layers_of, read
from vcf_batch.vcf.pipeline import VCFPipeline

SAVED: dict[str, Callable[[Path], Path]] = {
    "sd15": sd_layouts.save_sd15,
    "sd21": sd_layouts.save_sd21,
    "sdxl": sd_layouts.save_sdxl,
}
FORMATS: dict[str, Callable[..., Path]] = {
    "kohya": loras.save_kohya,
    "kohya without alpha": lambda file, pipeline, pairs: loras.save_kohya(file, pipeline, pairs, alpha=None),
    "diffusers": loras.save_diffusers,
    "diffusers with alpha": lambda file, pipeline, pairs: loras.save_diffusers(file, pipeline, pairs, alpha=3),
}
LAYERS = {"attention": loras.ATTENTION, "everything": loras.EVERYTHING, "text": loras.TEXT}


@pytest.fixture(scope="module", params=SAVED)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SAVED[request.param](tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> VCFPipeline:
    return VCFPipeline.from_pretrained(str(folder)).set_up("cpu")


@pytest.fixture
def switch(pipeline: VCFPipeline) -> Any:
    made = LoraSwitch(layers_of(pipeline))
    yield made
    made.use([])


def loaded(pipeline: VCFPipeline, file: Path) -> LoraWeights:
    return read(file.read_bytes(), "the LoRA", pipeline, layers_of(pipeline))


@pytest.mark.parametrize(
    ("format", "layers"),
    [*((format, "everything") for format in FORMATS), ("diffusers", "attention"), ("kohya", "text")],
)
def test_images_are_those_of_the_stock_pipeline_with_the_same_lora(
    folder: Path, pipeline: VCFPipeline, switch: LoraSwitch, tmp_path: Path, format: str, layers: str
) -> None:
    """Loaded there by load_lora_weights, at the same scale: attention, feed-forward, convolutions and text encoders."""
    base = drawn(pipeline)
    pairs = loras.updates(pipeline, LAYERS[layers], seed=3)
    file = FORMATS[format](tmp_path / "lora.safetensors", pipeline, pairs)
    theirs = stock(folder)
    theirs.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="one")
    theirs.set_adapters(["one"], [0.7])
    lora = loaded(pipeline, file)
    assert len(lora.updates) == len(pairs)
    switch.use([(lora, 0.7)])
    found = drawn(pipeline)
    assert abs(found - drawn(theirs)).max() < 1e-4
    assert abs(found - base).max() > 1e-2


def test_several_at_once_are_those_of_the_stock_pipeline(
    folder: Path, pipeline: VCFPipeline, switch: LoraSwitch, tmp_path: Path
) -> None:
    names = [*loras.names_of(tmp_path, pipeline, 2, loras.EVERYTHING)]
    theirs = stock(folder)
    for name in names:
        theirs.load_lora_weights(str(tmp_path), weight_name=name, adapter_name=name.partition(".")[0])
    theirs.set_adapters(["lora0", "lora1"], [0.5, -0.25])
    switch.use([(loaded(pipeline, tmp_path / name), scale) for name, scale in zip(names, (0.5, -0.25), strict=True)])
    assert abs(drawn(pipeline) - drawn(theirs)).max() < 1e-4


def weights_of(pipeline: VCFPipeline) -> dict[str, bytes]:
    parts = [each for name, each in pipeline.components.items() if name in ("unet", "text_encoder", "text_encoder_2")]
    return {
        f"{place} {name}": tensor.detach().numpy().tobytes()
        for place, part in enumerate(parts)
        for name, tensor in part.state_dict().items()
    }


def test_without_a_lora_the_base_has_its_bits_again(pipeline: VCFPipeline, switch: LoraSwitch, tmp_path: Path) -> None:
    """Of all weights and of an image; after scale 0, too, which merges nothing."""
    one, other = (loaded(pipeline, tmp_path / name) for name in loras.names_of(tmp_path, pipeline, 2, loras.EVERYTHING))
    before, image = weights_of(pipeline), drawn(pipeline)
    for off in ([], [(other, 0.0)]):
        switch.use([(one, 0.7), (other, 0.1)])
        assert weights_of(pipeline) != before
        switch.use(off)
        assert weights_of(pipeline) == before
        assert (drawn(pipeline) == image).all()


def test_weights_depend_on_the_loras_alone_and_not_on_those_before(
    pipeline: VCFPipeline, switch: LoraSwitch, tmp_path: Path
) -> None:
    one, other = (loaded(pipeline, tmp_path / name) for name in loras.names_of(tmp_path, pipeline, 2))
    assert switch.use([(one, 0.7)])
    alone = weights_of(pipeline)
    assert not switch.use([(one, 0.7)])  # nothing to do
    for between in ([(other, 1.0)], [(one, 0.2)], [], [(other, 1.0), (one, 0.7)]):
        switch.use(between)
        assert weights_of(pipeline) != alone
        switch.use([(one, 0.7)])
        assert weights_of(pipeline) == alone


def test_a_switch_that_was_interrupted_is_made_up_for(
    pipeline: VCFPipeline, switch: LoraSwitch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a GPU whose memory is full in the middle of it."""
    (lora,) = (loaded(pipeline, tmp_path / name) for name in loras.names_of(tmp_path, pipeline, 1))
    before, made = weights_of(pipeline), []

    def fail(base: Tensor, updates: Any) -> Tensor:
        made.append(base)
        if len(made) == 3:
            raise torch.OutOfMemoryError("full")
        return base + 1

    with monkeypatch.context() as patch:
        patch.setattr("vcf_batch.vcf.lora.switch._merged", fail)
        with pytest.raises(torch.OutOfMemoryError):
            switch.use([(lora, 1.0)])
    assert weights_of(pipeline) != before
    switch.use([])
    assert weights_of(pipeline) == before


def test_alphas_may_differ_by_layer(pipeline: VCFPipeline, tmp_path: Path) -> None:
    """In kohya's format by a tensor each; PEFT's settings have patterns, and a square root of the rank."""
    pairs = loras.updates(pipeline, loras.UNET, seed=1, rank=4)
    file = loras.save_kohya(tmp_path / "a.safetensors", pipeline, pairs, alpha=4)
    tensors = load_file(file)
    key = min(tensors).removesuffix(".alpha")
    factors = factors_of(pipeline, save(tensors | {f"{key}.alpha": torch.tensor(1.0)}), pairs)
    assert sorted(factors) == [0.25, *[1.0] * (len(pairs) - 1)]
    plain = load_file(loras.save_diffusers(tmp_path / "b.safetensors", pipeline, pairs))
    layer = min(pairs).partition(".")[2]
    settings = f'{{"unet.lora_alpha": 8, "unet.use_rslora": true, "unet.alpha_pattern": {{"{layer}": 2}}}}'
    factors = factors_of(pipeline, save(plain, {"lora_adapter_metadata": settings}), pairs)
    assert sorted(factors) == [1.0, *[4.0] * (len(pairs) - 1)]


def factors_of(pipeline: VCFPipeline, data: bytes, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> list[float]:
    found = read(data, "x", pipeline, layers_of(pipeline))
    return [round(float((each.up / pairs[each.layer][1].flatten(1)).mean()), 4) for each in found.updates]


def test_half_precision_is_merged_in_float32(pipeline: VCFPipeline, switch: LoraSwitch, tmp_path: Path) -> None:
    pairs = loras.updates(pipeline, loras.UNET, seed=1)
    halves = {name: (down.half(), up.half()) for name, (down, up) in pairs.items()}
    lora = loaded(pipeline, loras.save_kohya(tmp_path / "a.safetensors", pipeline, halves, alpha=None))
    name = min(pairs)
    weight = pipeline.unet.get_parameter(f"{name.removeprefix('unet.')}.weight")
    base = weight.detach().clone()
    switch.use([(lora, 1.0)])
    down, up = (each.float() for each in halves[name])
    torch.testing.assert_close(weight.detach(), base + up @ down, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> VCFPipeline:
    return VCFPipeline.from_pretrained(str(sd_layouts.save_sd15(tmp_path_factory.mktemp("models") / "sd15")))


NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({f"{NAME}.hada_w1_a": torch.ones(2, 2)}, "is a LoHa, as its tensor .*hada_w1_a shows; only plain LoRAs"),
        ({f"{NAME}.lokr_w1": torch.ones(2, 2)}, "is a LoKr"),
        ({f"{NAME}.dora_scale": torch.ones(2, 2)}, "is a DoRA"),
        ({f"{NAME}.lora_up.weight": None}, "which scales no tensor of it; copy the file again"),
        ({f"{NAME}.lora_up.weight": None, f"{NAME}.alpha": None}, "cannot be converted .KeyError"),
        ({f"{NAME}.lora_down.weight": torch.full((4, 24), torch.nan)}, "has values that are not finite"),
        ({f"{NAME}.lora_down.weight": torch.ones(4, 24, dtype=torch.int64)}, "has values of torch.int64"),
        ({f"{NAME}.lora_down.weight": torch.ones(4, 64)}, "text tokens of width 64, and this model's have width 24"),
        ({f"{NAME}.lora_down.weight": torch.ones(3, 24)}, r"have the shapes \[3, 24\] and \[32, 4\], and the layer's"),
        ({f"{NAME}.lora_up.weight": torch.ones(16, 4)}, r"shapes \[4, 24\] and \[16, 4\], and the layer's weight \[32"),
        (
            {f"lora_unet_nowhere.lora_{way}.weight": torch.ones(1, 1) for way in ("up", "down")},
            "which has no layer unet.nowhere: use one that was trained for this model's base",
        ),
        ({f"lora_te2_a.lora_{way}.weight": torch.ones(1, 1) for way in ("up", "down")}, "is for Stable Diffusion XL"),
        ({"something.else": torch.ones(1)}, "belong to no part of a Stable Diffusion|cannot be converted"),
        ({"lora_unet_x.alpha": torch.ones(1)}, "has lora_unet_x.alpha, which scales no tensor of it"),
    ],
)
def test_a_file_that_does_not_fit_is_told_with_the_reason(
    sd15: VCFPipeline, tmp_path: Path, change: dict[str, Tensor | None], reason: str
) -> None:
    """diffusers warns of names that fit no layer, and loads the rest."""
    pairs = loras.updates(sd15, re.compile(r".*mid_block.*attn2\.to_k"), seed=1)
    tensors = load_file(loras.save_kohya(tmp_path / "a.safetensors", sd15, pairs)) | change
    data = save({name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(ModelError, match=f"the LoRA .*({reason})"):
        read(data, "the LoRA", sd15, layers_of(sd15))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x04.", b"\xff" * 100, b"<html>" * 50, save({})])
def test_a_file_that_is_no_safetensors_file_of_a_lora_is_refused(sd15: VCFPipeline, data: bytes) -> None:
    with pytest.raises(ModelError, match=r"the LoRA is (damaged or no safetensors|no LoRA)"):
        read(data, "the LoRA", sd15, layers_of(sd15))


def test_a_file_that_is_cut_short_anywhere_is_refused(sd15: VCFPipeline, tmp_path: Path) -> None:
    pairs = loras.updates(sd15, loras.UNET, seed=1)
    whole = loras.save_kohya(tmp_path / "a.safetensors", sd15, pairs).read_bytes()
    for size in range(0, len(whole), len(whole) // 37):
        with pytest.raises(ModelError, match="is damaged or no safetensors file"):
            read(whole[:size], "the LoRA", sd15, layers_of(sd15))
