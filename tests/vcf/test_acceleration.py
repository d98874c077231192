"""Compiled networks draw what the others draw."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from support import loras, runs
from support.tiny_models import build_pipeline
from vcf_batch import images
from vcf_batch.config.limits import MAX_PIXELS
from vcf_batch.config.sampling import Sampling
from vcf_batch.vcf import acceleration
from vcf_batch.vcf.fusion import Fusion, condition
from vcf_batch.vcf.pipeline import VCFPipeline


@pytest.mark.slow
def test_a_compiled_run_draws_what_the_other_one_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within rounding; what was compiled is in the node's cache. Rows with other LoRAs compile nothing anew, and rows
    without any have the same bits before and after them."""
    monkeypatch.setenv("VCF_BATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    model = runs.save_model(tmp_path / "model")
    names = [*loras.names_of(tmp_path / "in", VCFPipeline.from_pretrained(str(model)), 2, loras.EVERYTHING)]
    values = [value for value in ("", *names, "") for _ in range(2)]  # a shard and a batch each
    columns: dict[str, list[Any]] = {
        "lora": values,
        "prompt": ["a red disc"] * 8,
        "seed": [1, 2] * 4,
        "reference": ["reference0.png"] * 8,
    }
    manifest = runs.write_manifest(tmp_path / "in", 8, columns)
    drawn = []
    for compiled in (False, True):
        torch._dynamo.utils.counters.clear()
        output = tmp_path / f"{compiled}"
        runs.generate(manifest, output, model, compile=compiled, batch_size=2, shard_size=2, mark=False)
        files = [data for shard in range(4) for name, data in runs.Files(output, f"{shard:05d}").members]
        pictures = [data for data in files if data.startswith(b"\x89PNG")]
        assert len({*pictures}) == 6 and pictures[:2] == pictures[6:]
        drawn.append([images.to_unit(images.decode(data, MAX_PIXELS)) for data in pictures])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "the UNet and the VAE's decoder, once each"
    for eager, compiled in zip(*drawn, strict=True):
        assert np.abs(eager - compiled).max() <= 1 / 255
    assert any((tmp_path / "cache" / "compiled").iterdir())


def test_gradients_are_those_of_networks_that_are_not_compiled() -> None:
    """To noise and tokens, with a bias on the way and the activations of a step computed again."""

    def gradients(pipeline: VCFPipeline) -> list[torch.Tensor]:
        text = pipeline.encode_prompts(["a red cat"])
        tokens = torch.ones(3, text.shape[-1], requires_grad=True)
        sample, noise, _ = pipeline.prepare(text, text, [Fusion()], seeds=[3], sampling=Sampling(steps=2))
        noise.requires_grad_()
        sample(noise, condition(text, text, [Fusion([tokens], strength=0.5)])).square().sum().backward()
        return [leaf.grad for leaf in (tokens, noise) if leaf.grad is not None]

    eager, compiled = (gradients(build_pipeline().set_up("cpu", compiled)) for compiled in (False, True))
    assert all(gradient.any() for gradient in eager)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


def test_small_batches_are_recorded_once_a_kind_and_replayed_with_their_own_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With another bias, noise, step and text; larger batches and gradients are left alone. (A CUDA graph needs a GPU:
    here the recording is the work itself.)"""
    recordings = []

    def record(work: acceleration.Computation) -> tuple[Callable[[], None], tuple[torch.Tensor, ...]]:
        recordings.append(work)
        outputs = work()

        def replay() -> None:
            for output, made in zip(outputs, work(), strict=True):
                output.copy_(made)

        return replay, outputs

    monkeypatch.setattr(acceleration, "record", record)
    plain, replayed = build_pipeline(), build_pipeline()
    acceleration.replay_small_batches(replayed.unet)
    picture = Image.new("RGB", (8, 8), "red")
    for number, strength in enumerate((1.0, 0.5, 1.0)):
        drawn = [each.generate(["a cat"], [picture], strength=strength, seeds=[number]) for each in (plain, replayed)]
        assert torch.equal(*drawn)
    assert len(recordings) == 2  # with and without a bias
    texts = ["a cat", "a dog", "a red cat"]
    assert torch.equal(*(each.generate(texts, seeds=[1, 2, 3]) for each in (plain, replayed)))
    assert len(recordings) == 2
