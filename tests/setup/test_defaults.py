"""Every setting that was left open gets its value before a worker starts."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import runs
from vcf_batch import sharding
from vcf_batch.config.limits import ALIGNED_FUSIONS
from vcf_batch.config.row_settings import settings_of
from vcf_batch.config.run_config import RunConfig
from vcf_batch.config.strengths import DEFAULT_STRENGTHS
from vcf_batch.errors import ModelError, UsageError
from vcf_batch.models.single_file import layout
from vcf_batch.records import Row
from vcf_batch.setup import defaults
from vcf_batch.setup.job import Job


def test_every_default_gets_a_value(settle: Callable[..., Job]) -> None:
    config = settle().config
    assert (config.steps, config.guidance_scale, config.dtype) == (4, 5.0, "float32")
    assert config.shard_size == 16
    assert settle(gpus_per_worker=1).config.dtype == "bfloat16"


def test_the_models_own_size_is_the_default(settle: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vcf_batch.config.limits.MIN_EDGE", 8)
    config = settle(height=None, width=None).config
    assert (config.height, config.width) == (16, 16)


@pytest.mark.parametrize(("version", "size"), [("0.8.1.dev0", 64), ("0.9.0", 32), ("0.10.2", 32)])
def test_a_size_that_an_early_diffusers_wrote_wrongly_is_mended(
    settle: Callable[..., Job], model: Path, version: str, size: int
) -> None:
    """As diffusers' own pipelines do, so that the command line makes images of the size that Python makes."""
    file = model / "unet/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_diffusers_version": version, "sample_size": 32}))
    config = settle(height=None, width=None).config
    factor = 2 ** (len(json.loads((model / "vae/config.json").read_text())["block_out_channels"]) - 1)
    assert config.height == config.width == size * factor


def test_the_models_own_judge_is_the_default(settle: Callable[..., Job]) -> None:
    job = settle()
    assert job.models.judge is None
    assert job.fields["judge_id"] == f"{job.fields['model_id']}/judge"
    assert job.models.lpips == "none"  # the model brings no probe


@pytest.mark.parametrize(("name", "operations"), [("sd15", 0.825e12), ("sd21", 2.189e12), ("sdxl", 7.044e12)])
def test_the_operations_of_a_unet_are_estimated_from_its_levels(name: str, operations: float) -> None:
    """Within a fifth of those that benchmarks/counts.py counts of the published models, with 334 tokens."""
    unet = layout.read_config(name, "unet/config.json")
    assert defaults._operations(unet) * unet["sample_size"] ** 2 == pytest.approx(operations, rel=0.2)


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


@pytest.mark.parametrize(
    ("scheduler", "changes", "message"),
    [
        ("ddim", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ("ddim", {"prediction_type": "flow_prediction"}, "prediction_type is"),
        ("dpm++", {"use_beta_sigmas": True}, "use_beta_sigmas is true"),
        ("ddim", {"beta_start": "0.1"}, 'beta_start is "0.1"'),
        ("ddim", {"num_train_timesteps": 1}, "num_train_timesteps is 1"),
    ],
)
def test_a_model_that_the_scheduler_cannot_sample_is_refused_before_it_is_loaded(
    settle: Callable[..., Job], model: Path, tmp_path: Path, scheduler: str, changes: dict[str, Any], message: str
) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ModelError, match=rf"{message}.*scheduler/scheduler_config\.json of .*{tmp_path.name}/model"):
        settle(model=str(copy), scheduler=scheduler)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 9}, "in_channels is 9 .* have 4 channels"),
        ({"out_channels": 8}, "out_channels is 8 .* have 4 channels"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'"),
    ],
)
def test_a_unet_of_another_kind_is_refused_before_it_is_loaded(
    settle: Callable[..., Job], model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Instead of errors of torch that are blamed on rows, or images without what the UNet was trained with."""
    copy = shutil.copytree(model, tmp_path / "model")
    file = copy / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ModelError, match=message):
        settle(model=str(copy))


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


def recommending(model: Path, folder: Path, strength: Any) -> str:
    """A copy of the model that recommends a strength."""
    index = shutil.copytree(model, folder) / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"default_strength": strength}))
    return str(folder)


def test_strength_is_the_models_recommendation_else_the_papers(
    settle: Callable[..., Job], model: Path, tmp_path: Path
) -> None:
    """Settling gives every setting its value, strength included: from the same file as steps and guidance."""
    assert [settle(fusion=fusion).config.strength for fusion in ALIGNED_FUSIONS] == [0.3, 1.0, 0.3]
    own = recommending(model, tmp_path / "own", 0.1)
    assert [settle(fusion=fusion, model=own).config.strength for fusion in ALIGNED_FUSIONS] == [0.3, 0.1, 0.3]
    assert settle(model=own, strength=0.7).config.strength == 0.7
    assert settle(model=recommending(model, tmp_path / "none", 0)).config.strength == 0.0
    for wrong in (-1, math.nan, "much"):
        with pytest.raises(ModelError, match=r"default_strength is .*; it must be between 0 and 1000"):
            settle(model=recommending(model, tmp_path / f"wrong {wrong}", wrong))


def test_the_aligners_own_strength_comes_before_the_models(
    settle: Callable[..., Job], model: Path, tmp_path: Path
) -> None:
    """An aligner that was trained with --tune-strength brings its strength; one without it leaves it to the model."""
    own = Path(recommending(model, tmp_path / "own", 0.1))
    before = settle(model=str(own))
    config = own / "aligner" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({name: value for name, value in content.items() if name != "default_strength"}))
    assert settle(model=str(own)).config.to_dict() == before.config.to_dict(), "as saved by earlier versions"
    config.write_text(json.dumps(content | {"default_strength": 0.03}))
    job = settle(model=str(own))
    assert [settle(fusion=fusion, model=str(own)).config.strength for fusion in ALIGNED_FUSIONS] == [0.3, 0.03, 0.3]
    assert job.fields["strength"] == 0.03 and job.fields["default_strengths"]["concat"] == 0.03
    assert settle(model=str(own), strength=0.1).config.strength == 0.1
    config.write_text(json.dumps(content | {"default_strength": -1}))
    with pytest.raises(ModelError, match=r"default_strength is -1; it must be between 0 and 1000"):
        settle(model=str(own))


def test_a_row_with_its_own_fusion_has_the_strength_of_that_fusion(
    settle: Callable[..., Job], model: Path, tmp_path: Path
) -> None:
    """A row that sets its fusion alone gets the default of that fusion, unless the run was given a strength."""
    overrides: tuple[dict[str, Any], ...] = ({}, {"fusion": "naive"}, {"fusion": "naive", "strength": 2})
    rows = [Row(0, "r", "a cat", overrides=own) for own in overrides]
    model_of = recommending(model, tmp_path / "own", 0.1)
    for options, strengths in (({}, [0.1, 0.3, 2.0]), ({"strength": 0.7}, [0.7, 0.7, 2.0])):
        config = settle(model=model_of, **options).config
        assert [settings_of(row, config)["strength"] for row in rows] == strengths


def test_a_settled_configuration_stays_as_it_is(settle: Callable[..., Job], model: Path, tmp_path: Path) -> None:
    """What run.json records is settled, so that nothing is chosen a second time by repair or verify."""
    for options in ({}, {"strength": 0.7}, {"fusion": "naive"}):
        job = settle(model=recommending(model, tmp_path / f"own {options}", 0.1), **options)
        assert RunConfig.from_mapping(json.loads(json.dumps(job.config.to_dict()))) == job.config
        assert defaults.settle(job.config, job.manifest, job.models) == job


def test_the_fingerprint_has_the_settled_strength(settle: Callable[..., Job], model: Path, tmp_path: Path) -> None:
    """Two runs have one fingerprint only if every row has the same strength in both."""
    job = settle()
    assert job.fields["strength"] == 1.0
    assert job.fields["default_strengths"] == DEFAULT_STRENGTHS
    # Rows with a fusion of their own have another strength where one was given.
    assert settle(strength=1.0).fingerprint != job.fingerprint
