"""A run goes on with the commits of the Hub that it has begun with, though newer ones are there by then."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support import hub_server, runs
from vcf_batch.commands.score import calibrating
from vcf_batch.config import RunConfig
from vcf_batch.models.cache import CACHE_VARIABLE
from vcf_batch.output import commits
from vcf_batch.output.output import Output
from vcf_batch.setup import absolute_paths, claim
from vcf_batch.worker.device import Device

pytestmark = pytest.mark.usefixtures("restored_torch")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[hub_server.Hub]]:
    """A Hub with the model ``org/m``."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    with hub_server.running() as hub:
        hub.repositories |= {"org/m": runs.save_model(tmp_path / "model")}
        yield hub


def config(tmp_path: Path, revision: str | None = None) -> RunConfig:
    manifest = runs.write_manifest(tmp_path / "in", 16)
    sizes = {"gpus_per_worker": 0, "shard_size": 16, "batch_size": 8, "steps": 2, **runs.SIZE}
    output = str(tmp_path / "out")
    return absolute_paths.absolute(
        RunConfig(manifest=str(manifest), output=output, model="org/m", revision=revision, **sizes)
    )


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_branch_that_moves_does_not_make_another_run(
    tmp_path: Path, hub: type[hub_server.Hub], monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    begun = config(tmp_path, revision)
    record = claim.record_of(runs.settle(begun))
    monkeypatch.setattr(commits, "any_committed", lambda url: True)
    hub.moved |= {"org/m"}
    assert runs.settle(begun, record).fields == record.fields
    newest = begun.replace(revision="main" if revision is None else None)
    assert runs.settle(newest, record).fields["model_id"] != record.fields["model_id"], "another one is asked for"


def test_a_run_without_a_model_of_the_hub_is_not_listed_for_its_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = config(tmp_path).replace(model=str(runs.save_model(tmp_path / "model")))
    record = claim.record_of(runs.settle(local))
    monkeypatch.setattr(commits, "any_committed", lambda url: pytest.fail("it is listed"))
    assert claim.commits_of(local, record) == {}


def test_a_calibration_takes_the_models_of_the_run(tmp_path: Path, hub: type[hub_server.Hub]) -> None:
    begun = config(tmp_path)
    runs.run_here(begun)
    hub.moved |= {"org/m"}
    found = calibrating.calibrate(Output(begun.output), [], Device.set_up(begun.replace(dtype="float32")))
    assert "clip_score" in str(found)
