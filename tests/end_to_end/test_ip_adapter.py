"""The demo manifest on Stable Diffusion 1.5 and XL in their published layouts, by fusions, killed and resumed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from support import ip_adapters, runs, sd_layouts
from vcf_batch.models.parts import Parts
from vcf_batch.training.assembly import assemble
from vcf_batch.vcf.aligner import ImageAligner

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("restored_torch")]

DEMO = Path(__file__).parents[2] / "manifests" / "demo.parquet"


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion with a random aligner, a judge and an IP-Adapter beside it."""
    folder = tmp_path_factory.mktemp("models")
    saved: dict[str, Callable[[Path], Path]] = {"sd15": sd_layouts.save_sd15, "sdxl": sd_layouts.save_sdxl}
    base, encoder = saved[request.param](folder / "base"), sd_layouts.save_clip(folder / "clip", act="quick_gelu")
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    torch.manual_seed(1)
    ImageAligner(40, unet.config.cross_attention_dim).save_pretrained(folder / "aligner")
    parts = Parts.resolve(str(base), image_encoder=str(encoder))
    assemble(parts, str(folder / "aligner"), str(folder / "vcf"), torch.float32)
    sd_layouts.save_clip(folder / "judge")
    ip_adapters.save_adapter(folder / "adapter" / f"ip-adapter_{request.param}.safetensors", unet)
    ip_adapters.save_encoder(folder / "adapter" / "image_encoder")
    return folder


def command(model: Path, output: Path, fusion: str) -> list[str]:
    options = {
        "model": model / ("base" if fusion == "ip_adapter" else "vcf"),
        "judge": model / "judge",
        "fusion": fusion,
        "steps": 2,
        "shard-size": 8,
        "batch-size": 4,
        "num-workers": 2,
        "address": "local",
        **({"ip-adapter": model / "adapter"} if fusion == "ip_adapter" else {}),
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "vcf_batch", "generate", str(DEMO), str(output), *given]


@pytest.mark.parametrize("fusion", ["concat", "naive", "ip_adapter"])
def test_a_killed_run_that_is_resumed_has_the_bytes_of_an_undisturbed_one(
    model: Path, tmp_path: Path, fusion: str
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(model, tmp_path / "whole", fusion), env=environment, check=True, capture_output=True)
    with open(tmp_path / "log", "w") as log:
        driver = subprocess.Popen(
            command(model, tmp_path / "out", fusion), env=environment, stderr=log, start_new_session=True
        )
    while driver.poll() is None and not [*(tmp_path / "out").glob("*_stats.json")]:
        time.sleep(0.05)
    assert driver.poll() is None, (tmp_path / "log").read_text()
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert 0 < len([*(tmp_path / "out").glob("*_stats.json")]) < 8
    subprocess.run(command(model, tmp_path / "out", fusion), env=environment, check=True, capture_output=True)
    assert runs.data_files(tmp_path / "out") == runs.data_files(tmp_path / "whole")
    assert [row["status"] for row in runs.rows_of(tmp_path / "out")] == ["success"] * 64
