"""What the aligner is trained on is what the pipeline computes, and what the cache gives back."""

import hashlib
import random
from pathlib import Path

import pytest
import torch

from support import runs
from support.tiny_models import IMAGE_TOKENS, TEXT_TOKENS, TEXT_WIDTH, VISION_WIDTH, build_pipeline
from vcf_batch.errors import RowError
from vcf_batch.images import decode
from vcf_batch.training.features import Towers
from vcf_batch.training.tar_samples import CaptionedImage
from vcf_batch.vcf.aligner import ImageAligner
from vcf_batch.vcf.pipeline import VCFPipeline

PAIRS = [CaptionedImage(str(number), runs.png(number), (f"caption {number}", "another")) for number in range(3)]
RNG = random.Random(0)


@pytest.fixture
def pipeline() -> VCFPipeline:
    return build_pipeline()


def towers(pipeline: VCFPipeline, cache: Path | None = None) -> Towers:
    return Towers(pipeline, str(cache) if cache else None, "image-tower", "text-tower")


def test_tokens_are_those_of_the_pipeline(pipeline: VCFPipeline) -> None:
    """Training sees what generating does: the same preprocessing, the same tower, the same text conditioning."""
    examples = [towers(pipeline).draw_example(pair, RNG) for pair in PAIRS]
    vision, text = towers(pipeline).encode(examples)
    assert vision.shape == (3, IMAGE_TOKENS, VISION_WIDTH) and text.shape == (3, TEXT_TOKENS, TEXT_WIDTH)
    assert not vision.requires_grad and not text.requires_grad
    pictures = [decode(pair.image, 10**6) for pair in PAIRS]
    torch.testing.assert_close(pipeline.aligner(vision), pipeline.encode_references(pictures))
    torch.testing.assert_close(text, pipeline.encode_prompts([example.caption for example in examples]))


@pytest.mark.parametrize(("tokens", "count"), [("all", 5), ("patches", 4), ("cls", 1)])
def test_the_aligner_s_tokens_are_chosen_after_the_cache(tokens: str, count: int, tmp_path: Path) -> None:
    pipeline = build_pipeline()
    pipeline.register_modules(aligner=ImageAligner(VISION_WIDTH, TEXT_WIDTH, tokens=tokens))
    for _ in range(2):
        part = towers(pipeline, tmp_path)
        assert part.encode([part.draw_example(PAIRS[0], RNG)])[0].shape[1] == count
    assert len(list(tmp_path.glob("image-tower/*/*"))) == 1


def test_one_caption_is_drawn(pipeline: VCFPipeline) -> None:
    drawn = {towers(pipeline).draw_example(PAIRS[0], random.Random(seed)).caption for seed in range(20)}
    assert drawn == {"caption 0", "another"}


def test_the_cache_gives_back_what_was_computed(
    pipeline: VCFPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run with the same towers computes nothing, whatever the pairs are called; a damaged file is absent."""
    part = towers(pipeline, tmp_path)
    first = part.encode([part.draw_example(pair, random.Random(0)) for pair in PAIRS])

    def fail(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("the tower was asked")

    monkeypatch.setattr(pipeline, "vision_tokens", fail)
    monkeypatch.setattr(type(pipeline.family), "encode", fail)
    renamed = [CaptionedImage("other", pair.image, pair.captions) for pair in PAIRS]
    again = part.encode([part.draw_example(pair, random.Random(0)) for pair in renamed])
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))

    monkeypatch.undo()
    name = hashlib.sha256(PAIRS[1].image).hexdigest()
    path = tmp_path / "image-tower" / name[:2] / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    mended = part.encode([part.draw_example(pair, random.Random(0)) for pair in PAIRS])
    torch.testing.assert_close(mended[0], first[0])


def test_other_towers_have_another_cache(pipeline: VCFPipeline, tmp_path: Path) -> None:
    part = towers(pipeline, tmp_path)
    part.encode([part.draw_example(PAIRS[0], RNG)])
    other = Towers(pipeline, str(tmp_path), "other-image-tower", "other-text-tower")
    example = other.draw_example(PAIRS[0], RNG)
    assert example.image_tokens is None and example.text_tokens is None


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (CaptionedImage("x", b"", ("a",)), "the image file is empty"),
        (CaptionedImage("x", runs.png(0)[:60], ("a",)), "damaged or truncated PNG"),
        (CaptionedImage("x", b"<html>", ("a",)), "a web page"),
        (CaptionedImage("x", runs.png(0), ()), "there is no caption"),
    ],
)
def test_a_broken_pair_says_why(pair: CaptionedImage, reason: str, pipeline: VCFPipeline) -> None:
    with pytest.raises(RowError, match=reason):
        towers(pipeline).draw_example(pair, RNG)
