"""Runs of a tiny model, settled."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import runs
from vcf_batch.config.run_config import RunConfig
from vcf_batch.output import run_file
from vcf_batch.setup import absolute_paths, claim
from vcf_batch.setup.job import Job


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
        config = absolute_paths.absolute(RunConfig(**{**settings, **runs.SIZE, **options}))
        record = run_file.read(config.output)
        config = claim.resume(config, record)
        return runs.settle(config, record)

    return build
