"""The training loss over workers, the step, and retrieval."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vcf_batch.training.alignment import MIN_TEMPERATURE, Alignment, Diverged, Trainer, level, recall, summed
from vcf_batch.training.training_config import TrainingConfig
from vcf_batch.vcf.aligner import ImageAligner, alignment_loss, info_nce_loss, reconstruction_loss

PAIRS, VISION, TEXT = 8, 12, 6


def recipe(**changes: Any) -> TrainingConfig:
    return TrainingConfig(model="tiny", data="d", out="o", batch_size=PAIRS, learning_rate=1e-2, **changes)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Vision tokens ``[8, 5, 12]`` and text tokens ``[8, 7, 6]`` that have something to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    vision = torch.randn(PAIRS, 5, VISION, generator=generator)
    return vision, vision[:, :1, :TEXT] + torch.randn(PAIRS, 7, TEXT, generator=generator) / 4


def build(config: TrainingConfig) -> Alignment:
    torch.manual_seed(0)
    return Alignment(ImageAligner(VISION, TEXT), config)


def train(config: TrainingConfig, steps: int) -> tuple[Trainer, list[float]]:
    alignment = build(config)
    trainer = Trainer(alignment, alignment, config, steps)
    return trainer, [trainer.step(*batch()).total.item() for _ in range(steps)]


def test_the_loss_is_the_paper_s() -> None:
    """Without a tether, which is no part of the paper, and which counts by its weight."""
    config = recipe(info_nce_weight=0.3, temperature=0.1, tether=0.0)
    alignment, (vision, text) = build(config), batch()
    losses = alignment(vision, text)
    expected = alignment_loss(alignment.aligner(vision), text, 0.3, 0.1)
    torch.testing.assert_close(losses.total, expected)
    torch.testing.assert_close(losses.total, 0.3 * losses.info_nce + losses.reconstruction)
    tethered = build(config.replace(tether=2.0))(vision, text)
    torch.testing.assert_close(tethered.total, expected + 2 * tethered.tether)
    torch.testing.assert_close(tethered.tether, reconstruction_loss(text, alignment.aligner(vision)))


def test_the_tether_holds_every_token_close_to_the_text() -> None:
    """With it, the worst image token is nearer to its nearest text token than after a training by the paper's loss."""
    farthest = []
    for weight in (0.0, 1.0):
        trainer, _ = train(recipe(tether=weight), 100)
        vision, text = batch()
        distances = torch.cdist(trainer.alignment.align(vision), text).amin(dim=2)
        farthest.append(distances.amax().item())
    assert farthest[1] < 0.8 * farthest[0]


def test_the_parts_of_two_text_encoders_count_alike_whatever_their_scale() -> None:
    """The losses are those of parts of one scale, but for one factor; one encoder's tokens are compared as they are."""
    vision, text = batch()
    alignment = build(recipe(tether=0.0))
    image = alignment.align(vision)
    factors = torch.tensor([1.0, 1.0, 30.0, 30.0, 30.0, 30.0])
    found = []
    for scale in (torch.ones(TEXT), factors):
        parts = (text * scale).split([2, 4], dim=-1)
        alignment.scale = level([part.norm(dim=-1).mean().item() for part in parts], [2, 4])
        found.append([alignment.compared(tokens * scale) for tokens in (image, text)])
    ratio = found[1][1] / found[0][1]
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
    torch.testing.assert_close(found[1][0], found[0][0] * ratio.mean())
    torch.testing.assert_close(info_nce_loss(*found[1]), info_nce_loss(*found[0]))
    mean = [tokens.norm(dim=-1).mean() for tokens in (found[1][1], text * factors)]
    assert mean[0].item() == pytest.approx(mean[1].item(), rel=0.1)
    assert level([3.0], [TEXT]) is None


def distributed(rank: int, folder: Path) -> None:
    """One of two workers: writes the gradients of its half of a batch, and what the validation over both finds."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    config = recipe(learn_temperature=True)
    alignment, part = build(config), slice(rank * PAIRS // 2, (rank + 1) * PAIRS // 2)
    trainer = Trainer(alignment, DistributedDataParallel(alignment), config, 10)
    vision, text = (tokens[part] for tokens in batch())
    trainer.parallel(vision, text).total.backward()
    found = {name: parameter.grad for name, parameter in alignment.named_parameters()}
    # The second worker has no validation pairs at all.
    found["metrics"] = torch.tensor(list(trainer.validate([batch()] if rank == 0 else []).values()))
    found["sum"] = torch.tensor(summed([1.0, float(rank)], torch.device("cpu")))
    torch.save(found, folder / f"{rank}.pt")
    os._exit(0)  # without taking gloo's threads down, which now and then is a deadlock


def test_two_workers_have_the_gradient_of_one_large_batch(tmp_path: Path) -> None:
    """Every pair is compared with those of all workers, and the gradient is that of the whole batch on one."""
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import pathlib, test_alignment as t; t.distributed({rank}, pathlib.Path({str(tmp_path)!r}))",
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        )
        for rank in range(2)
    ]
    assert [worker.wait(600) for worker in workers] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    config = recipe(learn_temperature=True)
    alignment = build(config)
    alignment(*batch()).total.backward()
    for name, parameter in alignment.named_parameters():
        torch.testing.assert_close(first[name], parameter.grad, atol=1e-6, rtol=1e-5)
        assert torch.equal(first[name], second[name])
    alone = Trainer(alignment, alignment, config, 10).validate([batch()])
    torch.testing.assert_close(first["metrics"], torch.tensor(list(alone.values())))
    assert first["sum"].tolist() == [2.0, 1.0]


def test_training_lowers_the_loss_and_finds_captions() -> None:
    config = recipe()
    before = Trainer(build(config), build(config), config, 60).validate([batch()])
    trainer, losses = train(config, 60)
    after = trainer.validate([batch()])
    assert losses[-1] < 0.7 * losses[0]
    assert after["validation_loss"] < before["validation_loss"]
    assert after["recall_at_1"] > before["recall_at_1"]
    assert after["validation_pairs"] == PAIRS


def test_the_learning_rate_falls_to_zero_along_a_cosine() -> None:
    config = recipe()
    alignment = build(config)
    trainer, rates = Trainer(alignment, alignment, config, 10), []
    for _ in range(10):
        rates.append(trainer.schedule.get_last_lr()[0])
        trainer.step(*batch())
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[5]) == pytest.approx((1e-2, 0.5e-2))
    assert trainer.schedule.get_last_lr()[0] == pytest.approx(0)
    assert trainer.steps_done == 10


def test_the_temperature_is_learned_only_where_it_shall_be() -> None:
    fixed, _ = train(recipe(), 5)
    learned, _ = train(recipe(learn_temperature=True), 5)
    assert fixed.alignment.temperature.item() == pytest.approx(0.07)
    assert learned.alignment.temperature.item() != pytest.approx(0.07, abs=1e-4)
    assert build(recipe(temperature=0.001, learn_temperature=True)).temperature.item() == pytest.approx(MIN_TEMPERATURE)


def test_state_goes_on_where_it_was() -> None:
    """A trainer that takes over another's state takes the same steps as the other."""
    config = recipe(learn_temperature=True)
    alignment, whole = build(config), train(config, 10)[1]
    first = Trainer(alignment, alignment, config, 10)
    losses = [first.step(*batch()).total.item() for _ in range(4)]
    fresh = Alignment(ImageAligner(VISION, TEXT), config)
    second = Trainer(fresh, fresh, config, 10)
    second.load_state_dict(first.state_dict())
    assert second.steps_done == 4
    losses += [second.step(*batch()).total.item() for _ in range(6)]
    assert losses == pytest.approx(whole, rel=1e-5)


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    trainer, _ = train(recipe(), 1)
    vision, text = batch()
    with pytest.raises(Diverged, match="the loss is nan in step 2"):
        trainer.step(vision * float("nan"), text)


def test_a_gradient_that_is_not_finite_leaves_the_weights_as_they_were() -> None:
    """The loss may be finite where its gradient is not: the step is not taken."""
    trainer, _ = train(recipe(), 1)
    before = [weight.clone() for weight in trainer.alignment.parameters()]
    next(iter(trainer.alignment.aligner.parameters())).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(Diverged, match=r"the norm of the gradient is (nan|inf) in step 2"):
        trainer.step(*batch())
    assert all(map(torch.equal, trainer.alignment.parameters(), before))


def test_what_is_not_finite_is_named() -> None:
    trainer, _ = train(recipe(), 1)
    assert trainer.not_finite({"step": 1, "validation_loss": 0.5, "loss": None}) == ""
    assert trainer.not_finite({"validation_loss": float("nan")}) == "validation_loss is nan"
    weight = next(iter(trainer.alignment.aligner.parameters()))
    weight.data.view(-1)[0] = float("inf")
    assert "weights aligner." in trainer.not_finite({"step": 1})


def test_a_diverged_aligner_recalls_nothing() -> None:
    """NaN is no similarity: 100 % of the captions were found with it once."""
    image, text = torch.full((4, 4), float("nan")), torch.eye(4)
    assert (recall(image, text, 1), recall(text, image, 1)) == (0, 0)


def test_mixed_precision_leaves_the_losses_in_float32() -> None:
    torch.manual_seed(0)
    mixed = Alignment(ImageAligner(VISION, TEXT), recipe(), torch.bfloat16)
    losses = mixed(*batch())
    assert losses.total.dtype == torch.float32 and mixed.aligner.dtype == torch.float32
    exact = build(recipe())(*batch())
    assert 0 < abs(losses.total.item() - exact.total.item()) < 0.05


def test_recall_counts_the_own_caption_among_the_most_alike() -> None:
    image, text = torch.eye(4), torch.eye(4)
    assert recall(image, text, 1) == 1
    moved = text.roll(1, dims=0) + text / 2  # the own caption comes second
    assert (recall(image, moved, 1), recall(image, moved, 2)) == (0, 1)
    assert recall(image, torch.ones(4, 4), 1) == 1, "the same caption everywhere is nobody's fault"
