"""Who may import whom: each rule is checked in a fresh interpreter."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

LIGHT = (
    "attempts",
    "blame",
    "commit_queue",
    "commits",
    "columns",
    "config",
    "contract",
    "errors",
    "exporter",
    "forecast",
    "images",
    "in_process",
    "lease",
    "ledger",
    "log",
    "manifest",
    "model_files",
    "model_hub",
    "models",
    "outputs",
    "parquet",
    "plan",
    "prepare",
    "progress",
    "progress_file",
    "quarantine",
    "receipts",
    "records",
    "references",
    "report.card",
    "report.page",
    "report.status",
    "row_json",
    "row_settings",
    "repair",
    "run_file",
    "run_manifest",
    "run_models",
    "shard_check",
    "shard_queue",
    "shards",
    "signals",
    "starts",
    "storage",
    "storage_drivers",
    "storage_errors",
    "storage_local",
    "storage_reader",
    "tally",
    "totals",
    "verify",
    "vcf.captions",
    "vcf.feed",
    "vcf.parts",
    "vcf.recipe",
    "vcf.task",
)


def imported(module: str) -> set[str]:
    """Top-level and package modules that importing ``module`` brings in."""
    code = f"import sys, {module}; print('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_light_modules_import_neither_torch_nor_ray() -> None:
    """plan, manifest, records, config, storage import neither torch nor ray; importing the package is cheap."""
    modules = ["vcf_batch", "vcf_batch.cli", *(f"vcf_batch.{name}" for name in LIGHT)]
    code = (
        "import importlib, sys\n"
        f"for module in {modules}:\n"
        "    importlib.import_module(module)\n"
        "    heavy = {'torch', 'ray', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "    assert not heavy, f'{module} imports {heavy}'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_worker_does_not_import_ray() -> None:
    """worker.py: no ray import, so it is tested without a cluster."""
    modules = imported("vcf_batch.worker")
    assert "ray" not in modules
    assert not modules & {"vcf_batch.cli", "vcf_batch.pool"}


def test_ray_is_known_to_the_pool_and_the_training_alone() -> None:
    """ray is imported in pool/ and, for Ray Train, in vcf/train.py alone, at their tops or within."""
    package = Path(__file__).parent.parent / "vcf_batch"
    knows = {path for path in package.rglob("*.py") if re.search(r"^\s*(import|from) ray\b", path.read_text(), re.M)}
    assert {str(path.relative_to(package)) for path in knows if path.parent != package / "pool"} == {"vcf/train.py"}


def test_training_without_a_cluster_does_not_import_ray() -> None:
    assert "ray" not in imported("vcf_batch.vcf.fit")


def test_the_driver_of_a_training_leaves_the_models_to_the_workers() -> None:
    assert not imported("vcf_batch.vcf.train") & {"diffusers", "transformers"}


def test_pool_leaves_torch_to_the_workers() -> None:
    """ray is imported in pool/; the driver itself needs no torch."""
    modules = imported("vcf_batch.pool")
    assert "ray" in modules
    assert "torch" not in modules


@pytest.mark.parametrize("module", ["vcf_batch.metrics.scorer", "vcf_batch.metrics.lpips", "vcf_batch.vcf.evaluate"])
def test_ray_and_diffusers_stay_out(module: str) -> None:
    """ray is for pool/; diffusers for what samples, not for what scores and compares."""
    assert not imported(module) & {"ray", "diffusers"}
