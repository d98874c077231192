"""A whole training without a cluster: planning, learning, the log, going on from a checkpoint."""

import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from support import runs, sd_layouts
from support.captioned import write_tar
from support.tiny_models import TEXT_WIDTH, VISION_WIDTH, build_pipeline
from vcf_batch.errors import ModelError, UsageError, VcfBatchError
from vcf_batch.models.parts import Parts
from vcf_batch.training import fit as fitting
from vcf_batch.training.alignment import Trainer
from vcf_batch.training.assembly import assemble, load
from vcf_batch.training.fit import Place, fit
from vcf_batch.training.training_config import TrainingConfig
from vcf_batch.training.training_job import ALIGNER, STATE, TrainingJob, read_log
from vcf_batch.vcf.aligner import ImageAligner
from vcf_batch.vcf.pipeline import VCFPipeline

PAIRS = 48


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of noise whose captions are random letters; two of them broken."""
    folder = tmp_path_factory.mktemp("data")
    for shard in range(2):
        members: dict[str, bytes | str] = {}
        for number in range(shard * PAIRS // 2, (shard + 1) * PAIRS // 2):
            members[f"{number:09d}.png"] = runs.png(number) if number not in (5, 30) else b"broken"
            members[f"{number:09d}.txt"] = " ".join("abcdefghijkl"[number * step % 12] for step in (1, 5, 7))
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


class Reports:
    """Takes what a worker reports, and keeps its last checkpoint as Ray Train would."""

    def __init__(self, folder: Path, stop_at: int | None = None) -> None:
        self.folder, self.stop_at = folder, stop_at
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.place = Place(
            report=self.report,
            progress=lambda done, broken: None,
            note=self.notes.append,
            parallel=lambda module: module,
            device=torch.device("cpu"),
        )

    def report(self, row: dict[str, Any], checkpoint: Path | None) -> None:
        assert checkpoint is not None
        self.rows.append(row)
        shutil.copytree(checkpoint, self.folder, dirs_exist_ok=True)
        if row["step"] == self.stop_at:
            raise KeyboardInterrupt


Plan = Callable[..., TrainingJob]


@pytest.fixture
def plan(model: Path, data: Path, tmp_path: Path) -> Plan:
    def make(**changes: Any) -> TrainingJob:
        settings = {"model": str(model), "data": str(data), "out": str(tmp_path / "out"), "batch_size": 8, "epochs": 2}
        settings |= {"learning_rate": 1e-2, "validation_pairs": 8, "dtype": "float32", "seed": 1}
        return TrainingJob.plan(TrainingConfig(**{**settings, **changes}))

    return make


def test_training_learns_and_writes_it_down(plan: Plan, tmp_path: Path) -> None:
    """A validation before the first step and after every epoch; the log has a row of each."""
    task, reports = plan(epochs=3), Reports(tmp_path / "checkpoint")
    fit(task, reports.place, None)
    assert (task.pairs, task.steps_per_epoch, task.steps) == (40, 5, 15)
    log = read_log(task.config.out)
    assert [row["step"] for row in log] == [0, 5, 10, 15]
    assert [row["step"] for row in reports.rows] == [5, 10, 15]
    assert log[-1]["validation_loss"] < log[0]["validation_loss"]
    assert log[-1]["loss"] < log[1]["loss"]
    assert all(0 <= row["recall_at_1"] <= row["recall_at_5"] <= 1 for row in log)
    assert [row["broken_pairs"] for row in log] == [0, 2, 2, 2]
    assert sum(note.startswith("left out: ") for note in reports.notes) == 2
    assert any(note.startswith("step 15 of 15: validation loss ") for note in reports.notes)
    aligner = ImageAligner.from_pretrained(tmp_path / "checkpoint" / ALIGNER)
    assert (aligner.config.vision_dim, aligner.config.text_dim) == (VISION_WIDTH, TEXT_WIDTH)


def test_an_interrupted_training_goes_on_from_its_checkpoint(plan: Plan, tmp_path: Path) -> None:
    """Stopped in the middle of an epoch, it takes the steps that an undisturbed training takes."""
    settings = {"validate_every": 3, "learn_temperature": True}
    whole = Reports(tmp_path / "whole")
    fit(plan(**settings, out=str(tmp_path / "whole-out")), whole.place, None)
    stopped = Reports(tmp_path / "stopped", stop_at=6)
    with pytest.raises(KeyboardInterrupt):
        fit(plan(**settings), stopped.place, None)
    fit(plan(**settings), stopped.place, tmp_path / "stopped")

    assert [row["step"] for row in stopped.rows] == [3, 6, 9, 10]
    assert [row["step"] for row in read_log(str(tmp_path / "out"))] == [0, 3, 6, 9, 10]
    timed = {"pairs_per_second"}
    for one, other in zip(whole.rows, stopped.rows, strict=True):
        assert {k: one[k] for k in one.keys() - timed} == pytest.approx({k: other[k] for k in other.keys() - timed})
    states = [torch.load(reports.folder / STATE, weights_only=True)["alignment"] for reports in (whole, stopped)]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value)
    fit(plan(**settings), stopped.place, tmp_path / "stopped")
    assert len(stopped.rows) == 4, "what is finished is not trained again"


@pytest.mark.parametrize("after", [0, 6])
def test_a_diverged_training_ends_with_its_last_good_checkpoint(
    after: int, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are not finite are neither logged nor kept: exit code 1, with the last checkpoint that was good."""
    reports = Reports(tmp_path / "checkpoint")
    task = plan(validate_every=3, learning_rate=1e-3 if after else 1.0)
    step = Trainer.step

    def diverging(trainer: Trainer, *tokens: torch.Tensor) -> Any:
        losses = step(trainer, *tokens)
        if trainer.steps_done > after:
            next(iter(trainer.alignment.aligner.parameters())).data.fill_(float("nan"))
        return losses

    monkeypatch.setattr(Trainer, "step", diverging)
    with pytest.raises(VcfBatchError) as caught:
        fit(task, reports.place, None)
    assert caught.value.exit_code == 1
    assert str(caught.value).startswith(f"the training has diverged: the loss is nan in step {after + 2}. ")
    assert "Train with a lower --learning-rate into another --out" in str(caught.value)
    last = f"The last good checkpoint is {task.config.out}/checkpoints/step-{after:08d}, with the aligner in aligner/"
    assert (last if after else "There is no checkpoint before it") in str(caught.value)
    assert [row["step"] for row in reports.rows] == [*range(3, after + 1, 3)]


def test_a_validation_that_is_not_finite_is_not_published(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training of one step that diverges in it ends too: nothing of it becomes a checkpoint or a line of the log."""
    reports = Reports(tmp_path / "checkpoint")
    task = plan(batch_size=40, epochs=1)
    step = torch.optim.AdamW.step

    def diverging(optimizer: torch.optim.AdamW, *arguments: Any) -> None:
        step(optimizer, *arguments)
        for group in optimizer.param_groups:
            group["params"][0].data.fill_(1e38)

    monkeypatch.setattr(torch.optim.AdamW, "step", diverging)
    with pytest.raises(VcfBatchError, match=r"diverged: .* after step 1"):
        fit(task, reports.place, None)
    assert not reports.rows and [row["step"] for row in read_log(task.config.out)] == [0]


@pytest.mark.parametrize("where", ["validation", "step"])
def test_towers_that_are_not_finite_are_not_blamed_on_the_learning_rate(
    where: str, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step is done nothing has been trained: towers and dtype are named instead."""
    encode = fitting.Towers.encode

    def encoding(towers: fitting.Towers, batch: Any) -> Any:
        vision, text = encode(towers, batch)
        return vision.float() * float("nan"), text

    if where == "validation":
        monkeypatch.setattr(fitting.Towers, "encode", encoding)
    else:
        record = fitting._Fit._record

        def recording(self: Any) -> None:
            record(self)
            monkeypatch.setattr(fitting.Towers, "encode", encoding)

        monkeypatch.setattr(fitting._Fit, "_record", recording)
    with pytest.raises(VcfBatchError) as caught:
        fit(plan(), Reports(tmp_path / "checkpoint").place, None)
    told = str(caught.value)
    assert re.match(r"the training cannot begin: \S.* is nan .*, before anything is trained\. The towers", told)
    assert "--dtype float32 does not hold: use other models" in told and "--learning-rate" not in told
    assert caught.value.exit_code == 1


def test_a_broken_validation_pair_ends_a_training_only_if_no_other_is_left(plan: Plan, tmp_path: Path) -> None:
    """Beside a good one it is left out; alone, it is told as what it is."""
    write_tar(tmp_path / "held.tar", {"a.png": b"broken", "a.txt": "a", "b.png": runs.png(1), "b.txt": "b"})
    settings = {"validation_data": str(tmp_path / "held.tar"), "epochs": 1}
    reports = Reports(tmp_path / "checkpoint")
    fit(plan(**settings, validation_pairs=2), reports.place, None)
    assert reports.rows[-1]["validation_pairs"] == 1
    (first, last) = read_log(str(tmp_path / "out"))
    assert first["broken_pairs"] == 1, "a pair of the validation counts too"
    assert any("; 1 broken pairs left out before it" in note for note in reports.notes)
    fit(plan(**settings, validation_pairs=2), reports.place, tmp_path / "checkpoint")
    assert read_log(str(tmp_path / "out")) == [first, last]
    with pytest.raises(UsageError, match=r"1 of the first 1 validation pairs cannot .*held.tar a: .*raise --valid"):
        fit(plan(**settings, validation_pairs=1), reports.place, None)


def test_the_form_of_the_data_changes_nothing(plan: Plan, tmp_path: Path) -> None:
    """The same pairs in a tar, in a folder with texts, as an imagefolder, as COCO's captions, as paths in Parquet."""
    pairs = [(f"{number:02d}", runs.png(number), f"{'abcdefghijkl'[number % 12]} caption") for number in range(24)]
    members: dict[str, bytes | str] = {}
    for key, image, text in pairs:
        members |= {f"{key}.png": image, f"{key}.txt": text}
    write_tar(tmp_path / "tar" / "x.tar", members)
    for form in ("texts", "imagefolder", "coco"):
        (tmp_path / form).mkdir()
        for key, image, text in pairs:
            (tmp_path / form / f"{key}.png").write_bytes(image)
            if form == "texts":
                (tmp_path / form / f"{key}.txt").write_text(text)
    records = [{"file_name": f"{key}.png", "text": text} for key, _, text in pairs]
    (tmp_path / "imagefolder" / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    coco = {
        "images": [{"id": number, "file_name": f"{key}.png"} for number, (key, *_) in enumerate(pairs)],
        "annotations": [{"image_id": number, "caption": text} for number, (*_, text) in enumerate(pairs)],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    images = pa.array([{"bytes": None, "path": f"coco/{key}.png"} for key, *_ in pairs])
    pq.write_table(pa.table({"image": images, "TEXT": [text for *_, text in pairs]}), tmp_path / "x.parquet")
    found = []
    for data, folder in (
        ("tar", None),
        ("texts", None),
        ("imagefolder", None),
        ("coco.json", "coco"),
        ("x.parquet", None),
    ):
        reports = Reports(tmp_path / "checkpoint")
        settings = {"image_folder": str(tmp_path / folder) if folder else None, "out": str(tmp_path / f"out {data}")}
        fit(plan(data=str(tmp_path / data), epochs=1, **settings), reports.place, None)
        found.append([row["validation_loss"] for row in reports.rows])
        assert not reports.rows[-1]["broken_pairs"]
    assert found == [found[0]] * 5


def test_the_threads_of_the_data_end_with_the_training(plan: Plan, tmp_path: Path) -> None:
    before = {*threading.enumerate()}
    fit(plan(epochs=1), Reports(tmp_path / "checkpoint").place, None)
    for thread in {*threading.enumerate()} - before:
        if thread.name.startswith(("pairs_", "batches_")):
            thread.join(60)
            assert not thread.is_alive()


def test_assemble_refuses_weights_that_are_not_finite(model: Path, tmp_path: Path) -> None:
    """An aligner of a diverged training, or one that the precision asked for does not hold, makes no model."""
    aligner = ImageAligner(VISION_WIDTH, TEXT_WIDTH)
    for value, dtype in ((float("nan"), torch.float32), (1e30, torch.float16)):
        next(iter(aligner.parameters())).data.fill_(value)
        aligner.save_pretrained(tmp_path / "aligner")
        with pytest.raises(ModelError, match=r"the aligner .* has weights that are not finite: .*torch.float"):
            assemble(Parts.resolve(str(model)), str(tmp_path / "aligner"), str(tmp_path / "out"), dtype)
    assert not (tmp_path / "out").exists()


def test_the_cache_changes_nothing(plan: Plan, tmp_path: Path) -> None:
    """A training with cached features, and a later one that finds them, see the same tokens."""
    rows = []
    for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        reports = Reports(tmp_path / "checkpoint")
        fit(plan(cache_features=cache, epochs=1), reports.place, None)
        rows.append(reports.rows[-1])
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert [name[:13] for name in names] == ["image-float32", "text-float32-"]
    assert names[0].endswith("-srgb"), "tokens of pixels that were not converted are not used"
    assert [row["validation_loss"] for row in rows[1:]] == pytest.approx([rows[0]["validation_loss"]] * 2, rel=1e-5)


def test_the_towers_stay_as_they_are(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[VCFPipeline] = []

    def keep(*arguments: Any, **components: Any) -> VCFPipeline:
        loaded.append(load(*arguments, **components))
        return loaded[0]

    monkeypatch.setattr(fitting, "load", keep)
    task = plan(epochs=1)
    fit(task, Reports(tmp_path / "checkpoint").place, None)
    before = load(task.parts, torch.float32)
    for name in ("text_encoder", "image_encoder"):
        tower, untouched = getattr(loaded[0], name), getattr(before, name)
        assert not tower.training and not any(parameter.requires_grad for parameter in tower.parameters())
        assert all(map(torch.equal, tower.parameters(), untouched.parameters()))


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_an_aligner_for_the_hub_s_layouts(name: str, data: Path, tmp_path: Path) -> None:
    """Train for a checkpoint laid out as SD 1.5, 2.1 or XL, assemble, generate: 257 image tokens, 77 text tokens."""
    saved = {"sd15": sd_layouts.save_sd15, "sd21": sd_layouts.save_sd21, "sdxl": sd_layouts.save_sdxl}
    base, clip = saved[name](tmp_path / name), sd_layouts.save_clip(tmp_path / "clip")  # type: ignore[operator]
    settings = {"batch_size": 4, "epochs": 1, "limit": 12, "validation_pairs": 4, "dtype": "float32"}
    out = str(tmp_path / "out")
    config = TrainingConfig(model=str(base), image_encoder=str(clip), data=str(data), out=out, **settings)  # type: ignore[arg-type]
    reports = Reports(tmp_path / "checkpoint")
    fit(TrainingJob.plan(config), reports.place, None)
    log = read_log(out)
    assert log[-1]["validation_loss"] < log[0]["validation_loss"]
    parts = Parts.resolve(str(base), image_encoder=str(clip))
    assemble(parts, str(tmp_path / "checkpoint" / ALIGNER), str(tmp_path / "model"), torch.float32)
    pipeline = VCFPipeline.from_pretrained(tmp_path / "model")
    picture = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 20)
    images = pipeline.generate(["a cat", "a dog"], [picture, None], seeds=[0, 1], steps=2)
    edge = 64 if name == "sdxl" else 32
    assert images.shape == (2, 3, edge, edge) and images.isfinite().all()
    assert not torch.equal(images[:1], pipeline.generate(["a cat"], seeds=[0], steps=2))


def test_the_parts_of_two_text_encoders_are_measured_before_the_training(data: Path, tmp_path: Path) -> None:
    """So that a training compares the same numbers however large the tokens of either encoder are, and matched norms
    are those of each."""
    base, clip = sd_layouts.save_sdxl(tmp_path / "base"), sd_layouts.save_clip(tmp_path / "clip")
    settings: dict[str, Any] = {"batch_size": 4, "epochs": 1, "limit": 8, "validation_pairs": 4, "dtype": "float32"}
    config = TrainingConfig(
        model=str(base),
        image_encoder=str(clip),
        data=str(data),
        out=str(tmp_path / "out"),
        match_norms=True,
        **settings,
    )
    with fitting._Fit(TrainingJob.plan(config), Reports(tmp_path / "checkpoint").place, None) as found:
        pipeline, alignment = found.towers.pipeline, found.trainer.alignment
        tokens = torch.cat([found.towers.encode(batch)[1] for batch in found._validation_batches()])
        norms = [part.norm(dim=-1).mean().item() for part in alignment.compared(tokens).split([24, 40], dim=-1)]
        assert norms[0] / 24**0.5 == pytest.approx(norms[1] / 40**0.5, rel=1e-3)
        halves = [part.norm(dim=-1).mean().item() for part in tokens.split([24, 40], dim=-1)]
        assert halves[0] != pytest.approx(halves[1], rel=0.1)
        aligned = pipeline.aligner(torch.randn(2, 5, pipeline.aligner.config.vision_dim)).split([24, 40], dim=-1)
        for part, norm in zip(aligned, halves, strict=True):
            torch.testing.assert_close(part.norm(dim=-1), torch.full((2, 5), norm), rtol=0, atol=2e-3)


# Planning


def test_the_last_pairs_are_held_out(plan: Plan, data: Path) -> None:
    task = plan(validation_pairs=None, limit=40)
    assert (task.pairs, sum(map(len, task.validation))) == (38, 2)
    held_out = next(iter(task.validation))
    assert (Path(held_out.url).name, held_out.start, held_out.stop) == ("00001.tar", 14, 16)


def test_validation_data_of_its_own(plan: Plan, data: Path) -> None:
    task = plan(validation_data=str(data / "00001.tar"), data=str(data / "00000.tar"), validation_pairs=None)
    assert (task.pairs, sum(map(len, task.validation))) == (24, 24)


def test_too_few_pairs_are_refused(plan: Plan) -> None:
    with pytest.raises(
        UsageError, match="has 40 pairs to train on, besides 8 for validation: fewer than --batch-size 64"
    ):
        plan(batch_size=64)
    with pytest.raises(UsageError, match="has 0 pairs to train on, besides 60 for validation"):
        plan(validation_pairs=60)


def test_a_model_without_image_encoder_is_refused(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no image encoder of its own"):
        plan(model=str(sd_layouts.save_sd15(tmp_path / "sd15")))


def test_what_makes_it_another_training(plan: Plan, tmp_path: Path) -> None:
    """Recipe, data and models do; where it runs, how often it validates and what things are called do not."""
    fields = plan().fields()
    same = plan(num_workers=3, validate_every=1, cache_features="c", out=str(tmp_path / "other"))
    assert same.fields() == fields
    assert plan(epochs=3).fields() != fields
    assert plan(limit=47).fields() != fields


def test_there_may_be_no_log_yet(tmp_path: Path) -> None:
    assert read_log(str(tmp_path)) == []
