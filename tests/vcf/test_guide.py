"""The PNO guide: its preprocessing against Pillow's, its gradients, and that it is never the judge."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from transformers import CLIPModel

from support import runs
from support.tiny_models import build_pipeline
from vcf_batch.errors import ModelError
from vcf_batch.vcf.guide import Guide, bicubic


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def guide(model: Path) -> Guide:
    pipeline = build_pipeline()
    return Guide(pipeline.image_encoder, pipeline.feature_extractor.image_mean, pipeline.feature_extractor.image_std)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]


@pytest.mark.parametrize("size", [(64, 48), (16, 16), (9, 30)])
def test_resizing_equals_pillow(size: tuple[int, int]) -> None:
    """References go through Pillow, outputs through matrix products. Pillow rounds and clips between its two passes."""
    image = picture(*size)
    expected = as_tensor(image.resize((16, 16), Image.Resampling.BICUBIC))
    difference = (bicubic(as_tensor(image), 16).clamp(0, 1) - expected).abs() * 255
    assert difference.mean() < 0.5 and difference.max() < 4


def test_an_output_and_the_same_reference_embed_alike(guide: Guide) -> None:
    image = picture(40, 24)
    embedded = guide.embed(as_tensor(image))
    torch.testing.assert_close(embedded, guide.targets([[image]], [None]), atol=5e-3, rtol=0)
    assert embedded.norm(dim=1).item() == pytest.approx(1)


def test_gradients_reach_every_pixel_and_no_weight(guide: Guide) -> None:
    images = torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    guide.embed(images)[:, 0].sum().backward()
    assert images.grad is not None and (images.grad != 0).all()
    assert not any(weight.requires_grad for weight in guide.tower.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_judge_may_not_guide(model: Path, dtype: torch.dtype) -> None:
    """What the weights are decides, in whatever precision they are."""
    judge = CLIPModel.from_pretrained(model / "judge")
    same = Guide(CLIPModel.from_pretrained(model / "judge", dtype=dtype), [0.5] * 3, [0.5] * 3)
    with pytest.raises(ModelError, match=r"same CLIP.*--pno-guide"):
        same.refuse_judge(judge)


def test_another_clip_may_judge(guide: Guide, model: Path) -> None:
    judge = CLIPModel.from_pretrained(model / "judge")
    guide.refuse_judge(judge)
    alike = Guide.from_pretrained(str(model / "judge"))
    alike.tower.post_layernorm.weight += 0.1
    alike.refuse_judge(judge)


def test_loading_tells_what_is_missing(model: Path, tmp_path: Path) -> None:
    assert Guide.from_pretrained(str(model / "judge")).image_size == 16
    with pytest.raises(ModelError, match=r"cannot load the PNO guide .*--pno-guide"):
        Guide.from_pretrained(str(model / "unet"))
    shutil.copytree(model / "judge", tmp_path, dirs_exist_ok=True)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, among them visual_projection\.weight"):
        Guide.from_pretrained(str(tmp_path))
