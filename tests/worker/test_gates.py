"""Which samples pass the gates, what the others leave behind, and that bytes stay a function of the shard."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from support import runs
from support.runs import another, commit
from vcf_batch import sharding
from vcf_batch.commands.regenerate import regenerate
from vcf_batch.commands.verify import check
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import UsageError
from vcf_batch.output import shards
from vcf_batch.output.kept_samples import KeptSamples
from vcf_batch.output.output import Output
from vcf_batch.records import Draw, Row, Sample, Scores
from vcf_batch.setup import claim
from vcf_batch.setup.job import Job
from vcf_batch.worker import gates, worker
from vcf_batch.worker.worker import Worker

pytestmark = pytest.mark.usefixtures("restored_torch")

ROWS = 12
ROW = Row(number=0, key="a", prompt="p", seed=7)


def config(**values: Any) -> RunConfig:
    return RunConfig(manifest="m.parquet", output="out", **values)


def drawn(*scores: Scores | None) -> list[Sample]:
    """What the draws of a row gave: scores, or None where values were not finite."""
    samples = []
    for number, each in enumerate(scores):
        used = {"seed": sharding.draw_seed(7, number)}
        failed = Sample(ROW, "failed", used, error_message="not finite")
        samples.append(failed if each is None else Sample(ROW, "success", used, scores=each))
    return samples


def test_without_gates_a_row_is_what_its_one_draw_gave() -> None:
    (sample,) = drawn(Scores(0.1))
    assert gates.outcome([sample], config()) is sample


def test_a_row_gets_another_draw_until_one_passes() -> None:
    gated = config(min_clip_score=0.25, attempts=3)
    assert gates.outcome(drawn(Scores(0.2)), gated) is None
    passed = gates.outcome(draws := drawn(Scores(0.2), None, Scores(0.25)), gated)
    assert passed
    assert (passed.status, passed.settings["seed"]) == ("success", sharding.draw_seed(7, 2))
    assert passed.attempts == tuple(Draw(each.settings["seed"], each.scores) for each in draws)


@pytest.mark.parametrize(
    ("settings", "scores", "kept_draw", "reason"),
    [
        ({"min_clip_score": 0.25}, [Scores(0.21)], 0, "clip_score 0.21 < --min-clip-score 0.25 in 1 attempt"),
        (
            {"min_clip_score": 0.25, "attempts": 3},
            [Scores(0.1), Scores(0.21), None],
            1,
            "clip_score 0.21 < --min-clip-score 0.25 in the best of 3 attempts",
        ),
        (
            {"min_clip_score": 0.25, "max_lpips": 0.5, "attempts": 2, "best_by": "lpips"},
            [Scores(0.2, 0.1, 0.9), Scores(0.1, 0.1, 0.75)],
            1,
            "clip_score 0.1 < --min-clip-score 0.25 and lpips 0.75 > --max-lpips 0.5 in the best of 2 attempts",
        ),
        (
            {"min_clip_score": 0.25, "attempts": 2, "best_by": "clip_reference"},
            [Scores(0.1), Scores(0.2)],  # text only: the best is by the prompt
            1,
            "clip_score 0.2 < --min-clip-score 0.25 in the best of 2 attempts",
        ),
    ],
)
def test_what_never_passes_is_rejected_with_its_best_draw(
    settings: Mapping[str, Any], scores: Sequence[Scores | None], kept_draw: int, reason: str
) -> None:
    """If none passes, the best is recorded with the reason, and every draw's scores."""
    rejected = gates.outcome(drawn(*scores), config(**settings))
    assert rejected
    assert (rejected.status, rejected.error_message) == ("rejected", reason)
    assert rejected.settings["seed"] == sharding.draw_seed(7, kept_draw)
    assert rejected.scores == scores[kept_draw]
    assert len(rejected.attempts) == len(scores)


def test_a_gate_on_a_score_that_does_not_apply_is_passed() -> None:
    gated = config(min_clip_reference=0.5, max_lpips=0.1)
    text_only, other = drawn(Scores(0.1), Scores(0.1, 0.4, float("nan")))
    assert gates.misses(text_only, gated) == []
    assert len(gates.misses(other, gated)) == 2


def test_a_row_without_finite_values_in_any_draw_fails() -> None:
    failed = gates.outcome(drawn(None, None), config(min_clip_score=0, attempts=2))
    assert failed
    assert (failed.status, len(failed.attempts)) == ("failed", 2)


def test_draws_have_seeds_of_their_own() -> None:
    seeds = [sharding.draw_seed(seed, draw) for seed in (0, 7) for draw in range(20)]
    assert len(set(seeds)) == 40
    assert (seeds[0], seeds[20]) == (0, 7), "the first draw is the plain one"
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attempts": 2}, "attempts is 2, but nothing is asked of them: set one of min_clip_score"),
        ({"attempts": 0}, "attempts is 0; it must be between 1 and 100"),
        ({"min_clip_score": 1.5}, "min_clip_score is 1.5; it must be between -1 and 1"),
        ({"max_lpips": -0.5}, "max_lpips is -0.5; it must be at least 0"),
        ({"min_content_alignment": 0.5}, "min_content_alignment is 0.5, but only --triplets draw what"),
        ({"best_by": "luck"}, "best_by is 'luck'; it must be one of clip_score"),
        ({"best_by": "lpips"}, "best_by is lpips, but nothing is rejected"),
    ],
)
def test_gates_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("reference", "settings", "message"),
    [
        ("reference0.png", {"max_lpips": 1.0}, "max_lpips is 1, but there is no perceptual network"),
        ("reference0.png", {"min_style_similarity": 0.5}, "min_style_similarity is 0.5, but there is no perceptual"),
        ("reference0.png", {"min_clip_score": 0.1, "best_by": "lpips"}, "best_by is lpips, but there is no perceptual"),
        (None, {"triplets": True}, "triplets need a reference in each row, and the manifest has none"),
        (None, {"min_clip_reference": 0.5}, "the manifest has no references to compare with"),
    ],
)
def test_a_gate_that_nothing_can_miss_is_refused(
    model: Path, tmp_path: Path, reference: str | None, settings: dict[str, Any], message: str
) -> None:
    manifest = runs.write_manifest(tmp_path / "in", 2, {"reference": [reference] * 2})
    with pytest.raises(UsageError, match=message):
        runs.settled(manifest, tmp_path / "out", model, **settings)


# In a worker


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_manifest(tmp_path_factory.mktemp("manifest"), ROWS)


@pytest.fixture(scope="module")
def loaded(model: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return runs.load(manifest, tmp_path_factory.mktemp("unused") / "out", model)


@pytest.fixture(scope="module")
def plain(loaded: Worker, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows without gates."""
    output = tmp_path_factory.mktemp("plain") / "out"
    commit(another(loaded, manifest, output))
    return runs.rows_of(output)


@pytest.fixture(scope="module")
def limit(plain: list[dict[str, Any]]) -> float:
    """Two thirds of the first draws are below it."""
    return sorted(row["clip_score"] for row in plain)[2 * ROWS // 3]


def images(output: Path) -> dict[str, bytes]:
    return {sample["__key__"]: sample["png"] for sample in shards.read_samples(str(output / "00000.tar"))}


@pytest.fixture(scope="module")
def gated(model: Path, manifest: Path, limit: float, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Worker]:
    """A run with gates, committed, and its worker."""
    output = tmp_path_factory.mktemp("gated") / "out"
    options = {"batch_size": 4, "shard_size": ROWS, "min_clip_score": limit, "attempts": 3}
    job = runs.settled(manifest, output, model, **options)
    claim.claim(job)
    loaded = worker.load(job)
    commit(loaded)
    return job, loaded


def elsewhere(subject: Worker, output: Path) -> Worker:
    components = dataclasses.replace(subject.components, config=subject.components.config.replace(output=str(output)))
    return Worker(components, subject.manifest, subject.fingerprint)


def test_rows_that_pass_at_once_have_the_bytes_that_they_have_without_gates(
    gated: tuple[Job, Worker], plain: list[dict[str, Any]], limit: float
) -> None:
    """The first draw is the plain one; the record tells every draw."""
    rows = runs.rows_of(Path(gated[0].config.output))
    outcomes = {(row["status"], len(row["attempts"])) for row in rows}
    assert {("success", 1), ("success", 2), ("rejected", 3)} <= outcomes
    for row, before in zip(rows, plain, strict=True):
        assert row["attempts"][0] == {name: before[name] for name in row["attempts"][0]}
        assert (row["status"] == "rejected") == (row["sha256"] is None) == (row["clip_score"] < limit)
        if len(row["attempts"]) == 1:
            assert row | {"attempts": None} == before
        best = max(row["attempts"], key=lambda attempt: attempt["clip_score"])
        assert row["seed"] == best["seed"]
        assert row["clip_score"] == best["clip_score"]
        assert [attempt["seed"] for attempt in row["attempts"]] == [
            sharding.draw_seed(before["seed"], number) for number in range(len(row["attempts"]))
        ]


def test_a_later_draw_is_what_its_seed_makes(gated: tuple[Job, Worker], loaded: Worker, tmp_path: Path) -> None:
    """The seed of the record draws the image again, in a run without gates."""
    rows = runs.rows_of(Path(gated[0].config.output))
    manifest = runs.write_manifest(tmp_path / "in", ROWS, {"seed": [row["seed"] for row in rows]})
    commit(another(loaded, manifest, tmp_path / "out"))
    again = images(tmp_path / "out")
    made = images(Path(gated[0].config.output))
    assert made.items() <= again.items()


def test_bytes_do_not_depend_on_what_is_kept(gated: tuple[Job, Worker], tmp_path: Path) -> None:
    """A repair of rejected rows draws them again from the same seeds, beside kept rows: the bytes are the same."""
    job, subject = gated
    rejected = bytes(row["status"] == "rejected" for row in runs.rows_of(Path(job.config.output)))
    assert 0 < sum(rejected) < ROWS
    for number, redo in enumerate((rejected, b"\1" + bytes(ROWS - 1))):
        samples = KeptSamples(job.config, job.manifest, job.shards[0], redo)
        commit(elsewhere(subject, tmp_path / str(number)), existing=samples)
        assert runs.data_files(tmp_path / str(number)) == runs.data_files(Path(job.config.output))


def test_an_output_with_gates_is_found_whole(gated: tuple[Job, Worker]) -> None:
    """Verify accepts it, and draws every sample again with the same bytes."""
    opened = Output(gated[0].config.output)
    assert list(check(opened)) == []
    *findings, told = regenerate(opened, 2, 0)
    assert not findings
    assert "2 drawn again, 2 with the same bytes" in str(told)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attempts": [{"seed": 3, "clip_score": 0.1}]}, "attempts have other seeds than those that follow from"),
        ({"seed": 3}, "seed is 3, the run has"),
        ({"error_message": None, "status": "rejected"}, "status 'rejected' with error_message None"),
    ],
)
def test_a_record_that_no_attempt_explains_is_found(
    gated: tuple[Job, Worker], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    output = shutil.copytree(gated[0].config.output, tmp_path / "out")
    files = runs.Files(output, "00000")
    files.edit_everywhere(next(n for n, row in enumerate(files.rows) if row["status"] == "success"), **change)
    files.write()
    (finding,) = check(Output(str(output)))
    assert message in str(finding)
