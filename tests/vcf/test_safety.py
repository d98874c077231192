"""The safety checker: what it flags is rejected, and told."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPConfig

from support import runs
from support.runs import commit
from vcf_batch.errors import ModelError
from vcf_batch.vcf.safety import SafetyChecker

pytestmark = pytest.mark.usefixtures("restored_torch")

ROWS = 5


def save_checker(folder: Path, threshold: float) -> Path:
    """A random checker of 16x16 images that flags what is closer to a concept than ``threshold``."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**shape, "image_size": 16, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8))
        checker.concept_embeds.data = torch.randn(17, 8)
    checker.concept_embeds_weights.data.fill_(threshold)
    checker.special_care_embeds_weights.data.fill_(1.0)
    checker.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a checker of its own that flags everything."""
    folder = runs.save_model(tmp_path_factory.mktemp("model"))
    save_checker(folder / "safety_checker", -1.0)
    return folder


@pytest.mark.parametrize(("checker", "flagged"), [("own", True), ("another", False)])
def test_what_the_checker_flags_is_rejected(model: Path, tmp_path: Path, checker: str, flagged: bool) -> None:
    """The model's own checker, or the one that is named; each attempt has its verdict."""
    if checker == "another":
        checker = str(save_checker(tmp_path / "checker", 1.0))
    manifest = runs.write_manifest(tmp_path / "in", ROWS)
    options: dict[str, Any] = {"safety_checker": checker, "attempts": 2, "shard_size": ROWS}
    commit(runs.load(manifest, tmp_path / "out", model, **options))
    for row in runs.rows_of(tmp_path / "out"):
        assert row["status"] == ("rejected" if flagged else "success")
        assert row["nsfw"] is flagged
        assert [attempt["nsfw"] for attempt in row["attempts"]] == [flagged] * (2 if flagged else 1)
        reason = "flagged by the safety checker in the best of 2 attempts"
        assert row["error_message"] == (reason if flagged else None)


def test_a_checker_tells_images_apart(tmp_path: Path) -> None:
    """And leaves those that it is given as they are."""
    pictures = [np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8) for seed in range(12)]
    before = [picture.copy() for picture in pictures]
    shares = []
    for threshold in (-0.9, 0.3, 0.95):
        shares.append(sum(SafetyChecker.from_pretrained(str(save_checker(tmp_path, threshold)))(pictures)))
    assert shares[0] == 12
    assert shares[2] == 0
    assert all(map(np.array_equal, pictures, before))


def test_a_checker_that_is_none_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lacks .* weights, among them concept_embeds; name a complete one"):
        SafetyChecker.from_pretrained(str(model / "judge"))
    manifest = runs.write_manifest(tmp_path / "in", 1)
    plain = runs.save_model(tmp_path / "plain")
    with pytest.raises(ModelError, match="has no safety checker of its own: name one with --safety-checker"):
        runs.settled(manifest, tmp_path / "out", plain, safety_checker="own")
