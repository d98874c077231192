"""The stages that train the tiny family: each learns, resumes, and what they make is a pipeline."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from vcf_batch.images import from_unit
from vcf_batch.metrics.clip_score import ClipJudge
from vcf_batch.models.resolution import tiny_folder
from vcf_batch.tiny import networks, train, workshop, world
from vcf_batch.tiny.fitting import Recipe, batch_indices, fit, speed_up_cpu_autocast
from vcf_batch.tiny.probe import HEADS, Probe, background_target, correct
from vcf_batch.vcf.aligner import ImageAligner
from vcf_batch.vcf.pipeline import VCFPipeline

RECIPE = Recipe(steps=12, batch=4, lr=1e-2, warmup=2, ema=0.9)


def _problem() -> tuple[nn.Module, "list[int]"]:
    torch.manual_seed(0)
    return nn.Linear(3, 1), []


def _fit(folder: Path, recipe: Recipe, stop_after: int | None = None) -> tuple[dict[str, Tensor], list[int], bool]:
    model, seen = _problem()

    def loss(step: int) -> Tensor:
        seen.append(step)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return functional.mse_loss(model(x), x.sum(1, keepdim=True))

    done = fit(model, loss, recipe, folder / "stage.pt", 0.0 if stop_after == 0 else 60.0, autocast=False)
    return {name: value.clone() for name, value in model.state_dict().items()}, seen, done


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    weights, seen, done = _fit(tmp_path, RECIPE)
    again, more, still_done = _fit(tmp_path, RECIPE)
    assert seen == list(range(RECIPE.steps))
    assert (done, still_done, more) == (True, True, [])
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_resumed_stage_ends_where_an_uninterrupted_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted stage goes on from its checkpoint and ends with the same weights."""
    (tmp_path / "whole").mkdir()
    whole, _, _ = _fit(tmp_path / "whole", RECIPE)

    model, _ = _problem()
    interrupted = iter(range(5))

    def loss(step: int) -> Tensor:
        if next(interrupted, None) is None:
            raise KeyboardInterrupt
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return functional.mse_loss(model(x), x.sum(1, keepdim=True))

    monkeypatch.setattr("vcf_batch.tiny.fitting.CHECKPOINT_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        fit(model, loss, RECIPE, tmp_path / "stage.pt", 60.0, autocast=False)
    resumed, seen, done = _fit(tmp_path, RECIPE)
    assert seen == list(range(5, RECIPE.steps))
    assert done
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value)


def test_a_stage_says_when_its_time_ran_out(tmp_path: Path) -> None:
    _, seen, done = _fit(tmp_path, RECIPE, stop_after=0)
    assert (seen, done) == ([], False)


def test_every_epoch_sees_every_item_once() -> None:
    indices = batch_indices(size=20, batch=5, seed=1)
    first, second = (torch.cat([indices(step) for step in steps]) for steps in (range(4), range(4, 8)))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(20))
    assert first.tolist() != second.tolist()


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    recipe = Recipe(steps=100, batch=1, lr=1.0, warmup=10)
    rates = [recipe.lr_at(step) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0)


def test_the_stages_make_a_pipeline_with_judge_and_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of every stage, in order, then the directory that ``--model`` takes."""
    monkeypatch.setattr(train, "RECIPES", {stage: Recipe(steps=1, batch=4, lr=1e-3) for stage in train.RECIPES})
    shop = workshop.Workshop(tmp_path, torch.device("cpu"), seconds=60.0, autocast=False, count=64)
    for stage in train.STAGES.values():
        stage(shop)

    aligners = [ImageAligner.from_pretrained(tmp_path / name).proj[1].weight for name in train.ALIGNERS]
    assert len({weight.detach().numpy().tobytes() for weight in aligners}) == len(train.ALIGNERS) == 4
    weights = tmp_path / "weights"
    assert "_name_or_path" not in "".join(file.read_text() for file in weights.glob("*/config.json"))
    pipeline = VCFPipeline.from_pretrained(weights, dtype=torch.float32)
    scenes, _ = shop.scenes()
    reference = Image.fromarray(from_unit(world.render(scenes.part(slice(0, 1)))[0].permute(1, 2, 0).numpy()))
    assert pipeline.generate(["a red star"], [reference], seeds=[0], steps=2).shape == (1, 3, world.SIZE, world.SIZE)
    judge = ClipJudge.from_pretrained(str(weights / "judge"))
    assert judge.embed_texts(["a red star"]).shape == judge.embed_images([reference]).shape
    assert len(Probe.from_pretrained(weights / "probe").features(torch.zeros(1, 3, 64, 64))) == 4


def test_steps_that_are_prepared_ahead_are_those_asked_for() -> None:
    """By any number of processes, and from the step on at which a stage resumes."""
    for workers in (0, 2):
        prepared = workshop.ahead(lambda step: (step, torch.tensor([step])), workers)
        assert [prepared(step)[0] for step in range(3, 9)] == list(range(3, 9))


def test_a_stage_begins_from_the_weights_of_an_earlier_family(tmp_path: Path) -> None:
    """Each word that both tokenizers know keeps its embedding, whatever its number."""
    older = Path(tiny_folder())
    shop = workshop.Workshop(tmp_path, torch.device("cpu"), 60.0, autocast=False, start=older, count=64)
    clip, unet = networks.clip(shop.tokenizer()), networks.unet()
    shop.begin(clip.text_model, "text_encoder")
    shop.begin_words(clip)
    shop.begin(unet, "unet")
    theirs = VCFPipeline.from_pretrained(older, dtype=torch.float32)
    for name, value in theirs.unet.state_dict().items():
        torch.testing.assert_close(unet.state_dict()[name], value)
    numbers = (tokenizer.get_vocab()["circle</w>"] for tokenizer in (shop.tokenizer(), theirs.tokenizer))
    towers = (clip.text_model, theirs.text_encoder)
    ours, known = (tower.get_input_embeddings().weight[number] for tower, number in zip(towers, numbers, strict=True))
    torch.testing.assert_close(ours, known)


def test_the_shortcuts_of_bfloat16_keep_the_result() -> None:
    torch.manual_seed(0)
    model = networks.unet().eval()
    inputs = (
        torch.randn(2, 4, 16, 16),
        torch.tensor([10, 900]),
        torch.randn(2, networks.TEXT_TOKENS, networks.TEXT_WIDTH),
    )
    with torch.no_grad():
        before = model(*inputs).sample
        speed_up_cpu_autocast(model)
        torch.testing.assert_close(model(*inputs).sample, before, atol=1e-4, rtol=1e-4)


def test_the_tokenizer_splits_any_text_and_pads_to_its_length(tmp_path: Path) -> None:
    tokenizer = networks.train_tokenizer(tmp_path, world.sample_scenes(4000, seed=0))
    out = tokenizer(
        ["a red star", "Grüße, 世界"], padding="max_length", max_length=networks.TEXT_TOKENS, truncation=True
    )
    assert all(len(ids) == networks.TEXT_TOKENS for ids in out.input_ids)
    words = tokenizer.convert_ids_to_tokens(out.input_ids[0][:4])
    assert words == ["<|startoftext|>", "a</w>", "red</w>", "star</w>"]
    assert out.input_ids[1].count(tokenizer.eos_token_id) < networks.TEXT_TOKENS - 5


def test_guide_and_judge_are_different_networks(tmp_path: Path) -> None:
    """The CLIP that scores is another one than the CLIP that conditions."""
    tokenizer = networks.train_tokenizer(tmp_path, world.sample_scenes(4000, seed=0))
    towers = networks.clip(tokenizer), networks.judge(tokenizer)
    shapes = [[tuple(p.shape) for p in clip.parameters()] for clip in towers]
    assert shapes[0] != shapes[1]
    assert towers[0].config.vision_config.hidden_size != towers[0].config.text_config.hidden_size


def test_the_probe_counts_background_colours_in_either_order() -> None:
    scenes = world.sample_scenes(40, seed=2)
    target = background_target(scenes.attributes)
    plain = scenes.attributes["pattern"] == world.PATTERNS.index("plain")
    assert torch.equal(target.sum(1), torch.where(plain, 1.0, 2.0))

    logits = {
        name: functional.one_hot(scenes.attributes[name], size).float()
        for name, size in HEADS.items()
        if name != "background"
    }
    noise = torch.rand(target.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    assert all(values.all() for values in correct({**logits, "background": target + noise}, scenes.attributes).values())
    assert not correct({**logits, "background": 1 - target}, scenes.attributes)["background"].any()


def test_the_probe_has_feature_maps_of_falling_size() -> None:
    maps = Probe(width=8).features(torch.zeros(2, 3, 64, 64))
    assert [tuple(m.shape[2:]) for m in maps] == [(32, 32), (16, 16), (8, 8), (4, 4)]
