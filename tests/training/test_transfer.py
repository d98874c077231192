"""What a validation's pictures keep of the prompt and take from the reference: measured, logged, and decided by."""

import contextlib
import csv
import io
import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from support import runs
from support.captioned import write_tar
from support.tiny_models import build_pipeline
from vcf_batch.config.strengths import EVALUATED_STRENGTHS
from vcf_batch.errors import UsageError
from vcf_batch.metrics.clip_score import ClipJudge
from vcf_batch.training import transfer as measuring
from vcf_batch.training.fit import Place, fit
from vcf_batch.training.training_config import AS_BEFORE, TrainingConfig
from vcf_batch.training.training_job import ALIGNER, TrainingJob, best_of, read_log
from vcf_batch.training.transfer import Measured, Transfer, TransferPair
from vcf_batch.vcf.aligner import ImageAligner
from vcf_batch.vcf.pipeline import VCFPipeline

COUNT = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    members: dict[str, bytes | str] = {}
    for number in range(24):
        members[f"{number:03d}.png"] = runs.png(number) if number != 20 else b"broken"
        members[f"{number:03d}.txt"] = " ".join("abcdefghijkl"[number * step % 12] for step in (1, 5, 7))
    return write_tar(tmp_path_factory.mktemp("data") / "0.tar", members).parent


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "TRANSFER_STEPS", 2)


def build(model: Path, pipeline: VCFPipeline | None = None) -> Transfer:
    pairs = [
        TransferPair(prompt, Image.open(io.BytesIO(runs.png(number))).convert("RGB"), number)
        for number, prompt in enumerate(runs.PROMPTS[:COUNT])
    ]
    return Transfer(pipeline or build_pipeline(), ClipJudge.from_pretrained(str(model / "judge")), pairs)


def test_the_pictures_are_those_of_the_pipeline(model: Path) -> None:
    """Noting the attention changes no picture, and leaves the UNet as it was."""
    pipeline = build_pipeline()
    transfer = build(model, pipeline)
    before = pipeline.unet.attn_processors
    (found,), sheet = transfer.measure([0.5])
    assert pipeline.unet.attn_processors == before
    expected = pipeline.generate(
        list(runs.PROMPTS[:COUNT]), [pair.reference for pair in transfer.pairs], seeds=[0, 1, 2], strength=0.5, steps=2
    )
    made = transfer._generate(0.5)
    for picture, pixels in zip(made.shown, expected, strict=True):
        shown = torch.tensor(list(picture.get_flattened_data()), dtype=torch.float32) / 255
        torch.testing.assert_close(shown, pixels.permute(1, 2, 0).reshape(-1, 3), atol=1 / 255, rtol=0)
    assert found.strength == 0.5 and sheet.width > 3 * 128 and sheet.height > COUNT * 128


def test_the_attention_to_image_tokens_is_told_by_layer(model: Path) -> None:
    """One share a cross-attention layer, between none and all of it, more with more strength; none at strength 0."""
    transfer = build(model)
    found, _ = transfer.measure([0.0, 0.1, 1.0, 100.0])
    layers = [name for name in transfer.pipeline.unet.attn_processors if ".attn2." in name]
    assert [len(each.attention) for each in found] == [len(layers)] * 4
    assert set(found[0].attention.values()) == {0.0}
    for layer in found[0].attention:
        shares = [each.attention[layer] for each in found]
        assert all(low < high < 1 for low, high in itertools.pairwise(shares)), layer


def test_without_strength_the_prompt_is_kept_and_no_reference_is_followed(model: Path) -> None:
    """Text only is the measure: the whole prompt, nothing of the references, and no transfer."""
    (found,), _ = build(model).measure([0.0])
    assert (found.prompt_kept, found.reference_followed, found.transfer) == (1.0, 0.0, 0.0)


class Colours:
    """A judge that sees the mean colour, and for which every prompt is red."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[1.0, 0.0, 0.0]]).repeat(len(texts), 1)

    def embed_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = [torch.tensor(picture.resize((1, 1)).getpixel((0, 0)), dtype=torch.float32) for picture in pictures]
        return torch.nn.functional.normalize(torch.stack(pixels), dim=1)


def test_what_follows_its_reference_is_told_from_what_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of their references' colours keep no red prompt; swapped they follow the others; red ones none."""
    colours = {"green": (0, 255, 0), "blue": (0, 0, 255), "red": (255, 0, 0), "grey": (128, 128, 128)}
    drawn: list[str] = []

    def generate(pipeline: VCFPipeline, *_: Any, **__: Any) -> Tensor:
        pixels = torch.tensor([colours[name] for name in drawn], dtype=torch.float32) / 255
        return pixels[:, :, None, None].expand(-1, 3, 4, 4)

    monkeypatch.setattr(VCFPipeline, "generate", generate)
    monkeypatch.setattr(measuring, "_noted_attention", lambda pipeline, count: contextlib.nullcontext({}))
    pairs = [TransferPair("red", Image.new("RGB", (4, 4), colours[name]), 0) for name in ("green", "blue")]
    drawn[:] = ["grey", "grey"]
    transfer = Transfer(build_pipeline(), Colours(), pairs)  # type: ignore[arg-type]
    found = []
    for names in (["green", "blue"], ["blue", "green"], ["red", "red"], ["grey", "grey"]):
        drawn[:] = names
        made = transfer._generate(1.0)
        found.append(transfer._compare(1.0, measuring._Pictures(made.embeddings, made.shown, {"layer": 0.0})))
    assert [round(each.reference_followed, 5) for each in found] == [1.0, -1.0, 0.0, 0.0]
    assert [round(each.prompt_kept, 2) for each in found] == [0.0, 0.0, 1.0, 1.0]
    assert [each.transfer for each in found] == [0.0, 0.0, 0.0, 0.0]
    assert Measured(1.0, 0.8, 0.5, {}).transfer == pytest.approx(0.4)
    drawn[:] = ["grey", "red"]
    made = transfer._generate(1.0)
    mixed = transfer._compare(1.0, measuring._Pictures(made.embeddings, made.shown, {"layer": 0.0}))
    drawn[:] = ["green", "red"]
    made = transfer._generate(1.0)
    lost = transfer._compare(1.0, measuring._Pictures(made.embeddings, made.shown, {"layer": 0.0}))
    assert (mixed.prompt_kept, lost.prompt_kept) == (1.0, pytest.approx(0.5)), "one's gain is not the other's"


# In a training

Plan = Callable[..., TrainingJob]


@pytest.fixture
def plan(model: Path, data: Path, tmp_path: Path) -> Plan:
    def make(**changes: Any) -> TrainingJob:
        settings = {"model": str(model), "data": str(data), "out": str(tmp_path / "out"), "batch_size": 8, "epochs": 2}
        settings |= {"learning_rate": 1e-2, "validation_pairs": 8, "dtype": "float32", "seed": 1, "transfer_pairs": 4}
        return TrainingJob.plan(TrainingConfig(**{**settings, **changes}))

    return make


def train(job: TrainingJob, folder: Path, stop_at: int | None = None, checkpoint: Path | None = None) -> list[str]:
    """Train, keep the last checkpoint in a folder, and return the messages."""
    notes: list[str] = []

    def report(row: dict[str, Any], found: Path | None) -> None:
        assert found is not None
        shutil.copytree(found, folder, dirs_exist_ok=True)
        if row["step"] == stop_at:
            raise KeyboardInterrupt

    place = Place(report, lambda done, broken: None, notes.append, lambda module: module, torch.device("cpu"))
    fit(job, place, checkpoint)
    return notes


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_each_validation_tells_what_its_pictures_show(plan: Plan, tmp_path: Path) -> None:
    """In the log, by strength and layer in a table of its own, as a picture, for TensorBoard and in a line of words."""
    job = plan(tune_strength=True)
    notes = train(job, tmp_path / "checkpoint")
    out = tmp_path / "out"
    log, rows = read_log(str(out)), table(out / "transfer.csv")
    assert [row["step"] for row in log] == [0, 2, 4]
    assert [(row["step"], float(row["strength"])) for row in rows] == [
        (str(step), strength) for step in (0, 2, 4) for strength in EVALUATED_STRENGTHS
    ]
    for validation in log:
        some = [row for row in rows if float(row["step"]) == validation["step"]]
        best = max(some, key=lambda row: float(row["transfer"]))
        names = ("strength", "transfer", "prompt_kept", "reference_followed", "image_attention")
        assert {name: validation[name] for name in names} == {name: float(best[name]) for name in names}
    layers = [name for name in rows[0] if name.startswith("attention ")]
    assert len(layers) == 7 and "attention mid_block.attentions.0.0" in layers
    assert sorted(path.name for path in (out / "transfer").iterdir()) == [f"step-0000000{n}.png" for n in (0, 2, 4)]
    with Image.open(out / "transfer" / "step-00000004.png") as sheet:
        assert sheet.size == (7 * 136 + 8, 2 * 16 + 4 * 152 + 2 * 8 + 4 * 8)
    assert (
        ImageAligner.from_pretrained(tmp_path / "checkpoint" / ALIGNER).config.default_strength == log[-1]["strength"]
    )
    assert any("; pictures at strength " in note and "reference followed" in note for note in notes)


def test_the_log_is_one_of_tensorboard(plan: Plan, tmp_path: Path) -> None:
    """A file a step, in the order of their names, with every number of the log and the picture."""
    from tensorboardX.proto.event_pb2 import Event

    train(plan(), tmp_path / "checkpoint")
    files = sorted((tmp_path / "out" / "tensorboard").iterdir())
    assert [file.name for file in files] == [f"events.out.tfevents.000000000{step}" for step in (0, 2, 4)]
    for row, file in zip(read_log(str(tmp_path / "out")), files, strict=True):
        data, events = file.read_bytes(), []
        while data:
            length = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
        version, event = events
        assert version.file_version == "brain.Event:2" and event.step == row["step"]
        values = [value for value in event.summary.value if value.WhichOneof("value") == "simple_value"]
        (picture,) = [value.image for value in event.summary.value if value.WhichOneof("value") == "image"]
        assert Image.open(io.BytesIO(picture.encoded_image_string)).size == (picture.width, picture.height)
        assert {value.tag: value.simple_value for value in values} == pytest.approx(row, rel=1e-5)


def test_pictures_change_nothing_that_is_trained(plan: Plan, tmp_path: Path) -> None:
    """With and without them, the aligner has the same weights, and the log the same losses."""
    for pairs in (0, 4):
        train(plan(transfer_pairs=pairs, out=str(tmp_path / f"out{pairs}")), tmp_path / str(pairs))
    without, measured = (ImageAligner.from_pretrained(tmp_path / name / ALIGNER) for name in ("0", "4"))
    for name, value in without.state_dict().items():
        assert torch.equal(measured.state_dict()[name], value)
    for one, other in zip(*(read_log(str(tmp_path / f"out{pairs}")) for pairs in (0, 4)), strict=True):
        assert one["validation_loss"] == other["validation_loss"] and "transfer" not in one
    assert not (tmp_path / "out0" / "transfer").exists() and (tmp_path / "out0" / "tensorboard").exists()


def test_a_training_that_goes_on_keeps_what_was_measured(plan: Plan, tmp_path: Path) -> None:
    """The tables have each validation once, in order, with the numbers of an undisturbed training."""
    train(plan(out=str(tmp_path / "whole")), tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(plan(), tmp_path / "b", stop_at=2)
    train(plan(), tmp_path / "b", checkpoint=tmp_path / "b")
    whole, stopped = (table(tmp_path / name / "transfer.csv") for name in ("whole", "out"))
    assert [row["step"] for row in stopped] == ["0", "2", "4"]
    for one, other in zip(whole, stopped, strict=True):
        assert {name: float(value) for name, value in one.items()} == pytest.approx(
            {name: float(value) for name, value in other.items()}, abs=1e-4
        )


def test_matched_norms_are_those_of_the_texts(plan: Plan, tmp_path: Path) -> None:
    """Every image token has the mean norm of the text tokens, and the aligner brings it to generation."""
    job = plan(match_norms=True, transfer_pairs=0)
    train(job, tmp_path / "checkpoint")
    aligner = ImageAligner.from_pretrained(tmp_path / "checkpoint" / ALIGNER)
    captions = [pair.captions[0] for pair in job.validation_data.read(job.validation) if pair.image != b"broken"]
    expected = build_pipeline().encode_prompts(captions).norm(dim=-1).mean().item()
    assert aligner.config.token_norm == pytest.approx(expected, abs=1e-3)
    norms = aligner(torch.randn(2, 5, aligner.config.vision_dim)).norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, aligner.config.token_norm))


def test_prompts_of_the_pairs(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file, or else the caption of another image; a broken image is left out."""
    seen: list[TransferPair] = []
    monkeypatch.setattr(Transfer, "__init__", lambda self, pipeline, judge, pairs, rank: seen.extend(pairs))
    for prompts in (None, ["a red star\n", " \n", "a red star\n", "a blue ring"]):
        file = tmp_path / "prompts.txt"
        file.write_text("".join(prompts or ()))
        job = plan(prompts=str(file) if prompts else None, transfer_pairs=6)
        held_out = list(job.validation_data.read(job.validation))
        seen.clear()
        assert Transfer.load(job, build_pipeline(), iter(held_out), 0) is not None
        captions = [pair.captions[0] for pair in held_out if pair.image != b"broken"]
        expected = [captions[number - 1] for number in range(6)] if not prompts else ["a red star", "a blue ring"] * 3
        if not prompts:
            expected[0] = captions[5]
        assert [pair.prompt for pair in seen] == expected
        assert [pair.seed for pair in seen] == list(range(1, 7))


# Planning


def test_whether_pictures_are_made(plan: Plan, model: Path, tmp_path: Path) -> None:
    """By default where there is a judge; where there is none that is told, and what needs one is refused."""
    assert plan(transfer_pairs=None).transfer_pairs == 8, "all that is held out"
    assert not plan(transfer_pairs=None).remarks
    plain = tmp_path / "plain"
    build_pipeline().save_pretrained(plain)
    silent = plan(model=str(plain), transfer_pairs=None)
    assert silent.transfer_pairs == 0
    assert any("is not measured, and the losses do not tell it: name a CLIP" in remark for remark in silent.remarks)
    assert not plan(model=str(plain), transfer_pairs=0).remarks
    judged = plan(model=str(plain), transfer_pairs=None, judge=str(model / "judge"))
    assert judged.transfer_pairs == 8 and judged.judge is not None
    for changes, reason in (
        ({"transfer_pairs": 4}, "brings no CLIP that compares pictures: name one with --judge"),
        ({"transfer_pairs": None, "tune_strength": True}, "--tune-strength compares pictures of two pairs or more"),
        ({"transfer_pairs": None, "select_by": "transfer"}, "--select-by transfer compares pictures of two pairs"),
    ):
        with pytest.raises(UsageError, match=reason):
            plan(model=str(plain), **changes)
    with pytest.raises(UsageError, match="there are 1"):
        plan(validation_pairs=1)
    with pytest.raises(UsageError, match="--transfer-pairs is 1; it must be 0, or from 2 to 1,000"):
        plan(transfer_pairs=1)


def test_a_training_that_was_begun_before_goes_on(plan: Plan) -> None:
    """With the values that mean the behaviour before them, settings that were added stay out of what defines it."""
    fields = plan(tether=0.0).fields()
    assert not fields.keys() & {*AS_BEFORE, "transfer_pairs", "prompts", "judge", "judge_id", "image_folder"}
    assert plan(tether=0.0, transfer_pairs=0).fields() == fields
    for changes in ({}, {"tune_strength": True}, {"select_by": "transfer"}, {"match_norms": True}):
        assert plan(**changes).fields() != fields
    assert plan(select_by="transfer", transfer_pairs=3).fields() != plan(select_by="transfer").fields()


def test_the_best_is_that_of_the_loss_or_of_the_pictures(plan: Plan) -> None:
    rows = [{"validation_loss": loss, "transfer": score} for loss, score in ((3.0, 0.5), (1.0, 0.2), (2.0, 0.9))]
    assert best_of(rows, plan().config) is rows[1]
    assert best_of(rows, plan(select_by="transfer").config) is rows[2]
