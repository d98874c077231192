"""Models load from the layouts that are found: variants, ``.bin``, both kinds of prediction, fine-tunes."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPVisionModelWithProjection

from support import ip_adapters, runs, sd_layouts
from vcf_batch.errors import ModelError
from vcf_batch.metrics.clip_score import ClipJudge
from vcf_batch.models import resolution
from vcf_batch.models.loading import load_errors
from vcf_batch.models.model_files import chosen, lone_variant
from vcf_batch.models.prompt_tokens import read_tokenizers
from vcf_batch.vcf.pipeline import VCFPipeline

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
BIN = {part: "pytorch_model.bin" if part == "text_encoder" else f"{name}.bin" for part, name in PARTS.items()}


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd_layouts.save_sd15(tmp_path_factory.mktemp("models") / "sd15")


@pytest.fixture
def model(sd15: Path, tmp_path: Path) -> Path:
    """A copy without the files of ``sd15`` that are not read."""
    ignored = shutil.ignore_patterns("*.fp16.*", "*.non_ema.*", "v1-5*")
    return Path(shutil.copytree(sd15, tmp_path / "model", ignore=ignored))


def load(folder: Path) -> VCFPipeline:
    with load_errors(f"the model in {folder}"):
        return VCFPipeline.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True)


def draw(folder: Path) -> torch.Tensor:
    pipeline = load(folder).set_up("cpu")
    return pipeline.generate(["a red star"], seeds=[1], steps=2, height=32, width=32)


def rename(folder: Path, part: str, variant: str) -> None:
    """Give the weights of a part another name, and keep them as they are."""
    own = folder / part / f"{PARTS[part]}.safetensors"
    own.rename(own.with_suffix(f".{variant}.safetensors"))


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
def test_a_folder_with_a_variant_alone_loads(model: Path, variant: str) -> None:
    """So do its parts that have plain weights; and where a part has both, the plain ones are the model's."""
    plain = draw(model)
    for part in ("unet", "text_encoder"):
        rename(model, part, variant)
    assert lone_variant(str(model / "unet")) == variant and lone_variant(str(model / "vae")) is None
    (model / "vae" / f"diffusion_pytorch_model.{variant}.safetensors").write_bytes(b"which is not read")
    torch.testing.assert_close(draw(model), plain, atol=0, rtol=0)
    assert f"vae/diffusion_pytorch_model.{variant}.safetensors" not in chosen(
        [str(path.relative_to(model)) for path in model.rglob("*.*")]
    )


def test_half_precision_is_what_a_variant_holds(model: Path) -> None:
    for part, name in PARTS.items():
        own = model / part / f"{name}.safetensors"
        tensors = {key: value.half() for key, value in safetensors.torch.load_file(own).items()}
        safetensors.torch.save_file(tensors, own.with_suffix(".fp16.safetensors"), {"format": "pt"})
        own.unlink()
    pipeline = load(model)
    assert pipeline.unet.dtype == torch.float32
    assert all(torch.equal(value, value.half().float()) for value in pipeline.unet.parameters())
    assert draw(model).isfinite().all()


def test_a_folder_with_bin_files_loads(model: Path) -> None:
    """As bare tensors, under the names that are published."""
    plain = draw(model)
    for part, name in PARTS.items():
        own = model / part / f"{name}.safetensors"
        torch.save(safetensors.torch.load_file(own), own.with_name(BIN[part]))
        own.unlink()
    assert resolution.resolve(str(model)).kind == "directory"
    torch.testing.assert_close(draw(model), plain, atol=0, rtol=0)


def test_a_fine_tune_loads_and_is_another_model(model: Path, sd15: Path) -> None:
    """A fine-tune has other weights of the same shapes, often neither checker nor processor, and its own scheduler."""
    plain = draw(model)
    own = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {key: value + 0.02 * torch.randn(value.shape) for key, value in safetensors.torch.load_file(own).items()}
    safetensors.torch.save_file(tensors, own, {"format": "pt"})
    index = json.loads((model / "model_index.json").read_text())
    for part in ("safety_checker", "feature_extractor"):
        shutil.rmtree(model / part)
        index[part] = [None, None]
    index |= {
        "requires_safety_checker": False,
        "_diffusers_version": "0.6.0",
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (model / "model_index.json").write_text(json.dumps(index))
    schedule = {**sd_layouts.SCHEDULE, "_class_name": "DDIMScheduler", "clip_sample": False}
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    assert resolution.resolve(str(model)).identity != resolution.resolve(str(sd15)).identity
    assert not torch.allclose(draw(model), plain)


def test_prediction_is_the_checkpoint_s_own(model: Path) -> None:
    """Epsilon for 1.5, v-prediction for 2.1 and where the scheduler of a fine-tune of 1.5 says so."""
    sd21 = load(sd_layouts.save_sd21(model.parent / "sd21"))
    assert sd21.scheduler.config.prediction_type == "v_prediction"
    assert draw(model.parent / "sd21").isfinite().all()
    epsilon = draw(model)
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "v_prediction"}))
    assert not torch.allclose(draw(model), epsilon)


@pytest.mark.parametrize("emptied", [False, True], ids=["missing", "empty"])
def test_a_model_without_words_is_refused(model: Path, emptied: bool) -> None:
    """transformers makes a tokenizer of two tokens of it, to which all prompts are equal."""
    judge, manifest = sd_layouts.save_clip(model.parent / "judge"), runs.write_manifest(model.parent / "in", 1)
    shutil.rmtree(model / "tokenizer")
    if emptied:
        (model / "tokenizer").mkdir()
    remedy = r"its folder tokenizer is missing, empty or cut short; copy it, with vocab\.json and merges\.txt"
    message = f"tokenizer knows 2 tokens and no word, as {remedy}"
    with pytest.raises(ModelError, match=message):
        load(model)
    with pytest.raises(ModelError, match=message):
        read_tokenizers(resolution.resolve(str(model)))
    with pytest.raises(ModelError, match=f"has no vocabulary: {remedy}"):
        runs.settled(manifest, model.parent / "out", model, judge=str(judge))
    assert not (model.parent / "out").exists()


def test_encoders_load_from_a_variant_alone(sd15: Path, tmp_path: Path) -> None:
    """The CLIP that scores, and the image encoder of an IP-Adapter."""
    sd_layouts.save_clip(tmp_path / "judge")
    for file in sorted((tmp_path / "judge").glob("model*")):
        old, new = file.name, file.name.replace("model-", "model.fp16-").replace("index.json", "index.fp16.json")
        file.rename(file.with_name(new))
        for index in (tmp_path / "judge").glob("*.index*.json"):
            index.write_text(index.read_text().replace(old, new))
    assert ClipJudge.from_pretrained(str(tmp_path / "judge"), device="cpu").model.dtype == torch.float32

    unet = UNet2DConditionModel.from_pretrained(sd15 / "unet")
    weights = ip_adapters.save_adapter(tmp_path / "adapter" / "x.safetensors", unet)
    encoder = ip_adapters.save_encoder(tmp_path / "adapter" / "image_encoder")
    (encoder / "model.safetensors").rename(encoder / "model.fp16.safetensors")
    pipeline = load(sd15)
    pipeline.use_ip_adapter(str(weights), str(encoder))
    assert isinstance(pipeline.adapter.encoder, CLIPVisionModelWithProjection)
