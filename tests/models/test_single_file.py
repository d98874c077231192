"""A Stable Diffusion in one file loads without a network, with the configuration of the published model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from support.original_layout import save_checkpoint, save_layout
from support.sd_layouts import save_clip, save_sd15, save_sd21, save_sdxl
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import ModelError
from vcf_batch.models import resolution
from vcf_batch.models.cache import fetch
from vcf_batch.models.parts import Parts
from vcf_batch.models.prompt_tokens import windows_of
from vcf_batch.models.single_file import layout
from vcf_batch.records import Row
from vcf_batch.training.assembly import assemble
from vcf_batch.vcf.aligner import ImageAligner
from vcf_batch.vcf.pipeline import VCFPipeline

SAVED: dict[str, Callable[[Path], Path]] = {"sd15": save_sd15, "sd21": save_sd21, "sdxl": save_sdxl}
PUBLISHED = {
    "sd15": (859_520_964, 83_653_863, 123_060_480),
    "sd21": (865_910_724, 83_653_863, 340_387_840),
    "sdxl": (2_567_463_684, 83_653_863, 123_060_480, 694_659_840),
}
"""Numbers of parameters of UNet, VAE and text encoders."""


CLIP_L = "conditioner.embedders.0.transformer.text_model.embeddings"


@pytest.fixture(params=[*SAVED])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A folder in diffusers' layout, and the same model in one file. The shipped layouts are of its size."""
    return make(request.param, tmp_path, monkeypatch)


def make(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    model = SAVED[name](tmp_path / "model")
    save_layout(model, tmp_path / "layouts" / name)
    (tmp_path / "vocabulary").mkdir()
    for file in ("vocab.json", "merges.txt"):
        tokenizer = json.loads((model / "tokenizer" / "tokenizer.json").read_text())["model"]
        text = json.dumps(tokenizer["vocab"]) if file == "vocab.json" else "#version: 0.2\n"
        (tmp_path / "vocabulary" / file).write_text(text)
    monkeypatch.setattr(layout, "CONFIGURATIONS", tmp_path / "layouts")
    monkeypatch.setattr(layout, "VOCABULARY", tmp_path / "vocabulary")
    return model, save_checkpoint(model, tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_layouts_that_ship_are_those_of_the_published_models(name: str) -> None:
    configs = {file: json.loads(path.read_text()) for file, path in layout.files(name).items() if "config" in file}
    with torch.device("meta"):
        networks = (
            UNet2DConditionModel.from_config(configs["unet/config.json"]),
            AutoencoderKL.from_config(configs["vae/config.json"]),
            *(
                kind(CLIPTextConfig.from_dict(configs[f"{part}/config.json"]))
                for part, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection))
                if f"{part}/config.json" in configs
            ),
        )
    assert tuple(sum(each.numel() for each in network.parameters()) for network in networks) == PUBLISHED[name]


@pytest.mark.parametrize(("name", "padding"), [("sd15", [49407]), ("sd21", [0]), ("sdxl", [49407, 0])])
def test_the_vocabulary_that_ships_is_clip_s(name: str, padding: list[int]) -> None:
    # The numbers are in many a published example of CLIP.
    photo = [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 49407]
    with layout.folder_of(name) as folder:
        found = [CLIPTokenizer.from_pretrained(each) for each in sorted(Path(folder).glob("tokenizer*"))]
    assert [tokenizer.pad_token_id for tokenizer in found] == padding
    for tokenizer in found:
        assert (len(tokenizer), tokenizer.model_max_length) == (49408, 77)
        assert tokenizer("a photo of an astronaut riding a horse")["input_ids"] == photo


def test_a_file_loads_as_the_folder_that_it_was_made_of(checkpoint: tuple[Path, Path]) -> None:
    model, file = checkpoint
    resolved = resolution.resolve(str(file))
    assert fetch(resolved) == str(file)
    one, other = VCFPipeline.from_pretrained(fetch(resolved)), VCFPipeline.from_pretrained(str(model))
    assert type(one) is type(other)
    for part, network in other.components.items():
        if isinstance(network, torch.nn.Module):
            ours, theirs = getattr(one, part).state_dict(), network.state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert one.scheduler.config == other.scheduler.config
    stock = DiffusionPipeline.from_pretrained(model, safety_checker=None)
    settings = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    assert torch.equal(one.encode_prompts(["a b c"]), stock.encode_prompt("a b c", **settings)[0])


def test_a_folder_that_is_named_like_a_file_loads_as_a_folder(tmp_path: Path) -> None:
    folder = save_sd15(tmp_path / "model.safetensors")
    assert VCFPipeline.from_pretrained(str(folder)).unet.config.in_channels == 4


def test_its_configuration_is_read_without_its_weights(checkpoint: tuple[Path, Path]) -> None:
    model, file = checkpoint
    resolved = resolution.resolve(str(file))
    for name in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        assert resolution.read_config(resolved, name) == json.loads((model / name).read_text())
    assert resolution.read_config(resolved, "judge/config.json") is None


def test_it_is_a_base_that_an_aligner_can_be_put_to(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    width = VCFPipeline.from_pretrained(str(checkpoint[1])).unet.config.cross_attention_dim
    ImageAligner(40, width).save_pretrained(tmp_path / "aligner")
    parts = Parts.resolve(str(checkpoint[1]), image_encoder=str(save_clip(tmp_path / "clip")))
    assemble(parts, str(tmp_path / "aligner"), str(tmp_path / "whole"), torch.float32)
    whole = VCFPipeline.from_pretrained(str(tmp_path / "whole"))
    ours, theirs = whole.unet.state_dict(), VCFPipeline.from_pretrained(str(checkpoint[0])).unet.state_dict()
    assert whole.aligner is not None
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_pickle_is_refused_whether_it_is_there_or_not(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"a pickle")
    for name in ("model.ckpt", "lost.ckpt"):
        with pytest.raises(ModelError, match=rf"{name} is a pickle, .* convert it to safetensors"):
            resolution.resolve(str(tmp_path / name))


def without(file: Path, start: str) -> str:
    kept = {name: each for name, each in load_file(file).items() if not name.startswith(start)}
    save_file(kept, file.with_name("less.safetensors"))
    return str(file.with_name("less.safetensors"))


def test_a_file_that_is_no_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    model = save_checkpoint(save_sd15(tmp_path / "model"), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"less.safetensors is no checkpoint .*it lacks model.diffusion_model"):
        resolution.resolve(without(model, "model.diffusion_model."))
    with pytest.raises(ModelError, match="no checkpoint of Stable Diffusion"):
        resolution.resolve(without(model, "cond_stage_model."))
    tensors = load_file(model)
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(16, 9, 3, 3)
    save_file(tensors, tmp_path / "inpainting.safetensors")
    with pytest.raises(ModelError, match="takes 9 channels, and the latents have 4"):
        resolution.resolve(str(tmp_path / "inpainting.safetensors"))
    save_file({"image_proj.proj.weight": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    with pytest.raises(ModelError, match="it is an IP-Adapter"):
        resolution.resolve(str(tmp_path / "adapter.safetensors"))
    (tmp_path / "page.safetensors").write_text("<html>not found</html>")
    with pytest.raises(ModelError, match="damaged or no safetensors file"):
        resolution.resolve(str(tmp_path / "page.safetensors"))
    with pytest.raises(ModelError, match=r"has no lost\.safetensors"):
        resolution.resolve(str(tmp_path / "lost.safetensors"))


def test_the_vae_of_an_xl_file_stays_float32_in_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not rounded on the way, as in the folder that the file was made of."""
    model, file = make("sdxl", tmp_path, monkeypatch)
    one, other = (VCFPipeline.from_pretrained(str(each), dtype=torch.bfloat16) for each in (file, model))
    assert (one.vae.dtype, one.unet.dtype, one.text_encoder_2.dtype) == (torch.float32, *[torch.bfloat16] * 2)
    ours, theirs = one.vae.state_dict(), other.vae.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_long_prompt_has_as_many_windows_in_both_text_encoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published tokenizers of Stable Diffusion XL have different tokens for signs such as ``!!``."""
    vocabulary = layout.VOCABULARY
    pipeline = VCFPipeline.from_pretrained(str(make("sdxl", tmp_path, monkeypatch)[1]))
    folder = tmp_path / "words"
    shutil.copytree(vocabulary, folder)
    pipeline.tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=9)
    pipeline.tokenizer_2 = CLIPTokenizer.from_pretrained(folder, model_max_length=9, pad_token="!")
    texts = ["wow!!!!!! " * 3, "a star"]
    for encoder in pipeline.family.encoders:
        encoder.resize_token_embeddings(len(pipeline.tokenizer_2))
    config = RunConfig(manifest="m", output="o", strength=1.0, guidance_scale=5.0, long_prompts="chunk")
    wanted = windows_of(
        pipeline.tokenizers, [Row(number, str(number), text) for number, text in enumerate(texts)], config
    )
    lengths = [len(tokenizer(texts[0])["input_ids"]) for tokenizer in pipeline.tokenizers]
    assert lengths[0] < lengths[1] and wanted[0] > 2 and wanted[1] == 1
    assert [len(own) for own in pipeline.encode_windows(texts)] == [9 * count for count in wanted]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.diffusion_model.input_blocks.0.0.weight": (16, 9, 3, 3)}, "takes 9 channels, and the latents have 4"),
        ({"v_pred": ()}, "is for v-prediction, and the published model predicts noise: use that model as a folder"),
        ({"edm_mean": (1, 4, 1, 1)}, "is Playground v2.5"),
        ({"first_stage_model.decoder.conv_in.weight": None}, "it lacks first_stage_model.decoder.conv_in.weight"),
        ({"conditioner.embedders.1.model.token_embedding.weight": None}, "it is the refiner of Stable Diffusion XL"),
        ({f"{CLIP_L}.token_embedding.weight": None}, rf"it lacks {CLIP_L}"),
    ],
)
def test_a_file_that_is_no_base_of_stable_diffusion_xl_is_refused_by_name(
    change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    shapes: dict[str, tuple[int, ...] | None] = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
        f"{CLIP_L}.token_embedding.weight": (49408, 768),
        "conditioner.embedders.1.model.token_embedding.weight": (49408, 1280),
    }
    assert layout.layout_of(kept(shapes), "xl.safetensors") == "sdxl"
    if "refiner" in message:
        shapes = {"conditioner.embedders.0.model.token_embedding.weight": (49408, 1280), **shapes}
    with pytest.raises(ModelError, match=message):
        layout.layout_of(kept(shapes | change), "xl.safetensors")


def kept(shapes: dict[str, tuple[int, ...] | None]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if shape is not None}


@pytest.mark.parametrize("part", ["model.diffusion_model.out.", "first_stage_model.", "first_stage_model.decoder."])
def test_a_file_that_lacks_weights_is_refused(checkpoint: tuple[Path, Path], part: str) -> None:
    with pytest.raises(ModelError, match=r"less\.safetensors"):
        VCFPipeline.from_pretrained(without(checkpoint[1], part))
