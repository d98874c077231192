"""Roles before a run: what no worker could do is told by the driver, from the model's files alone."""

from pathlib import Path
from typing import Any

import pytest

from support import runs
from vcf_batch.config import RunConfig
from vcf_batch.errors import ModelError, UsageError
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.models import resolution
from vcf_batch.setup import model_check, run_models
from vcf_batch.setup.job import fusions_of, is_limited, roles_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_model(tmp_path_factory.mktemp("roles") / "model")


def opened(folder: Path, model: Path, columns: dict[str, list[Any]], **settings: Any) -> tuple[RunConfig, Manifest]:
    url = str(runs.write_manifest(folder, 3, columns))
    config = RunConfig(manifest=url, output="out", model=str(model), lpips="none", **settings)
    return config, Manifest.open(url)


def check(folder: Path, model: Path, columns: dict[str, list[Any]], **settings: Any) -> None:
    config, manifest = opened(folder, model, columns, **settings)
    model_check.check(config, manifest, run_models.resolve(config), fusions_of(config, manifest))


def test_roles_are_those_of_the_run_and_of_its_rows(tmp_path: Path, model: Path) -> None:
    """In lists, too. A run without roles and masks has no limits."""
    lists: dict[str, list[Any]] = {"reference": [["reference0.png"]] * 3, "reference_roles": [["style"], [None], None]}
    config, manifest = opened(tmp_path, model, lists, role="layout")
    assert roles_of(config, manifest) == {"style", "layout"}
    config, manifest = opened(tmp_path, model, {"reference_roles": ["palette", "all", None]})
    assert roles_of(config, manifest) == {"all", "palette"} and is_limited(config, manifest)
    config, manifest = opened(tmp_path, model, {})
    assert roles_of(config, manifest) == {"all"} and not is_limited(config, manifest)
    assert is_limited(config.replace(role="layout"), manifest)


def test_a_role_without_its_projection_is_refused(tmp_path: Path, model: Path) -> None:
    told = r"the role style needs a projection, and .* has none: fit one with"
    with pytest.raises(ModelError, match=told):
        check(tmp_path, model, {}, role="style")
    with pytest.raises(ModelError, match=told):
        check(tmp_path, model, {"reference_roles": ["all", "style", None]})
    check(tmp_path, model, {"reference_roles": ["layout", "all", None]})


def test_a_role_without_references_is_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UsageError, match="role is layout, but the manifest has no references"):
        check(tmp_path, model, {"reference": [None] * 3}, role="layout")


def test_a_damaged_file_of_projections_is_told(tmp_path: Path) -> None:
    folder = runs.save_model(tmp_path / "model")
    file = folder / "aligner" / "roles.safetensors"
    file.write_bytes(b"\x09\0\0\0\0\0\0\0{")
    with pytest.raises(ModelError, match=r"aligner/roles\.safetensors of .* is damaged"):
        model_check.stored_roles(resolution.resolve(str(folder)))
