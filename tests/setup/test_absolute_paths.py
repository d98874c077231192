"""Paths mean the same to every process of a run."""

from pathlib import Path

import pytest

from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import UsageError
from vcf_batch.setup import absolute_paths


@pytest.mark.parametrize("folder", ["working_dir_files/_ray_pkg_0123456789abcdef", "working_dir_files/unpacked"])
def test_an_output_in_a_jobs_copy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """Inside a submitted job, where the working directory is a temporary copy, a relative output is refused."""
    copy = tmp_path / folder
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(UsageError, match="temporary copy"):
        absolute_paths.absolute(RunConfig(manifest="in.parquet", output="out"))
    config = absolute_paths.absolute(RunConfig(manifest="in.parquet", output=str(tmp_path)))
    assert config.manifest == str(copy / "in.parquet")
    assert (
        absolute_paths.absolute(RunConfig(manifest="in.parquet", output="s3://bucket/out")).output == "s3://bucket/out"
    )


@pytest.mark.parametrize("name", absolute_paths.BUILT_IN)
def test_a_manifest_of_the_package_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A file or folder of its name is another one, which is named with its folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    found = Path(absolute_paths.absolute(RunConfig(manifest=name, output="out")).manifest)
    assert found.name == f"{name}.parquet" and (found.parent / "references").is_dir()
    own = absolute_paths.absolute(RunConfig(manifest=f"./{name}", output="out")).manifest
    assert own == str(tmp_path / name)
