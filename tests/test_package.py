"""The package as it is built and described."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import vcf_batch
from vcf_batch.setup.absolute_paths import BUILT_IN

ROOT = Path(__file__).parents[1]
pytest.importorskip("setuptools", minversion="77")


def test_the_wheel_has_every_file_of_the_package(tmp_path: Path) -> None:
    """Weights, configurations, pages and manifests too, so that it needs nothing but itself."""
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "vcf_batch", source / "vcf_batch", ignore=skipped)  # what links lead to is copied
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import setuptools.build_meta as build, sys; build.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {*zipfile.ZipFile(wheel).namelist()}
    files = [file for file in (ROOT / "vcf_batch").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    files += [*(ROOT / "manifests").glob("*.parquet"), *(ROOT / "manifests/references").iterdir()]
    for file in files:
        place = Path("vcf_batch/tiny") if file.is_relative_to(ROOT / "manifests") else Path()
        if file.suffix != ".md" or "manifests" not in file.parts:
            assert str(place / file.relative_to(ROOT)) in names


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_manifest_is_that_of_the_repository(name: str) -> None:
    link = ROOT / "vcf_batch/tiny/manifests"
    assert (link / f"{name}.parquet").resolve() == ROOT / f"manifests/{name}.parquet"


def test_what_describes_the_package_has_its_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == vcf_batch.__version__
    assert f"## {vcf_batch.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_workflow_runs_the_check_of_a_clean_checkout() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/check.yml").read_text())
    assert workflow["jobs"]["check"]["steps"][-1] == {"run": ".ci/run"}
