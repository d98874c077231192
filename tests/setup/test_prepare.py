"""What the driver settles before a worker starts."""

import dataclasses
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import runs
from vcf_batch import sharding, storage
from vcf_batch.config import RunConfig
from vcf_batch.errors import ModelError, RefusedError, StorageError, UsageError
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.models.resolution import ResolvedModel
from vcf_batch.output import lease, run_file
from vcf_batch.output.output import Output
from vcf_batch.setup import claim, defaults, manifest_check, paths, run_models, storage_check
from vcf_batch.setup.job import Job
from vcf_batch.setup.run_models import Models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def settle(model: Path, tmp_path: Path) -> Callable[..., Job]:
    manifest = runs.write_manifest(tmp_path / "in", 40)

    def build(**options: Any) -> Job:
        settings = {
            "manifest": str(manifest),
            "output": str(tmp_path / "out"),
            "model": str(model),
            "gpus_per_worker": 0,
        }
        config = paths.absolute(RunConfig(**{**settings, **runs.SIZE, **options}))
        found = run_file.read(config.output)
        config = claim.resume(config, found)
        return defaults.settle(config, manifest_check.open_checked(config, found), run_models.resolve(config))

    return build


def test_every_default_gets_a_value(settle: Callable[..., Job]) -> None:
    config = settle().config
    assert (config.steps, config.guidance_scale, config.dtype) == (4, 5.0, "float32")
    assert config.shard_size == 16
    assert settle(gpus_per_worker=1).config.dtype == "bfloat16"


def test_the_models_own_size_is_the_default(settle: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vcf_batch.config.MIN_EDGE", 8)
    config = settle(height=None, width=None).config
    assert (config.height, config.width) == (16, 16)


def test_the_models_own_judge_is_the_default(settle: Callable[..., Job]) -> None:
    job = settle()
    assert job.models.judge is None
    assert job.fields["judge_id"] == f"{job.fields['model_id']}/judge"
    assert job.models.lpips == "none"  # the model brings no probe


def test_places_and_workers_are_not_content(settle: Callable[..., Job], tmp_path: Path) -> None:
    """The fingerprint covers what changes content or layout, not workers, address or progress."""
    job = settle()
    moved = settle(output=str(tmp_path / "other"), num_workers=3, max_failed=0.5, address="auto")
    assert moved.fingerprint == job.fingerprint
    changes: tuple[dict[str, Any], ...] = (
        {"seed": 1},
        {"batch_size": 4},
        {"shard_size": 8},
        {"dtype": "bfloat16"},
        {"image_format": "webp"},
        {"reference_root": ("s3://bucket",)},
    )
    for change in changes:
        assert settle(**change).fingerprint != job.fingerprint
    roots = ("s3://bucket", "s3://other")
    assert settle(reference_root=roots).fingerprint == settle(reference_root=roots[::-1]).fingerprint


def test_threads_matter_on_cpus_alone(settle: Callable[..., Job]) -> None:
    """CPU workers run a fixed number of threads (sums depend on it)."""
    assert settle(cpus_per_worker=2).fingerprint != settle().fingerprint
    on_gpu = [settle(gpus_per_worker=1, cpus_per_worker=count, shard_size=8).fingerprint for count in (1, 4)]
    assert on_gpu[0] == on_gpu[1]


def test_a_model_that_is_no_pipeline_is_refused(settle: Callable[..., Job], model: Path) -> None:
    with pytest.raises(ModelError, match=r"model_index\.json"):
        settle(model=str(model / "judge"), judge=str(model / "judge"))


@given(
    num_rows=st.integers(1, 10**8),
    batch_size=st.integers(1, 256),
    seconds=st.floats(1e-4, 1e5),
)
def test_default_shards_are_small_enough(num_rows: int, batch_size: int, seconds: float) -> None:
    """The default shard takes a worker ten minutes at most, and 1,000 rows at most."""
    size = sharding.default_shard_size(num_rows, batch_size, seconds)
    assert 1 <= size <= sharding.MAX_SHARD_ROWS
    assert size == 1 or size * seconds <= sharding.SHARD_SECONDS
    assert size < batch_size or size % batch_size == 0


def commit_a_shard(job: Job) -> None:
    (Path(job.config.output) / "00000_stats.json").write_text("{}")


def test_a_resumed_run_keeps_what_the_cluster_settled(settle: Callable[..., Job]) -> None:
    """Rerunning the same command is the resume, whatever nodes happen to be up."""
    job = settle(shard_size=24, gpus_per_worker=1, batch_size=4)
    claim.claim(job)
    assert settle(gpus_per_worker=None).config.gpus_per_worker is None  # nothing is there yet to be resumed
    commit_a_shard(job)
    resumed = settle(gpus_per_worker=None, batch_size=None)
    assert resumed.config.batch_size == 4, "auto is what it was"
    assert (resumed.config.shard_size, resumed.config.gpus_per_worker, resumed.config.dtype) == (24, 1.0, "bfloat16")
    assert resumed.fingerprint == job.fingerprint
    assert settle(shard_size=8).config.shard_size == 8


def test_the_output_names_its_run(settle: Callable[..., Job], tmp_path: Path) -> None:
    job = settle()
    claim.claim(job)
    claim.claim(job)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["fingerprint"] == job.fingerprint
    assert record["shards"] == 3


def test_the_run_file_names_the_model_of_each_score(settle: Callable[..., Job], tmp_path: Path) -> None:
    """Scores, each with the model's name in run.json."""
    claim.claim(settle())
    named = json.loads((tmp_path / "out" / "run.json").read_text())["models"]
    assert named["clip_score"]["name"] == named["clip_reference"]["name"] == f"{named['model']['name']}/judge"
    assert named["lpips"] is None and named["pno_guide"] is None
    model, guide = ResolvedModel("m", "hub", "m", "0" * 40), ResolvedModel("g", "hub", "g", "1" * 40)
    described = Models(model, model, "alex", "1" * 64, "weights", guide).describe(guided=True)
    assert described["lpips"]["name"] == "lpips-alex"
    assert described["pno_guide"] == {"name": "g", "identity": "1" * 40}


def test_the_guide_is_part_of_the_run_where_something_is_guided(settle: Callable[..., Job], model: Path) -> None:
    assert settle().fields["pno_guide_id"] is None
    own, named = settle(pno_steps=1), settle(pno_steps=1, pno_guide=str(model / "judge"))
    assert own.fields["pno_guide_id"] == f"{own.models.pipeline.identity}/image_encoder"
    assert named.models.pno_guide and named.fields["pno_guide_id"] == named.models.pno_guide.identity


def test_a_guide_that_cannot_be_is_refused_before_a_model_loads(
    settle: Callable[..., Job], model: Path, tmp_path: Path
) -> None:
    judge = str(model / "judge")
    with pytest.raises(UsageError, match=r"both the PNO guide and the judge.*--pno-guide.*--judge"):
        settle(pno_steps=1, pno_guide=judge, judge=judge)
    settle(pno_guide=judge, judge=judge)
    text_only = runs.write_manifest(tmp_path / "text", 2, {"reference": [None, None]})
    with pytest.raises(UsageError, match="pno_steps is 3, but the manifest has no references to follow"):
        settle(manifest=str(text_only), pno_steps=3)
    rows = runs.write_manifest(tmp_path / "rows", 2, {"pno_steps": [None, 2]})
    assert settle(manifest=str(rows), output=str(tmp_path / "b")).guided
    plain = shutil.copytree(model, tmp_path / "plain")
    index = plain / "model_index.json"
    index.write_text(index.read_text().replace("CLIPVisionModelWithProjection", "CLIPVisionModel"))
    with pytest.raises(ModelError, match=r"is a CLIPVisionModel, .* name a PNO guide with --pno-guide"):
        settle(model=str(plain), pno_steps=1)
    settle(model=str(plain), pno_steps=1, pno_guide=str(model / "image_encoder"), output=str(tmp_path / "c"))


def test_credentials_stay_out_of_the_run_file(settle: Callable[..., Job], tmp_path: Path) -> None:
    roots = ["https://host/a?token=secret", "memory://user:secret@bucket/a"]
    claim.claim(settle(reference_root=tuple(roots), negative_prompt='see "https://host/?sig=secret" \\ \n'))
    text = (tmp_path / "out" / "run.json").read_text()
    config = json.loads(text)["config"]
    assert config["reference_root"] == ["https://host/a?...", "memory://bucket/a"]
    assert config["negative_prompt"] == 'see "https://host/?..." \\ \n'
    assert "token=secret" not in text
    assert "user:secret" not in text


def test_an_output_without_a_shard_takes_other_settings(settle: Callable[..., Job], tmp_path: Path) -> None:
    """A mistaken option costs no output: run.json binds from the first finished shard on."""
    claim.claim(settle(steps=5))
    job = settle()
    claim.claim(job)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["fingerprint"] == job.fingerprint


def test_another_run_is_refused_with_both_values(settle: Callable[..., Job]) -> None:
    """A different fingerprint in the same output is refused with both values shown."""
    job = settle(negative_prompt="fog")
    claim.claim(job)
    commit_a_shard(job)
    with pytest.raises(RefusedError, match=r'negative_prompt: "fog" there, "rain" now\n  seed: 0 there, 3 now\n'):
        claim.claim(settle(negative_prompt="rain", seed=3))


def test_appended_rows_keep_the_shards_that_are_there(settle: Callable[..., Job], tmp_path: Path) -> None:
    """Extending a run by appending manifest rows is possible where shards stay the same, else refused."""
    folder = tmp_path / "many"
    runs.write_manifest(folder, 8).rename(folder / "1.parquet")
    first = settle(manifest=str(folder), shard_size=4)
    claim.claim(first)
    commit_a_shard(first)
    runs.write_manifest(folder, 6).rename(folder / "2.parquet")
    second = settle(manifest=str(folder), shard_size=4)
    for _ in range(2):
        assert claim.claim(second) == (first.fingerprint,)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["fingerprint"], record["manifest"]["rows"], record["shards"]) == (second.fingerprint, 14, 4)
    runs.write_manifest(folder, 1).rename(folder / "3.parquet")
    with pytest.raises(RefusedError, match=r"manifest_id: (.|\n)*last shard, 00003 with 2 rows"):
        claim.claim(settle(manifest=str(folder), shard_size=4))
    with pytest.raises(RefusedError, match=r"manifest_id: (.|\n)*seed: 0 there, 1 now\nUse another output"):
        claim.claim(settle(manifest=str(folder), shard_size=4, seed=1))


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"fields": {"seed": 1}, "fingerprint": "0"}'])
def test_a_damaged_run_file_is_refused(settle: Callable[..., Job], tmp_path: Path, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(content)
    with pytest.raises(RefusedError, match="damaged"):
        settle()


def test_an_output_of_another_layout_is_refused_and_not_called_damaged(
    settle: Callable[..., Job], tmp_path: Path
) -> None:
    claim.claim(settle())
    file = tmp_path / "out" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layout": 0}))
    for read in (settle, lambda: Output.open(str(tmp_path / "out"))):
        with pytest.raises(RefusedError, match="has layout 0, and this version of vcf-batch reads layout 2: use"):
            read()


@pytest.mark.parametrize("name", ["00000_stats.json", "00000.tar", "00017.parquet"])
def test_shards_without_a_run_file_are_refused(settle: Callable[..., Job], tmp_path: Path, name: str) -> None:
    """Files of somebody else are neither deleted nor overwritten."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(RefusedError, match=r"no run\.json"):
        claim.claim(settle())


def test_ids_are_not_checked_again_on_a_resume(settle: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniqueness is not rechecked on a resume of the same manifest."""
    claim.claim(settle())
    monkeypatch.setattr(Manifest, "check", pytest.fail)
    settle()


@pytest.mark.parametrize("folder", ["working_dir_files/_ray_pkg_0123456789abcdef", "working_dir_files/unpacked"])
def test_an_output_in_a_jobs_copy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """Inside a submitted job, where the working directory is a temporary copy, a relative output is refused."""
    copy = tmp_path / folder
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(UsageError, match="temporary copy"):
        paths.absolute(RunConfig(manifest="in.parquet", output="out"))
    config = paths.absolute(RunConfig(manifest="in.parquet", output=str(tmp_path)))
    assert config.manifest == str(copy / "in.parquet")
    assert paths.absolute(RunConfig(manifest="in.parquet", output="s3://bucket/out")).output == "s3://bucket/out"


def test_a_node_that_does_not_see_the_output_is_refused(settle: Callable[..., Job], tmp_path: Path) -> None:
    """Every node proves that it sees the same storage: it reads the lease that the driver wrote."""
    job = settle()
    with lease.hold(job.config.output) as held:
        job = dataclasses.replace(job, token=held.token)
        storage_check.check_storage(job)
        elsewhere = dataclasses.replace(job, config=job.config.replace(output=str(tmp_path / "elsewhere")))
        with pytest.raises(UsageError, match="does not see the output"):
            storage_check.check_storage(elsewhere)
        (tmp_path / "in" / "manifest.parquet").unlink()
        with pytest.raises(UsageError, match="does not see the manifest"):
            storage_check.check_storage(job)


def test_a_node_that_does_not_see_a_reference_root_is_refused(
    settle: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is mounted on the driver alone is noticed before a row fails for it."""
    mounted, gone, web = tmp_path / "mounted", tmp_path / "gone", "https://host.invalid/images"
    mounted.mkdir()
    job = settle(reference_root=(str(mounted), str(gone), web))
    with lease.hold(job.config.output) as held:
        job = dataclasses.replace(job, token=held.token)
        assert job.roots == (str(mounted),)
        storage_check.check_storage(job)
        mounted.rmdir()
        with pytest.raises(
            UsageError, match=rf"node {socket.gethostname()} does not see the --reference-root {mounted}"
        ):
            storage_check.check_storage(job)

        def refuse(url: str, limit: int) -> bytes:
            raise PermissionError(13, "refused", url)

        monkeypatch.setattr(storage, "read_bytes", refuse)
        with pytest.raises(StorageError, match=rf"node {socket.gethostname()} may not look at the output"):
            storage_check.check_storage(job)


def test_image_tokens_default_to_the_aligners(settle: Callable[..., Job]) -> None:
    """None and the aligner's own choice are the same run."""
    assert settle().config.image_tokens == "all"
    assert settle(image_tokens="all").fingerprint == settle().fingerprint != settle(image_tokens="cls").fingerprint


def test_asking_for_negative_references_needs_some(settle: Callable[..., Job]) -> None:
    with pytest.raises(UsageError, match=r"no negative references: .*'negative_reference', or choose zeros or blank"):
        settle(unconditional="negative")


def test_references_need_a_model_that_takes_them(settle: Callable[..., Job], model: Path, tmp_path: Path) -> None:
    """A model without an aligner is refused before anything starts, if any row has a reference."""
    plain = shutil.copytree(model, tmp_path / "plain")
    index = json.loads((plain / "model_index.json").read_text())
    (plain / "model_index.json").write_text(json.dumps(index | {"aligner": [None, None]}))
    with pytest.raises(ModelError, match=r"plain has no aligner, (.|\n)*remove the column 'reference'"):
        settle(model=str(plain))
    text_only = runs.write_manifest(tmp_path / "text", 3, {"reference": [None] * 3})
    settle(model=str(plain), manifest=str(text_only))


def test_a_refusal_of_the_output_is_a_storage_error(
    settle: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = settle()
    claim.claim(job)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "refused; check credentials and permissions")

    monkeypatch.setattr(storage, "read_bytes", refuse)
    with pytest.raises(StorageError, match="check credentials and permissions"):
        claim.claim(job)
    monkeypatch.setattr(storage, "list_files", refuse)
    with pytest.raises(StorageError, match="check credentials and permissions"):
        runs.read_receipts(job.config.output)
