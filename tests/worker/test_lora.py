"""Runs with LoRAs, for all rows and by row, on the tiny Stable Diffusion 1.5 in its published layout."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from support import loras, runs, sd_layouts
from support.scorers import save_clip
from vcf_batch.cli import main
from vcf_batch.errors import ModelError, StorageError, UsageError
from vcf_batch.manifest.references import LoraReader
from vcf_batch.output.kept_samples import KeptSamples
from vcf_batch.records import Lora, Reference
from vcf_batch.setup.shard_task import ShardTask
from vcf_batch.vcf.pipeline import VCFPipeline
from vcf_batch.worker.lora import shelf
from vcf_batch.worker.worker import Worker

pytestmark = pytest.mark.usefixtures("restored_torch")

OPTIONS: dict[str, Any] = {"steps": 2, "batch_size": 4, "shard_size": 8, "lpips": "none"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sd15"
    sd_layouts.save_sd15(folder)
    save_clip(folder / "judge")
    return folder


@pytest.fixture(scope="module")
def files(model: Path) -> Path:
    """A folder with four LoRAs of attention, one of the text encoder alone, and one for Stable Diffusion XL."""
    folder, pipeline = model.parent / "loras", VCFPipeline.from_pretrained(str(model))
    assert len([*loras.names_of(folder, pipeline, 4)]) == 4
    loras.save_kohya(folder / "text.safetensors", pipeline, loras.updates(pipeline, loras.TEXT, seed=9))
    xl = VCFPipeline.from_pretrained(str(sd_layouts.save_sdxl(model.parent / "sdxl")))
    loras.save_kohya(folder / "xl.safetensors", xl, loras.updates(xl, loras.UNET, seed=9))
    return folder


def manifest_of(folder: Path, files: Path, values: list[Any], **columns: list[Any]) -> Path:
    """A manifest of rows without references, with the LoRAs beside it."""
    shutil.copytree(files, folder / "in", dirs_exist_ok=True)
    given = {"reference": [None] * len(values), "lora": values} | columns
    return runs.write_manifest(folder / "in", len(values), given)


def hash_of(files: Path, name: str) -> str:
    return hashlib.sha256((files / name).read_bytes()).hexdigest()


def test_rows_have_their_own_loras_or_those_of_the_run(model: Path, files: Path, tmp_path: Path) -> None:
    """By file or by name, with scale and hash in their columns; an empty text is none."""
    values = [None, "lora1.safetensors", "lora1.safetensors:0.5", "", "ink:2", None, "wood", "lora1.safetensors:0.50"]
    manifest = manifest_of(tmp_path, files, values, prompt=["a red star"] * 8, seed=[7] * 8)
    run = [f"ink={files}/lora0.safetensors:0.5", f"wood={files}/lora2.safetensors"]
    output = runs.generate(manifest, tmp_path / "out", model, **OPTIONS, lora=run)
    rows = runs.rows_of(output)
    assert [row["error_message"] for row in rows] == [None] * 8
    ink, wood, one = (hash_of(files, f"lora{number}.safetensors") for number in (0, 2, 1))
    expected = [
        (["ink:0.5", "wood:1"], [ink, wood]),
        (["lora1.safetensors:1"], [one]),
        (["lora1.safetensors:0.5"], [one]),
        (None, None),
        (["ink:2"], [ink]),
        (["ink:0.5", "wood:1"], [ink, wood]),
        (["wood:1"], [wood]),
        (["lora1.safetensors:0.5"], [one]),
    ]
    assert [(row["lora"], row["lora_sha256"]) for row in rows] == expected
    told = {str(row["lora"]): row["sha256"] for row in rows}
    assert len({*told.values()}) == 6
    assert [row["sha256"] for row in rows] != [rows[0]["sha256"]] * 8
    result = CliRunner().invoke(main, ["verify", str(output), "--regenerate", "8"])
    assert result.exit_code == 0, result.output


def test_a_run_without_loras_has_neither_the_columns_nor_another_fingerprint(
    model: Path, files: Path, tmp_path: Path
) -> None:
    manifest = runs.write_manifest(tmp_path / "in", 2, {"reference": [None] * 2})
    job = runs.settled(manifest, tmp_path / "out", model, **OPTIONS)
    assert not any("lora" in name for name in job.fields)
    assert "lora" not in runs.rows_of(runs.generate(manifest, tmp_path / "out", model, **OPTIONS))[0]
    ids = [
        runs.settled(manifest, tmp_path / "out", model, **OPTIONS, lora=[text]).fields["lora_id"]
        for text in (
            f"ink={files}/lora0.safetensors",
            f"ink={files}/lora0.safetensors:0.5",
            f"ink={files}/lora1.safetensors",
            f"wood={files}/lora0.safetensors",
        )
    ]
    assert len({*ids}) == 4


def test_rows_without_a_lora_have_the_images_of_a_run_without_any(model: Path, files: Path, tmp_path: Path) -> None:
    """Between batches with LoRAs of UNet and text encoder, with the same prompts."""
    prompts = ["a red star", "a blue ring", "a red star", "a green disc"]
    plain = runs.write_manifest(
        tmp_path / "plain", 4, {"reference": [None] * 4, "prompt": prompts, "seed": [*range(4)]}
    )
    options = OPTIONS | {"mark": False, "shard_size": 16}
    alone = runs.rows_of(runs.generate(plain, tmp_path / "alone", model, **options))
    values = ["lora0.safetensors"] * 4 + [""] * 4 + ["text.safetensors"] * 4 + [""] * 4
    manifest = manifest_of(tmp_path, files, values, prompt=prompts * 4, seed=[*range(4)] * 4)
    mixed = runs.rows_of(runs.generate(manifest, tmp_path / "mixed", model, **options))
    hashes, expected = ([row["sha256"] for row in rows] for rows in (mixed, alone))
    assert hashes[4:8] == hashes[12:] == expected
    assert all(one != other for start in (0, 8) for one, other in zip(hashes[start:], expected, strict=False))


def test_a_prompt_is_encoded_for_each_lora_of_the_text_encoder(model: Path, files: Path, tmp_path: Path) -> None:
    """A row's image does not depend on which rows have shared its prompt before."""
    both = manifest_of(tmp_path / "both", files, ["", "text.safetensors", "text.safetensors:0.5"], prompt=["a"] * 3)
    drawn = runs.rows_of(runs.generate(both, tmp_path / "out", model, **OPTIONS | {"batch_size": 1}))
    for number, value in enumerate(["", "text.safetensors", "text.safetensors:0.5"]):
        single = manifest_of(tmp_path / str(number), files, [value], prompt=["a"], sample_id=[f"{number:09d}"])
        alone = runs.rows_of(runs.generate(single, tmp_path / f"out{number}", model, **OPTIONS | {"batch_size": 1}))
        assert alone[0]["sha256"] == drawn[number]["sha256"]
    assert len({row["sha256"] for row in drawn}) == 3


def test_a_lora_that_cannot_be_used_fails_its_rows_alone(model: Path, files: Path, tmp_path: Path) -> None:
    """Missing, for another base, no safetensors, elsewhere, a pickle, a name that the run lacks, a scale too large."""
    values = [
        "lora0.safetensors",
        "missing.safetensors",
        "xl.safetensors",
        "broken.safetensors",
        "/etc/a.safetensors",
        "a.pt",
        "ink",
        "lora0.safetensors:11",
        "lora1.safetensors",
        ["lora1.safetensors", "missing.safetensors"],
    ]
    manifest = manifest_of(tmp_path, files, [value if isinstance(value, list) else [value] for value in values])
    (manifest.parent / "broken.safetensors").write_bytes(b"PK\x03\x04 a zip file")
    rows = runs.rows_of(runs.generate(manifest, tmp_path / "out", model, **OPTIONS))
    assert [row["status"] for row in rows] == ["success", *["failed"] * 7, "success", "failed"]
    for row, reason in zip(
        rows[1:8],
        [
            "LoRA 'missing.safetensors' does not exist",
            "LoRA 'xl.safetensors' was trained for a base with text tokens of width 64, and this model's have width 24",
            "LoRA 'broken.safetensors' is damaged or no safetensors file",
            "LoRA '/etc/a.safetensors' lies outside the places that LoRAs may come from",
            "lora is 'a.pt', which is no .safetensors file",
            "lora is 'ink', which is no .safetensors file and no LoRA of the run; the run names none with --lora",
            "the scale of lora 'lora0.safetensors:11' is '11'; it must be a number between -10 and 10",
        ],
        strict=True,
    ):
        assert row["error_message"].startswith(reason) and row["lora_sha256"] is None


@pytest.mark.parametrize(
    ("lora", "error", "reason"),
    [
        ("ink={files}/missing.safetensors", ModelError, "LoRA ink cannot be used: .*missing.safetensors"),
        ("ink={files}/xl.safetensors", ModelError, "LoRA ink was trained for a base with text tokens of width 64"),
        ("ink={files}/broken.safetensors", ModelError, "LoRA ink is damaged or no safetensors file"),
        ("ink={files}/a.pt", UsageError, "which is no .safetensors file: .* convert a pickle"),
        ("ink={files}/odd.safetensors", ModelError, "LoRA ink is no LoRA: it has tensors such as"),
    ],
)
def test_a_lora_of_the_run_that_cannot_be_used_refuses_it(
    model: Path, files: Path, tmp_path: Path, lora: str, error: type[Exception], reason: str
) -> None:
    """Before a worker starts, from the file's header."""
    manifest = manifest_of(tmp_path, files, ["", ""])
    (manifest.parent / "broken.safetensors").write_bytes(b"PK\x03\x04 a zip file")
    shutil.copy(model / "unet" / "diffusion_pytorch_model.safetensors", manifest.parent / "odd.safetensors")
    with pytest.raises(error, match=reason):
        runs.settled(manifest, tmp_path / "out", model, lora=[lora.format(files=manifest.parent)])


def loaded_with(model: Path, files: Path, folder: Path, values: list[Any]) -> Worker:
    return runs.load(manifest_of(folder, files, values), folder / "out", model, **OPTIONS)


def test_a_lora_is_read_once_per_worker(model: Path, files: Path, tmp_path: Path) -> None:
    """By all batches and shards, though rows have different ones by turns."""
    values = ["lora0.safetensors", "lora1.safetensors:0.5", "lora1.safetensors", ""] * 6
    subject = loaded_with(model, files, tmp_path, values)
    for shard in runs.settled(tmp_path / "in" / "manifest.parquet", tmp_path / "out", model, **OPTIONS).shards:
        runs.stage(subject, ShardTask(shard), shard.name)
    held = subject.components.loras
    assert held and held.loads == 2
    assert {*held.resident} == {"lora0.safetensors", "lora1.safetensors"}


def test_the_least_recently_used_lora_is_dropped(
    model: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = loaded_with(model, files, tmp_path, [""]).components.loras
    assert held
    monkeypatch.setattr(shelf, "RESIDENT", 2)

    def use(number: int) -> None:
        assert held.ask(Lora(f"lora{number}.safetensors", 1.0)).result().updates

    for number in (0, 1, 0, 2):
        use(number)
    assert held.resident == ["lora0.safetensors", "lora2.safetensors"] and held.loads == 3
    use(1)
    assert held.resident == ["lora2.safetensors", "lora1.safetensors"] and held.loads == 4
    monkeypatch.setattr(shelf, "RESIDENT_BYTES", 1)
    use(2)
    assert held.resident == ["lora2.safetensors"] and held.loads == 4


def test_more_loras_than_a_worker_holds_give_the_same_bytes(
    model: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [f"lora{number % 4}.safetensors" for number in range(16)]
    manifest = manifest_of(tmp_path, files, values)
    whole = runs.data_files(runs.generate(manifest, tmp_path / "whole", model, **OPTIONS))
    monkeypatch.setattr(shelf, "RESIDENT", 1)
    assert runs.data_files(runs.generate(manifest, tmp_path / "tight", model, **OPTIONS)) == whole


def test_a_repaired_row_has_the_bytes_of_an_undisturbed_run_with_loras(
    model: Path, files: Path, tmp_path: Path
) -> None:
    subject = loaded_with(
        model, files, tmp_path, ["lora0.safetensors", "", "text.safetensors", "lora1.safetensors"] * 2
    )
    runs.commit(subject)
    whole = runs.data_files(tmp_path / "out")
    job = runs.settled(tmp_path / "in" / "manifest.parquet", tmp_path / "out", model, **OPTIONS)
    for redo in ([0, 1, 0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]):
        runs.commit(subject, 2, KeptSamples(job.config, job.manifest, job.shards[0], bytes(redo)))
        assert runs.data_files(tmp_path / "out") == whole


def test_gates_draw_again_with_the_lora_of_the_row(model: Path, files: Path, tmp_path: Path) -> None:
    """Other batches are sampled before the next draw of a row."""
    values = ["lora0.safetensors", "lora0.safetensors", "text.safetensors", ""]
    given = {**OPTIONS, "batch_size": 1, "attempts": 3, "min_clip_score": 1.0}
    rows = runs.rows_of(runs.generate(manifest_of(tmp_path, files, values), tmp_path / "out", model, **given))
    for number, value in enumerate(values):
        prompt = runs.PROMPTS[number % len(runs.PROMPTS)]
        single = manifest_of(tmp_path / str(number), files, [value], sample_id=[f"{number:09d}"], prompt=[prompt])
        alone = runs.rows_of(runs.generate(single, tmp_path / f"out{number}", model, **given))
        assert alone[0]["attempts"] == rows[number]["attempts"] and len(rows[number]["attempts"]) == 3


class _TroubledLoras(LoraReader):
    """Storage that fails for one name."""

    def read_bytes(self, reference: Reference) -> bytes:
        if reference.uri == "lora1.safetensors":
            raise StorageError("the storage is down")
        return super().read_bytes(reference)


def test_trouble_of_storage_with_a_lora_fails_the_attempt_and_at_last_the_rows(
    model: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vcf_batch.worker.worker.LoraReader", _TroubledLoras)
    subject = loaded_with(model, files, tmp_path, ["lora0.safetensors", "lora1.safetensors"] * 2)
    with pytest.raises(StorageError, match="the storage is down"):
        runs.commit(subject)
    runs.commit(subject, 3, last_attempt=True)
    rows = runs.rows_of(tmp_path / "out")
    assert [row["error_message"] for row in rows] == [None, "the storage is down"] * 2
