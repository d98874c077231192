"""The worker, run in this process: real components, no cluster."""

import dataclasses
import errno
import hashlib
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from support import runs
from support.runs import another, commit, load
from vcf_batch import images, sharding
from vcf_batch.errors import ModelError, NodeError, StorageError
from vcf_batch.manifest.references import ReferenceReader
from vcf_batch.metrics.scorer import Scorer
from vcf_batch.output import commits, sample_records, shards
from vcf_batch.records import Reference, Shard
from vcf_batch.setup.shard_task import ShardTask
from vcf_batch.vcf.base.family import EncodedText
from vcf_batch.vcf.base.stable_diffusion import StableDiffusion
from vcf_batch.vcf.pipeline import VCFPipeline
from vcf_batch.worker import shard_references, worker
from vcf_batch.worker.device import Device
from vcf_batch.worker.worker import Worker

pytestmark = pytest.mark.usefixtures("restored_torch")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    """A worker whose parts the tests reuse."""
    manifest = runs.write_manifest(tmp_path_factory.mktemp("manifest"), 1)
    return load(manifest, tmp_path_factory.mktemp("output"), model)


def with_reader(subject: Worker, reader: type[ReferenceReader]) -> Worker:
    components = dataclasses.replace(subject.components, references=reader(subject.manifest.base, (), 1_000_000))
    return Worker(components, subject.manifest, subject.fingerprint)


def test_a_shard_holds_every_row_in_order_with_its_settings(loaded: Worker, tmp_path: Path) -> None:
    """A row never disappears."""
    receipt = commit(another(loaded, runs.write_manifest(tmp_path / "in", 10), tmp_path / "out"))
    rows = runs.rows_of(tmp_path / "out")
    assert [row["label"] for row in rows] == [f"row {number}" for number in range(10)]
    assert {row["status"] for row in rows} == {"success"}
    assert receipt.counts == {"success": 10, "rejected": 0, "failed": 0}
    assert rows[0]["fusion"] == "concat"
    assert rows[0]["strength"] == 1.0  # the number that was used, not null for "default"
    assert rows[0]["guidance_scale"] == 5.0
    assert (rows[0]["steps"], rows[0]["scheduler"], rows[0]["width"]) == (4, "ddim", 32)
    assert all(-1 <= row["clip_score"] <= 1 for row in rows)
    assert [row["clip_reference"] is None for row in rows] == [row["reference"] is None for row in rows]
    samples = list(shards.read_samples(str(tmp_path / "out" / "00000.tar")))
    assert [sample["__key__"] for sample in samples] == [row["key"] for row in rows]
    assert samples[3]["txt"] == rows[3]["prompt"]


def test_the_same_shard_gives_the_same_bytes(loaded: Worker, tmp_path: Path) -> None:
    """The output is a function of (fingerprint, device type), not of retries."""
    manifest = runs.write_manifest(tmp_path / "in", 7)
    commit(another(loaded, manifest, tmp_path / "a"))
    commit(another(loaded, manifest, tmp_path / "b"), attempt=2)
    assert runs.data_files(tmp_path / "a") == runs.data_files(tmp_path / "b")


def test_the_receipt_names_the_device_type(loaded: Worker, tmp_path: Path) -> None:
    """The receipt's device: GPU model or CPU ISA, dtype, threads, library versions."""
    receipt = commit(another(loaded, runs.write_manifest(tmp_path / "in", 1), tmp_path / "out"))
    assert receipt.device["dtype"] == "float32"
    assert receipt.device["threads"] == 1
    assert torch.backends.cpu.get_cpu_capability() in receipt.device["type"]
    assert {"torch", "diffusers", "transformers", "vcf_batch"} <= receipt.device["versions"].keys()
    assert receipt.timings["model_loads"] == worker._model_loads
    assert receipt.attempt == 1


def test_a_shard_of_failed_rows_costs_reading_and_writing_only(
    loaded: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch of which every row has failed nothing is encoded, sampled or scored."""
    monkeypatch.setattr(StableDiffusion, "encode", pytest.fail)
    for name in ("encode_references", "generate_from_tokens"):
        monkeypatch.setattr(loaded.components.pipeline, name, pytest.fail)
    for name in ("embed_texts", "embed_images"):
        monkeypatch.setattr(loaded.components.scorer.judge, name, pytest.fail)
    manifest = runs.write_manifest(tmp_path / "in", 3, {"reference": ["gone.png"] * 3})
    assert commit(another(loaded, manifest, tmp_path / "out")).counts["failed"] == 3
    assert [row["status"] for row in runs.rows_of(tmp_path / "out")] == ["failed"] * 3


def test_a_failed_batch_changes_no_byte_of_another(loaded: Worker, tmp_path: Path) -> None:
    """The output of a row does not depend on failed rows, although it shares prompt and reference with some of them."""
    columns: dict[str, list[Any]] = {
        "prompt": [*runs.PROMPTS[:3], "only here", *runs.PROMPTS[:3], "another"] * 2,
        "reference": ["reference0.png", "reference1.png", "reference2.png", "reference1.png"] * 4,
    }
    whole = runs.write_manifest(tmp_path / "whole", 16, columns)
    columns["negative_reference"] = ["gone.png"] * 4 + [None] * 12
    broken = runs.write_manifest(tmp_path / "broken", 16, columns)
    for name, manifest in {"whole": whole, "broken": broken}.items():
        commit(another(loaded, manifest, tmp_path / name / "out", batch_size=4))
    rows, others = (runs.rows_of(tmp_path / name / "out") for name in ("whole", "broken"))
    assert [row["status"] for row in others] == ["failed"] * 4 + ["success"] * 12
    for row, other in zip(rows[4:], others[4:], strict=True):
        assert {**row, "negative_reference": None} == {**other, "negative_reference": None}


def test_rows_override_the_runs_settings(loaded: Worker, tmp_path: Path) -> None:
    """The same row alone or among others, with its own fusion, strength and guidance."""
    columns: dict[str, list[Any]] = {
        "sample_id": ["a", "b", "c", "d"],
        "prompt": ["same"] * 4,
        "reference": ["reference0.png"] * 4,
        "seed": [5] * 4,
        "fusion": [None, "naive", "cross_attention", "concat"],
        "strength": [None, None, 0.9, 0.0],
    }
    commit(another(loaded, runs.write_manifest(tmp_path / "in", 4, columns), tmp_path / "out"))
    rows = runs.rows_of(tmp_path / "out")
    assert [(row["fusion"], row["strength"]) for row in rows] == [
        ("concat", 1.0),
        ("naive", 0.3),
        ("cross_attention", 0.9),
        ("concat", 0.0),
    ]
    assert len({row["sha256"] for row in rows}) == 4


def test_prompts_beyond_the_text_encoders_length_are_told_and_cut_off(loaded: Worker, tmp_path: Path) -> None:
    """Their tokens are counted with begin and end; what follows the last token changes no image."""
    most = loaded.components.pipeline.max_tokens
    cut = "a " * (most - 2)
    columns: dict[str, list[Any]] = {
        "prompt": ["a", cut, f"{cut}a", f"{cut}b"],
        "reference": [None] * 4,
        "seed": [7] * 4,
    }
    receipt = commit(another(loaded, runs.write_manifest(tmp_path / "in", 4, columns), tmp_path / "out"))
    rows = runs.rows_of(tmp_path / "out")
    assert [row["prompt_tokens"] for row in rows] == [3, most, most + 1, most + 1]
    assert [row["prompt_truncated"] for row in rows] == [False, False, True, True]
    assert rows[2]["phash"] == rows[3]["phash"]
    assert receipt.truncated == 2


def test_negative_prompts_are_cut_off_likewise_and_rows_that_failed_are_not_counted(
    loaded: Worker, tmp_path: Path
) -> None:
    long = "a " * loaded.components.pipeline.max_tokens
    columns: dict[str, list[Any]] = {"prompt": ["a", long, "a"], "negative_prompt": [long, "", ""]}
    columns["reference"] = [None, "gone.png", None]
    receipt = commit(another(loaded, runs.write_manifest(tmp_path / "in", 3, columns), tmp_path / "out"))
    rows = runs.rows_of(tmp_path / "out")
    assert [(row["status"], row["prompt_truncated"]) for row in rows] == [
        ("success", True),
        ("failed", None),
        ("success", False),
    ]
    assert receipt.truncated == 1


def test_prompts_beyond_the_text_encoders_length_are_refused_on_request(loaded: Worker, tmp_path: Path) -> None:
    """So are negative prompts, and the rows beside them have the bytes that they have without such rows."""
    most = loaded.components.pipeline.max_tokens
    fits, long = "a " * (most - 2), "a " * (most - 1)
    columns = {"prompt": [fits, long, "a", "a"], "negative_prompt": ["", "", long, fits]}
    manifest = runs.write_manifest(tmp_path / "in", 4, columns)
    receipt = commit(another(loaded, manifest, tmp_path / "refused", long_prompts="refuse"))
    commit(another(loaded, manifest, tmp_path / "cut"))
    rows, cut = runs.rows_of(tmp_path / "refused"), runs.rows_of(tmp_path / "cut")
    assert [row["status"] for row in rows] == ["success", "failed", "failed", "success"]
    for row, name in ((rows[1], "prompt"), (rows[2], "negative prompt")):
        assert row["error_message"].startswith(f"the {name} has {most + 1} tokens, and the text encoder takes {most}:")
    assert [row["prompt_truncated"] for row in rows] == [False, None, None, False]
    assert (rows[0], rows[3]) == (cut[0], cut[3])
    assert receipt.truncated == 0


def test_prompts_of_any_length_are_encoded_in_windows_on_request(loaded: Worker, tmp_path: Path) -> None:
    """What follows the first window counts, and the rows beside are those of a run that cuts prompts off."""
    most = loaded.components.pipeline.max_tokens
    long = "a " * (most - 2)
    columns: dict[str, list[Any]] = {
        "prompt": ["a", long, f"{long} a", f"{long} b", "b", "a " * (most * 17)],
        "negative_prompt": ["", "", "", "b", long * 2, ""],
        "reference": ["reference0.png"] * 6,
        "seed": [7] * 6,
    }
    manifest = runs.write_manifest(tmp_path / "in", 6, columns)
    receipt = commit(another(loaded, manifest, tmp_path / "chunk", long_prompts="chunk"))
    commit(another(loaded, manifest, tmp_path / "cut"))
    rows, cut = runs.rows_of(tmp_path / "chunk"), runs.rows_of(tmp_path / "cut")
    assert [row["status"] for row in rows] == ["success"] * 5 + ["failed"]
    assert rows[5]["error_message"].startswith(f"the longer text of the row has {most * 17 + 2} tokens, or 20 windows")
    assert [row["prompt_truncated"] for row in rows] == [False] * 5 + [None] and receipt.truncated == 0
    assert rows[2]["prompt_tokens"] == most + 1
    assert len({row["sha256"] for row in rows[:5]}) == 5
    assert [row["sha256"] for row in rows[:2]] == [row["sha256"] for row in cut[:2]]


def test_a_row_in_windows_has_its_bytes_without_its_neighbours(loaded: Worker, tmp_path: Path) -> None:
    """Those that are kept are padding without their texts, and of as many windows as before."""
    long = "a " * loaded.components.pipeline.max_tokens
    columns: dict[str, list[Any]] = {
        "prompt": [f"{long} a", f"{long} b", "c", f"{long * 2} d"],
        "negative_prompt": ["", long, f"{long} c", ""],
    }
    manifest = runs.write_manifest(tmp_path / "in", 4, columns)
    commit(another(loaded, manifest, tmp_path / "whole", long_prompts="chunk"))
    again = another(loaded, manifest, tmp_path / "again", long_prompts="chunk")
    images = {sample["__key__"]: sample["png"] for sample in shards.read_samples(str(tmp_path / "whole" / "00000.tar"))}
    existing = {}
    for row, found in zip(again.manifest.rows(0, 4, 0), runs.rows_of(tmp_path / "whole"), strict=True):
        if row.number != 2:
            existing[row.number] = sample_records.sample_of(row, found, images[row.key])
    commit(again, existing=existing)
    assert runs.data_files(tmp_path / "again") == runs.data_files(tmp_path / "whole")


def test_rows_control_what_transfers(loaded: Worker, tmp_path: Path) -> None:
    """Range, weights and negative reference of a row are obeyed and recorded, and concern that row alone.

    Rows 0 to 6 would be the same image if they did not set anything; row 7 contradicts itself, row 8 the run.
    """
    pair = ["reference0.png", "reference1.png"]
    columns: dict[str, list[Any]] = {
        "prompt": ["same"] * 9,
        "seed": [5] * 9,
        "reference": [pair, pair, pair, pair, pair, pair, pair, pair, pair],
        "reference_weights": [None, [3.0, 1.0], [2.0, 2.0], None, None, None, None, None, [1.0, 1.0, 1.0]],
        "fusion_lo": [None, None, None, 0.6, 0.9, None, None, 0.7, None],
        "fusion_hi": [None, None, None, None, 1.0, 0.0, None, 0.2, None],
        "negative_reference": [None, None, None, None, None, None, "reference2.png", None, None],
    }
    manifest = runs.write_manifest(tmp_path / "in", 9, columns)
    commit(another(loaded, manifest, tmp_path / "out", fusion_hi=0.8, mark=False))
    rows = runs.rows_of(tmp_path / "out")
    assert [row["status"] for row in rows] == ["success"] * 7 + ["failed"] * 2
    assert [row["reference_weights"] for row in rows[:3]] == [[0.5, 0.5], [0.75, 0.25], [0.5, 0.5]]
    assert [(row["fusion_lo"], row["fusion_hi"]) for row in rows[3:6]] == [(0.6, 0.8), (0.9, 1.0), (0.0, 0.0)]
    assert [row["unconditional"] for row in rows[5:7]] == ["zeros", "negative"]
    assert [row["negative_reference"] for row in rows[5:7]] == [None, "reference2.png"]
    assert rows[7]["error_message"].startswith("fusion_lo is 0.7, above fusion_hi, which is 0.2")
    assert rows[8]["error_message"] == "reference_weights has 3 values for 2 references; give one for each"
    hashes = [row["sha256"] for row in rows]
    assert hashes[0] == hashes[2]
    assert len({hashes[0], hashes[1], hashes[3], hashes[4], hashes[6]}) == 5
    assert hashes[4] == hashes[5], "no step is in either range"
    sample = next(shards.read_samples(str(tmp_path / "out" / "00000.tar")))
    assert sample["json"]["reference_weights"] == [0.5, 0.5]


def test_rows_limit_their_references_by_roles_and_masks(loaded: Worker, tmp_path: Path) -> None:
    """Roles and masks of a row are obeyed and recorded, and concern that row alone; a bad one fails its row.

    Rows 0 and 1 would be the same image, had the second one no role; row 2 has the role of no limit.
    """
    (tmp_path / "in").mkdir()
    for name, brightness in (("white", 255), ("black", 0)):
        Image.new("L", (5, 3), brightness).save(tmp_path / "in" / f"{name}.png")
    one, pair = ["reference0.png"], ["reference0.png", "reference1.png"]
    columns: dict[str, list[Any]] = {
        "prompt": ["same"] * 10,
        "seed": [5] * 10,
        "reference": [one, one, one, one, one, pair, one, one, pair, one],
        "reference_roles": [None, ["layout"], ["all"], None, None, ["all", "layout"], ["shape"], None, ["all"], None],
        "reference_masks": [*[None] * 3, ["white.png"], ["black.png"], None, None, ["../black.png"], None, ["no.png"]],
        "strength": [*[None] * 9, 0.5],
    }
    manifest = runs.write_manifest(tmp_path / "in", 10, columns)
    commit(another(loaded, manifest, tmp_path / "out", steps=8, mark=False))
    rows = runs.rows_of(tmp_path / "out")
    errors = [row["error_message"] for row in rows]
    assert errors[:6] == [None] * 6
    assert errors[6] == "a role in reference_roles is 'shape'; it must be one of all, style, palette, layout"
    assert errors[7].startswith("reference_masks: reference '../black.png' lies outside the places")
    assert errors[8] == "reference_roles has 1 values for 2 references; give each one role, or null"
    assert errors[9] == "reference_masks: reference 'no.png' does not exist"
    assert [row["reference_roles"] for row in rows[:6]] == [None, ["layout"], None, None, None, ["all", "layout"]]
    assert [row["reference_masks"] for row in rows[2:5]] == [None, ["white.png"], ["black.png"]]
    hashes = [row["sha256"] for row in rows]
    assert hashes[0] == hashes[2] and len({*hashes[:6]}) >= 4
    sample = next(shards.read_samples(str(tmp_path / "out" / "00000.tar")))
    assert not {"reference_roles", "reference_masks"} & sample["json"].keys()


def test_a_run_without_limits_has_the_columns_of_before(loaded: Worker, tmp_path: Path) -> None:
    """Whoever names no role gets the columns, and so the bytes, of a version without roles."""
    manifest = runs.write_manifest(tmp_path / "in", 2)
    commit(another(loaded, manifest, tmp_path / "out"))
    assert not {"reference_roles", "reference_masks"} & runs.rows_of(tmp_path / "out")[0].keys()


def test_rows_are_optimised_as_they_ask(loaded: Worker, model: Path, tmp_path: Path) -> None:
    """PNO concerns the rows that ask for it and have a reference; the others' bytes stay."""
    columns: dict[str, list[Any]] = {"seed": [5] * 6, "pno_steps": [None, 0, 2, 2, 2, 1]}
    columns["reference"] = ["reference0.png", "reference0.png", "reference0.png", "gone.png", None, "reference1.png"]
    commit(load(runs.write_manifest(tmp_path / "in", 6, columns), tmp_path / "out", model, pno_steps=1))
    rows = runs.rows_of(tmp_path / "out")
    assert [row["status"] for row in rows] == ["success"] * 3 + ["failed"] + ["success"] * 2
    assert [row["pno_steps"] for row in rows] == [1, 0, 2, 2, 0, 1]
    course = [row["pno_objective"] for row in rows]
    assert [each and each["steps"] for each in course] == [1, None, 2, None, None, 1]
    assert all(each["best"] < each["first"] for each in course if each)
    sample = next(shards.read_samples(str(tmp_path / "out" / "00000.tar")))
    assert sample["json"]["pno_objective"] == course[0]

    del columns["pno_steps"]
    commit(another(loaded, runs.write_manifest(tmp_path / "in", 6, columns), tmp_path / "plain", batch_size=8))
    plain = runs.rows_of(tmp_path / "plain")
    same = [row["sha256"] == other["sha256"] for row, other in zip(rows, plain, strict=True)]
    assert same == [False, True, False, True, True, False], "a failed row has no hash"


def test_optimised_rows_reuse_no_deep_features(model: Path, tmp_path: Path) -> None:
    """Not even for their last image, which takes no gradient; and each row says what it was made with."""
    manifest = runs.write_manifest(tmp_path / "in", 4, {"pno_steps": [1, 0, 1, 0]})
    rows = {}
    for interval in (1, 3):
        output = tmp_path / str(interval)
        commit(load(manifest, output, model, pno_steps=1, steps=4, deep_cache=interval))
        rows[interval] = runs.rows_of(output)
    assert [row["deep_cache"] for row in rows[3]] == [1, 3, 1, 3]
    same = [row["sha256"] == other["sha256"] for row, other in zip(rows[1], rows[3], strict=True)]
    assert same == [True, False, True, False]
    assert all(row["pno_objective"]["best"] < row["pno_objective"]["first"] for row in rows[3][::2])


def test_the_judge_never_guides(model: Path, tmp_path: Path) -> None:
    """Enforced by the weights, under whatever name they come."""
    manifest = runs.write_manifest(tmp_path / "in", 1)
    copy = shutil.copytree(model / "judge", tmp_path / "copy")
    CLIPModel.from_pretrained(copy).half().save_pretrained(copy)
    with pytest.raises(ModelError, match="the PNO guide and the judge are the same CLIP"):
        load(manifest, tmp_path / "out", model, pno_steps=1, pno_guide=str(copy))
    load(manifest, tmp_path / "out", model, pno_guide=str(copy))  # guides nothing


def test_a_reference_of_other_bytes_fails_its_row_alone(loaded: Worker, tmp_path: Path) -> None:
    """A reference that is not the one that the manifest means fails that row alone, also where another row uses the
    same file without a hash; the others' images stay, and the hashes are repeated in the output."""
    folder = tmp_path / "in"
    names = [f"reference{n}.png" for n in range(3)]
    runs.write_manifest(folder, 4)
    right = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]

    def made(hashes: list[Any]) -> list[dict[str, Any]]:
        columns: dict[str, list[Any]] = {
            "reference": [[names[0]], [names[0]], [names[1], names[2]], [names[1], names[2]]],
            "reference_sha256": hashes,
        }
        commit(another(loaded, runs.write_manifest(folder, 4, columns), tmp_path / "out"))
        return runs.rows_of(tmp_path / "out")

    good = made([[right[0]], [None], right[1:], [None, right[2].upper()]])
    assert {row["status"] for row in good} == {"success"}
    wrong = "0" * 64
    rows = made([[wrong], [None], right[1:], [None, wrong]])
    assert [row["status"] for row in rows] == ["failed", "success", "success", "failed"]
    assert f"'reference0.png' has the SHA-256 {right[0]}, and the manifest says {wrong}" in rows[0]["error_message"]
    assert [row["sha256"] for row in rows[1:3]] == [row["sha256"] for row in good[1:3]]
    assert rows[2]["reference_sha256"] == right[1:]


def test_unreadable_negative_references_fail_their_rows_alone(loaded: Worker, tmp_path: Path) -> None:
    def hashes(negatives: list[str]) -> list[str | None]:
        manifest = runs.write_manifest(tmp_path / "in", 3, {"negative_reference": negatives})
        commit(another(loaded, manifest, tmp_path / "out"))
        return [row["sha256"] for row in runs.rows_of(tmp_path / "out")]

    good = hashes(["reference2.png"] * 3)
    assert hashes(["reference2.png", "gone.png", "reference2.png"]) == [good[0], None, good[2]]
    assert "gone.png" in runs.rows_of(tmp_path / "out")[1]["error_message"]


@pytest.mark.parametrize("choice", ["zeros", "blank"])
def test_a_run_chooses_image_tokens_and_the_unconditional_side(loaded: Worker, tmp_path: Path, choice: str) -> None:
    """What the settings say is what VCFPipeline does with them; text-only rows are the same under any."""
    options: dict[str, Any] = {"unconditional": choice, "image_tokens": "cls"}
    manifest = runs.write_manifest(tmp_path / "in", 2, {"reference": ["reference0.png", None], "seed": [1, 2]})
    commit(another(loaded, manifest, tmp_path / "out", batch_size=1, mark=False, **options))
    rows = runs.rows_of(tmp_path / "out")
    assert [(row["unconditional"], row["image_tokens"]) for row in rows] == [(choice, "cls")] * 2
    reference = Image.open(tmp_path / "in" / "reference0.png")
    for row, given, settings in zip(rows, [reference, None], [options, {}], strict=True):
        [picture] = loaded.components.pipeline.generate(
            [row["prompt"]], [given], seeds=[row["seed"]], guidance_scale=5.0, steps=4, **runs.SIZE, **settings
        )
        data = images.encode(images.from_unit(picture.permute(1, 2, 0).numpy()), "png")
        assert hashlib.sha256(data).hexdigest() == row["sha256"]


def test_several_references_are_scored_by_their_mean(loaded: Worker, tmp_path: Path) -> None:
    references = [["reference0.png"], ["reference1.png"], ["reference0.png", "reference1.png"], []]
    manifest = runs.write_manifest(tmp_path / "in", 4, {"reference": references})
    commit(another(loaded, manifest, tmp_path / "out"))
    rows = runs.rows_of(tmp_path / "out")
    assert [row["status"] for row in rows] == ["success"] * 4
    assert rows[2]["reference"] == ["reference0.png", "reference1.png"]
    assert rows[2]["clip_reference"] is not None
    assert rows[3]["clip_reference"] is None


def test_a_sample_that_is_not_finite_fails(loaded: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = loaded.components.pipeline.generate_from_tokens

    def broken(*args: Any, **settings: Any) -> torch.Tensor:
        pictures = generate(*args, **settings)
        pictures[0, 0, 0, 0] = float("nan")
        return pictures

    monkeypatch.setattr(loaded.components.pipeline, "generate_from_tokens", broken)
    commit(another(loaded, runs.write_manifest(tmp_path / "in", 3, {"reference": [None] * 3}), tmp_path / "out"))
    rows = runs.rows_of(tmp_path / "out")
    assert [row["status"] for row in rows] == ["failed", "success", "success"]
    assert "not finite" in rows[0]["error_message"]


def varied(folder: Path, rows: int = 24) -> Path:
    """A manifest whose rows 2, 9 and 10 have a prompt and a reference, the longest and the only ones of their kind."""
    for number in (2, 9, 10):
        folder.mkdir(exist_ok=True)
        (folder / f"own{number}.png").write_bytes(runs.png(number + 50))
    own = {2: "own2.png", 9: "own9.png", 10: "own10.png"}
    return runs.write_manifest(
        folder,
        rows,
        {
            "prompt": [f"{row} longer than any other" if row in own else f"a {row % 5}" for row in range(rows)],
            "reference": [own.get(row, None if row % 5 == 4 else f"reference{row % 3}.png") for row in range(rows)],
            "negative_prompt": ["dull" if row in own else None for row in range(rows)],
        },
    )


def test_a_row_with_a_verdict_fails_untouched_and_changes_no_other_row(loaded: Worker, tmp_path: Path) -> None:
    """What kills its worker is recorded, and the other rows get the bytes that they get beside it: rows that are not
    generated keep their slot as padding."""
    manifest = varied(tmp_path / "in")
    commit(another(loaded, manifest, tmp_path / "whole"))
    before = runs.rows_of(tmp_path / "whole")
    for number in (2, 9, 10):
        (tmp_path / "in" / f"own{number}.png").write_text("would fail its row, if it were read")
    subject = another(loaded, manifest, tmp_path / "out")
    commit(subject, verdicts={2: "kills its worker", **dict.fromkeys(range(8, 16), "hangs")})
    after = runs.rows_of(tmp_path / "out")
    generated = [number for number in range(24) if number != 2 and number not in range(8, 16)]
    assert [after[number] for number in generated] == [before[number] for number in generated]
    assert (after[2]["status"], after[2]["error_message"], after[2]["sha256"]) == ("failed", "kills its worker", None)
    assert after[2]["prompt"] == "2 longer than any other"
    assert after[2]["negative_prompt"] == "dull"
    assert {after[number]["error_message"] for number in range(8, 16)} == {"hangs"}
    keys = [sample["__key__"] for sample in shards.read_samples(str(tmp_path / "out" / "00000.tar"))]
    assert keys == [before[number]["key"] for number in generated]


def test_existing_samples_are_written_as_they_are(loaded: Worker, tmp_path: Path) -> None:
    """Rows of a shard can be generated again beside samples that are kept, byte for byte."""
    manifest = varied(tmp_path / "in")
    commit(another(loaded, manifest, tmp_path / "whole"))
    subject = another(loaded, manifest, tmp_path / "out")
    images = {sample["__key__"]: sample["png"] for sample in shards.read_samples(str(tmp_path / "whole" / "00000.tar"))}
    existing = {}
    for row, found in zip(subject.manifest.rows(0, 24, 0), runs.rows_of(tmp_path / "whole"), strict=True):
        if row.number not in (3, 11):
            existing[row.number] = sample_records.sample_of(row, found, images[row.key])
    commit(subject, existing=existing)
    assert runs.data_files(tmp_path / "out") == runs.data_files(tmp_path / "whole")


def test_a_trial_generates_the_selected_rows_and_leaves_nothing(
    loaded: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard is bisected in its own batches, and batches without a selected row are not sampled."""
    sampled: list[int] = []
    generate = loaded.components.pipeline.generate_from_tokens

    def sample(*args: Any, **settings: Any) -> torch.Tensor:
        sampled.append(len(settings["seeds"]))
        return generate(*args, **settings)

    monkeypatch.setattr(loaded.components.pipeline, "generate_from_tokens", sample)
    references = ["reference0.png"] * 12
    manifest = runs.write_manifest(tmp_path / "in", 12, {"reference": references})
    subject = another(loaded, manifest, tmp_path / "out")
    task = ShardTask(sharding.ShardPlan(12, 1000)[0], selected=frozenset({0, 3, 11}))
    assert subject.run(task, "trial") is None
    assert sampled == [4, 4]
    assert not (tmp_path / "out").exists()
    assert not subject.samples_done


class _Troubled(ReferenceReader):
    """Storage that fails for one name."""

    def read(self, reference: Reference) -> Any:
        if reference.uri == "reference1.png":
            raise StorageError("the storage is down")
        return super().read(reference)


def test_storage_trouble_fails_the_attempt_not_the_row(loaded: Worker, tmp_path: Path) -> None:
    """Trouble of storage, network or a node fails the attempt, never the row. Nothing is staged."""
    subject = another(loaded, runs.write_manifest(tmp_path / "in", 8), tmp_path / "out")
    with pytest.raises(StorageError, match="the storage is down"):
        commit(with_reader(subject, _Troubled))
    assert not (tmp_path / "out").exists()


def test_what_fails_on_the_last_attempt_too_is_the_rows(loaded: Worker, tmp_path: Path) -> None:
    """Only what repeats on a healthy worker marks a row: one dead reference does not keep a run from its end."""
    manifest = runs.write_manifest(tmp_path / "in", 8)
    commit(another(loaded, manifest, tmp_path / "whole"))
    receipt = commit(with_reader(another(loaded, manifest, tmp_path / "out"), _Troubled), 3, last_attempt=True)
    before, after = runs.rows_of(tmp_path / "whole"), runs.rows_of(tmp_path / "out")
    failed = [row for row in after if row["status"] == "failed"]
    assert receipt.counts["failed"] == len(failed) > 0
    assert {(row["reference"], row["error_message"]) for row in failed} == {("reference1.png", "the storage is down")}
    assert [row["sha256"] for row in after if row not in failed] == [
        row["sha256"] for row in before if row["reference"] != "reference1.png"
    ]


def test_a_finished_or_failed_shard_leaves_nothing_in_memory(loaded: Worker, tmp_path: Path) -> None:
    """Memory does not grow with the manifest."""
    subject = another(loaded, runs.write_manifest(tmp_path / "in", 4), tmp_path / "out")
    commit(subject)
    assert not subject.samples_done
    troubled = with_reader(subject, _Troubled)
    with pytest.raises(StorageError):
        commit(troubled)
    assert not troubled.samples_done


def test_an_input_is_encoded_once_per_shard(loaded: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text and reference tokens are computed once per distinct input."""
    texts: list[str] = []
    counts: list[int] = []
    encode, encode_references = StableDiffusion.encode, loaded.components.pipeline.encode_references

    def note_prompts(self: StableDiffusion, prompts: Sequence[str], *given: Any, **more: Any) -> list[EncodedText]:
        texts.extend(prompts)
        return encode(self, prompts, *given, **more)

    def note_references(pictures: Sequence[Any], image_tokens: str | None, **given: bool) -> torch.Tensor:
        counts.append(len(pictures))
        return encode_references(pictures, image_tokens, **given)

    monkeypatch.setattr(StableDiffusion, "encode", note_prompts)
    monkeypatch.setattr(loaded.components.pipeline, "encode_references", note_references)
    commit(another(loaded, runs.write_manifest(tmp_path / "in", 24), tmp_path / "out"))
    assert sorted(texts) == sorted(["", *runs.PROMPTS])
    assert sum(counts) == 3


def test_pictures_that_do_not_fit_are_read_again(
    loaded: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory does not grow with the shard: decoded references are dropped, at the same bytes."""
    manifest = runs.write_manifest(tmp_path / "in", 24)
    commit(another(loaded, manifest, tmp_path / "kept"))
    monkeypatch.setattr(shard_references, "PICTURE_BYTES", 0)
    commit(another(loaded, manifest, tmp_path / "dropped", batch_size=4))
    assert runs.data_files(tmp_path / "kept") == runs.data_files(tmp_path / "dropped")


def test_reading_and_scoring_happen_beside_sampling(
    loaded: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU never waits: later references are read and squashed, and earlier batches scored, beside the sampling."""
    second_read, second_sampled = threading.Event(), threading.Event()
    sampled: list[int] = []

    generate, score = loaded.components.pipeline.generate_from_tokens, Scorer.score
    squash = loaded.components.pipeline.squash

    def squashed(image: Image.Image, **given: bool) -> Image.Image:
        assert threading.current_thread() is not threading.main_thread()
        if image.tobytes() == second.tobytes():
            second_read.set()
        return squash(image, **given)

    def sample(*args: Any, **settings: Any) -> torch.Tensor:
        sampled.append(len(sampled))
        if len(sampled) == 1:
            assert second_read.wait(30), "the second batch's reference is not read while the first is sampled"
        else:
            second_sampled.set()
        return generate(*args, **settings)

    def scored(*args: Any) -> Any:
        assert second_sampled.wait(30), "sampling waits for scores"
        return score(*args)

    monkeypatch.setattr(loaded.components.pipeline, "generate_from_tokens", sample)
    monkeypatch.setattr(loaded.components.pipeline, "squash", squashed)
    monkeypatch.setattr(Scorer, "score", scored)
    references = ["reference0.png"] * 2 + ["reference1.png"] * 2
    manifest = runs.write_manifest(tmp_path / "in", 4, {"reference": references})
    second = Image.open(tmp_path / "in" / "reference1.png").convert("RGB")
    commit(another(loaded, manifest, tmp_path / "out", batch_size=2))
    assert sampled == [0, 1]


def test_two_shards_of_a_worker_overlap_at_the_same_bytes(
    loaded: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU never waits between shards: while one is sampled, and it alone, the next one's references are read, and
    the last one's samples are scored and staged."""
    first, second = (sharding.ShardPlan(8, 4)[index] for index in range(2))
    names = ["reference0.png"] * 4 + ["reference1.png"] * 4
    manifest = runs.write_manifest(tmp_path / "in", 8, {"reference": names})
    apart = another(loaded, manifest, tmp_path / "apart")
    for shard in (first, second):
        commits.commit(str(tmp_path / "apart"), *runs.stage(apart, ShardTask(shard), f"attempt-{shard.name}"))

    first_samples, second_reads, second_samples = threading.Event(), threading.Event(), threading.Event()
    generate, read, stage = loaded.components.pipeline.generate_from_tokens, ReferenceReader.read, commits.stage

    def sampled(*args: Any, **settings: Any) -> torch.Tensor:
        if first_samples.is_set():
            second_samples.set()
        else:
            first_samples.set()
            assert second_reads.wait(30), "the next shard's references are not read while this one is sampled"
            assert not second_samples.is_set(), "both are sampled at once"
        return generate(*args, **settings)

    def seen(self: ReferenceReader, reference: Reference) -> Any:
        if reference.uri == "reference1.png":
            second_reads.set()
        return read(self, reference)

    def staged(files: shards.ShardFiles, output: str, shard: Shard, *rest: Any) -> dict[str, str]:
        assert shard == second or second_samples.wait(30), "the next shard waits until this one is staged"
        return stage(files, output, shard, *rest)

    monkeypatch.setattr(loaded.components.pipeline, "generate_from_tokens", sampled)
    monkeypatch.setattr(ReferenceReader, "read", seen)
    monkeypatch.setattr(commits, "stage", staged)
    together = another(loaded, manifest, tmp_path / "together")
    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(runs.stage, together, ShardTask(first), "one")
        assert first_samples.wait(30)
        two = threads.submit(runs.stage, together, ShardTask(second), "two")
        for each in (one, two):
            commits.commit(str(tmp_path / "together"), *each.result())
    assert runs.data_files(tmp_path / "together") == runs.data_files(tmp_path / "apart")


def test_a_node_without_the_gpu_that_a_run_asks_for_says_so(loaded: Worker) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(NodeError, match="--gpus-per-worker 0"):
        Device.set_up(loaded.components.config.replace(gpus_per_worker=1.0))


@pytest.mark.parametrize(
    ("failure", "expected"), [(OSError(errno.ESTALE, "Stale file handle"), StorageError), (MemoryError(), MemoryError)]
)
def test_a_machine_that_cannot_read_a_model_is_not_the_models_fault(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, expected: type[Exception]
) -> None:
    """Trouble of storage or a node fails the attempt, not the run."""

    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(VCFPipeline, "from_pretrained", fail)
    with pytest.raises(expected):
        load(runs.write_manifest(tmp_path / "in", 1), tmp_path / "out", model)
