"""An output is claimed for one run, whose record says what it is."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support import runs
from vcf_batch import __version__, storage
from vcf_batch.commands import verify
from vcf_batch.config.fingerprint import ADDED_SETTINGS, fingerprint
from vcf_batch.errors import DamageFound, RefusedError, StorageError, UsageError
from vcf_batch.models.resolution import ResolvedModel
from vcf_batch.output import commits, lease, run_file
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Receipt
from vcf_batch.output.run_file import AnotherVersion
from vcf_batch.records import Status
from vcf_batch.setup import claim
from vcf_batch.setup.job import Job
from vcf_batch.setup.run_models import Models
from vcf_batch.storage import local


def commit_a_shard(job: Job) -> None:
    counts: dict[Status, int] = {"success": len(job.shards[0]), "rejected": 0, "failed": 0}
    receipt = Receipt(job.shards[0], job.fingerprint, 1, counts, {}, {}, {})
    (Path(job.config.output) / "00000_stats.json").write_bytes(receipt.to_json())


def test_what_is_no_receipt_binds_no_output(settle: Callable[..., Job], tmp_path: Path) -> None:
    """A receipt that does not parse counts as absent, so another run may begin there."""
    job = settle(steps=5)
    claim.claim(job)
    (tmp_path / "out" / "00000_stats.json").write_text("{}")
    claim.claim(settle())
    commit_a_shard(settle())
    with pytest.raises(RefusedError, match="another run"):
        claim.claim(job)


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


@pytest.mark.parametrize(("step", "there"), [("publish_bytes", False), ("publish_bytes", True), ("move", True)])
def test_a_driver_suspended_within_its_claim_harms_nothing_of_the_next_owners(
    settle: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, there: bool
) -> None:
    """A driver that lost its lease before it published run.json replaces nothing of the run that took over and
    finished, whether there was an earlier run.json or none."""
    output = str(tmp_path / "out")
    if there:
        claim.claim(settle(seed=9))
    late, held, stepped = settle(seed=1), lease.Lease(output), getattr(storage, step)
    held.acquire()

    def suspended(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(storage, step, stepped)
        storage.remove(storage.join(output, lease.LEASE_NAME))
        with lease.hold(output):
            runs.write_output(tmp_path / "in" / "manifest.parquet", tmp_path / "out", 16)
            commits.clean(output)
        return stepped(*arguments, **options)

    monkeypatch.setattr(storage, step, suspended)
    with pytest.raises(RefusedError, match="took over and has ended, or somebody deleted the file"):
        claim.claim(late, confirm=held.confirm)
    assert getattr(storage, step) is stepped
    assert [finding for finding in verify.check(Output(output)) if finding.is_damage] == []
    assert len(runs.read_receipts(output)) == 3
    assert not any(name.startswith(commits.STAGING) for name in storage.list_tree(output))


def test_a_run_file_of_another_driver_is_not_replaced_by_one_that_saw_none(
    settle: Callable[..., Job], tmp_path: Path
) -> None:
    """run.json is created once where there was none; the same record twice is one record."""
    output, job = str(tmp_path / "out"), settle()
    document = claim.record_of(job).to_document()
    for _ in range(2):
        run_file.write(output, document)
    with pytest.raises(RefusedError, match=r"another driver has written .*run\.json meanwhile; rerun"):
        run_file.write(output, claim.record_of(settle(seed=1)).to_document())
    run_file.check_stays(output, job.fingerprint)
    with pytest.raises(RefusedError, match=r"not of this run, 0000, any more: it is of run"):
        run_file.check_stays(output, "0000")
    storage.remove(storage.join(output, "run.json"))
    with pytest.raises(RefusedError, match=r"any more: it is gone"):
        run_file.check_stays(output, job.fingerprint)


def test_another_run_is_refused_with_both_values(settle: Callable[..., Job]) -> None:
    """A different fingerprint in the same output is refused with both values shown."""
    job = settle(negative_prompt="fog")
    claim.claim(job)
    commit_a_shard(job)
    with pytest.raises(RefusedError, match=r'negative_prompt: "fog" there, "rain" now\n  seed: 0 there, 3 now\n'):
        claim.claim(settle(negative_prompt="rain", seed=3))


def test_a_strength_that_is_given_is_another_run_than_one_that_was_left_open(settle: Callable[..., Job]) -> None:
    """They differ in rows with a fusion of their own, and the message names the option, not what is derived from it."""
    job = settle()
    claim.claim(job)
    commit_a_shard(job)
    with pytest.raises(RefusedError, match=r"they differ in:\n  strength: left open there, given now .*\n"):
        claim.claim(settle(strength=job.config.strength))


def rewrite(job: Job, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the output's run.json as another version would have written it."""
    file = Path(job.config.output) / "run.json"
    record = json.loads(file.read_text())
    change(record)
    record["fingerprint"] = fingerprint(record["fields"])
    file.write_text(json.dumps(record))


def by_an_older_version(record: dict[str, Any]) -> None:
    """Of before there was eta."""
    del record["config"]["eta"]
    record["fields"].pop("eta", None)
    record["versions"]["vcf_batch"] = "0.1.9"


def test_a_run_of_the_version_before_resumes(settle: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting added later stays out of the fingerprint while it has the value that means the old behaviour, so that a
    half-done run resumes under the next version."""
    monkeypatch.setitem(ADDED_SETTINGS, "eta", 0.0)
    job = settle()
    assert "eta" not in job.fields
    claim.claim(job)
    commit_a_shard(job)
    rewrite(job, by_an_older_version)
    assert claim.claim(settle()) == ()
    assert Output(job.config.output).config.eta == 0.0
    assert settle(eta=0.5).fingerprint != job.fingerprint


def test_a_run_of_another_version_is_refused_as_that(
    settle: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both values are shown, a missing one as the value that means the old behaviour."""
    monkeypatch.setitem(ADDED_SETTINGS, "eta", 0.0)
    job = settle()
    claim.claim(job)
    commit_a_shard(job)
    rewrite(job, by_an_older_version)
    told = rf"begun by another version, vcf-batch 0\.1\.9, and this is {re.escape(__version__)}; they differ in:\n"
    with pytest.raises(RefusedError, match=told + r"  eta: 0\.0 there, 0\.5 now\nFinish it with that version, rerun"):
        claim.claim(settle(eta=0.5))
    # A difference that no version makes is that of another run.
    with pytest.raises(RefusedError, match=r"another run; .*\n  eta: 0\.0 there, 0\.5 now\n  seed: 0 there"):
        claim.claim(settle(eta=0.5, seed=1))
    monkeypatch.setitem(ADDED_SETTINGS, "eta", 0.25)  # the old behaviour, which is not the default any more
    with pytest.raises(RefusedError, match=told + r"  eta: 0\.25 there, 0\.0 now\n"):
        claim.claim(settle())
    assert Output(job.config.output).config.eta == 0.25


def test_a_run_of_a_later_version_is_read_where_its_settings_are_known(settle: Callable[..., Job]) -> None:
    """Keys that a later version added are passed over, as long as the run does nothing that is unknown here."""
    job = settle()
    claim.claim(job)
    commit_a_shard(job)

    def with_more(record: dict[str, Any]) -> None:
        record["more"] = record["config"]["glow"] = record["manifest"]["more"] = 1
        record["versions"]["vcf_batch"] = "9.0"

    rewrite(job, with_more)
    assert claim.claim(settle()) == ()
    assert Output(job.config.output).config == job.config
    rewrite(job, lambda record: record["fields"].update(glow=1))
    with pytest.raises(RefusedError, match=r"another version, vcf-batch 9\.0, .*\n  glow: 1 there, nothing now\n"):
        claim.claim(settle())
    with pytest.raises(AnotherVersion, match=r"begun by vcf-batch 9\.0, with a setting .* does not know: glow is 1\."):
        Output(job.config.output)


def test_what_a_later_version_says_of_files_is_not_read(settle: Callable[..., Job], tmp_path: Path) -> None:
    job = settle()
    claim.claim(job)
    path = tmp_path / "out" / "run.json"
    document = json.loads(path.read_text())
    (file,) = document["manifest"]["files"].values()
    file["added"] = True
    path.write_text(json.dumps(document))
    there = run_file.read(job.config.output)
    assert there and there.manifest.files == job.manifest.versions


def test_the_record_is_written_and_read_in_one_place(settle: Callable[..., Job], tmp_path: Path) -> None:
    """run.json is a typed record; its names and their order are those that other programs know."""
    job = settle(model="tiny", strength=0.5)
    claim.claim(job)
    written = json.loads((tmp_path / "out" / "run.json").read_text())
    names = "layout fields fingerprint extends config manifest models shards shard_digits versions"
    assert [*written] == names.split()
    assert written["manifest"] == {
        "url": job.manifest.url,
        "identity": job.manifest.identity,
        "rows": 40,
        "files": {name: dataclasses.asdict(version) for name, version in job.manifest.versions.items()},
    }
    record = run_file.read(job.config.output)
    assert record == claim.record_of(job)
    assert record.to_document() == written
    assert record.run_config(job.config.output) == job.config


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("config", None, "config is None; it must be an object"),
        ("manifest", {"url": "m", "identity": "i"}, "'rows' is missing"),
        ("shards", "3", "shards is '3'; it must be a number of 1 or more"),
        ("models", {}, "'model' is missing"),
    ],
)
def test_a_record_without_its_parts_is_refused_with_the_reason(
    settle: Callable[..., Job], part: str, value: object, reason: str
) -> None:
    job = settle()
    claim.claim(job)
    rewrite(job, lambda record: record.update({part: value}))
    with pytest.raises(RefusedError, match=f"damaged, or not the record of a run: {reason}"):
        settle()
    with pytest.raises(DamageFound, match=f"run.json: .*{reason}"):
        Output(job.config.output)


def test_the_folder_of_a_training_is_refused(settle: Callable[..., Job], tmp_path: Path) -> None:
    """Files of somebody else are neither deleted nor overwritten: a training has a run.json too."""
    run_file.write(str(tmp_path / "out"), run_file.document({"epochs": 1}, {"pairs": 3}))
    with pytest.raises(RefusedError, match=r"not the record of a run: 'manifest' is missing; use another output"):
        settle()


def begun_and_appended(settle: Callable[..., Job], folder: Path) -> Job:
    """A run over 8 rows that has a shard of 4; 6 rows are appended to its manifest afterwards."""
    runs.write_manifest(folder, 8).rename(folder / "1.parquet")
    first = settle(manifest=str(folder), shard_size=4)
    claim.claim(first)
    commit_a_shard(first)
    runs.write_manifest(folder, 6).rename(folder / "2.parquet")
    return first


def test_appended_rows_keep_the_shards_that_are_there(settle: Callable[..., Job], tmp_path: Path) -> None:
    """Extending a run by appending manifest rows is possible where shards stay the same, else refused."""
    folder = tmp_path / "many"
    first = begun_and_appended(settle, folder)
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


def test_a_longer_run_takes_over_shards_that_a_listing_does_not_show_yet(
    settle: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "many"
    first = begun_and_appended(settle, folder)
    monkeypatch.setattr(commits, "any_committed", lambda output: False)
    assert claim.claim(settle(manifest=str(folder), shard_size=4)) == (first.fingerprint,)


def test_a_limit_of_all_rows_is_the_run_without_a_limit(settle: Callable[..., Job], tmp_path: Path) -> None:
    """Either resumes the other. When the manifest grows, the run goes on without the limit, or ends with it."""
    whole, limited = settle(shard_size=8), settle(shard_size=8, limit=40)
    assert whole.fingerprint == limited.fingerprint == settle(shard_size=8, limit=99).fingerprint
    assert limited.config.limit is None
    folder = tmp_path / "many"
    runs.write_manifest(folder, 8).rename(folder / "1.parquet")
    first = settle(manifest=str(folder), shard_size=4, limit=8)
    claim.claim(first)
    commit_a_shard(first)
    assert claim.claim(settle(manifest=str(folder), shard_size=4)) == ()
    runs.write_manifest(folder, 6).rename(folder / "2.parquet")
    for limit in (8, None):
        (tmp_path / "out" / "run.json").write_text(json.dumps(claim.record_of(first).to_document()))
        later = settle(manifest=str(folder), shard_size=4, limit=limit)
        assert later.manifest.num_rows == (limit or 14)
        assert claim.claim(later) == (first.fingerprint,)
    (tmp_path / "out" / "run.json").write_text(json.dumps(claim.record_of(first).to_document()))
    with pytest.raises(
        RefusedError, match=r"limit: nothing there, 4 now\nThe run that is there has 8 rows, and this one 4"
    ):
        claim.claim(settle(manifest=str(folder), shard_size=4, limit=4))


def test_a_manifest_edited_in_place_is_refused(settle: Callable[..., Job], tmp_path: Path) -> None:
    """A manifest of which one prompt is another, of the same length, is another run: the refusal names the file."""
    path = tmp_path / "in" / "manifest.parquet"
    for prompt in ("a red fox", "a red cat"):
        table = pa.table({"prompt": [prompt] * 8})
        pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)
        if prompt == "a red fox":
            job = settle(shard_size=4)
            claim.claim(job)
            commit_a_shard(job)
    with pytest.raises(
        RefusedError, match=r"manifest_id: \w{12} there, \w{12} now\n.* manifest\.parquet has changed: its contents had"
    ):
        claim.claim(settle(shard_size=4))
    opened = Output(str(tmp_path / "out"))
    assert opened.manifest is None
    assert "has changed since the run: manifest.parquet has changed" in str(opened.manifest_error)


def test_another_limit_is_told_alone(settle: Callable[..., Job]) -> None:
    """The identity covers the rows in use, and is not named as a second difference where the limit is another."""
    job = settle(shard_size=4, limit=8)
    claim.claim(job)
    commit_a_shard(job)
    with pytest.raises(RefusedError, match="limit: 8 there, nothing now") as refused:
        claim.claim(settle(shard_size=4))
    assert "manifest_id" not in str(refused.value)


def test_an_empty_run_file_is_none(settle: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no hard links, a driver that dies while it creates run.json leaves an empty one. It counts as
    none: the next run is begun, unless there are shards."""
    monkeypatch.setattr(local, "CREATOR_SECONDS", 0.05)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").touch()
    with pytest.raises(UsageError, match="holds no run yet"):
        Output(str(tmp_path / "out"))
    (tmp_path / "out" / "00000.tar").touch()
    with pytest.raises(DamageFound, match="it is missing, so nothing tells"):
        Output(str(tmp_path / "out"))
    with pytest.raises(RefusedError, match=r"no run\.json"):
        claim.claim(settle())
    (tmp_path / "out" / "00000.tar").unlink()
    claim.claim(settle())
    assert run_file.read(str(tmp_path / "out")) == claim.record_of(settle())


@pytest.mark.parametrize("content", ["{}", "[1]", "{", '{"fields": {"seed": 1}, "fingerprint": "0"}'])
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
    for read in (settle, lambda: Output(str(tmp_path / "out"))):
        with pytest.raises(RefusedError, match="has layout 0, and this version of vcf-batch reads layout 4: use"):
            read()


@pytest.mark.parametrize("name", ["00000_stats.json", "00000.tar", "00017.parquet"])
def test_shards_without_a_run_file_are_refused(settle: Callable[..., Job], tmp_path: Path, name: str) -> None:
    """Files of somebody else are neither deleted nor overwritten."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(RefusedError, match=r"no run\.json"):
        claim.claim(settle())


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


def test_an_adapter_of_another_file_is_told_by_its_name(settle: Callable[..., Job]) -> None:
    """Identities on the Hub differ in what follows the commit."""
    job, commit = settle(), "6a" * 20
    there, now = ({**job.fields, "ip_adapter_id": f"{commit}/models/{name}.bin {commit}/models/x"} for name in "ab")
    with pytest.raises(
        RefusedError, match=r"_id: (6a){6}/models/a\.bin (6a){6}/models/x there, (6a){6}/models/b\.bin "
    ):
        claim.holds("out", there, now, begun=True)
