"""The demo manifest on Stable Diffusion 1.5 and XL in their published layouts, by fusions, killed and resumed."""

from pathlib import Path

import pytest

from support import layout_runs, runs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("restored_torch")]

DEMO = Path(__file__).parents[2] / "manifests" / "demo.parquet"


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion with a random aligner, a judge and an IP-Adapter beside it."""
    folder = tmp_path_factory.mktemp("models")
    layout_runs.save_models(folder, request.param)
    return folder


@pytest.mark.parametrize("fusion", ["concat", "naive", "ip_adapter"])
def test_a_killed_run_that_is_resumed_has_the_bytes_of_an_undisturbed_one(
    models: Path, tmp_path: Path, fusion: str
) -> None:
    out = layout_runs.kill_and_resume(lambda to: layout_runs.command(models, DEMO, to, fusion), tmp_path, 8)
    assert [row["status"] for row in runs.rows_of(out)] == ["success"] * 64
