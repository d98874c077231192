"""A run goes on with the commits of the Hub that it has begun with, though newer ones are there by then."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support import hub_server, runs
from vcf_batch.commands.score import calibrating
from vcf_batch.commands.score import wanted as wants
from vcf_batch.config.run_config import RunConfig
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


def test_a_score_goes_on_with_the_commit_that_it_has_begun_with(hub: type[hub_server.Hub]) -> None:
    """So do embeddings, whose name follows from the commit. A score of another name takes the newest commit."""
    (begun,) = wants.resolve([wants.parse("clip:mine=org/m")], None, [])
    embedding = wants.embedding("org/m", [])
    there = [embedding.definition, begun.definition]
    hub.moved |= {"org/m"}
    again, other = wants.resolve([wants.parse("clip:mine=org/m"), wants.parse("clip:newer=org/m")], None, there)
    assert again.definition == begun.definition and again.models == begun.models
    assert other.models["model"].identity != begun.models["model"].identity
    assert wants.embedding("org/m", there).definition == embedding.definition
    assert wants.embedding("org/m", []).definition != embedding.definition


def test_an_aesthetic_head_and_its_clip_go_on_with_their_commits(hub: type[hub_server.Hub]) -> None:
    head = runs.save_model(Path(hub.repositories["org/m"]).parent / "head")
    (head / "head.safetensors").write_bytes((head / "vae/diffusion_pytorch_model.safetensors").read_bytes())
    hub.repositories |= {"org/head": head}
    asked = [wants.parse("aesthetic=org/head:head.safetensors")]
    begun = wants.resolve(asked, "org/m", [])
    hub.moved |= {"org/m", "org/head"}
    assert wants.resolve(asked, "org/m", [each.definition for each in begun]) == begun
    assert wants.resolve(asked, "org/m", []) != begun
