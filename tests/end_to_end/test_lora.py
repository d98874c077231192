"""Rows with LoRAs of their own beside rows with none, on Stable Diffusion 1.5 and XL, killed and resumed on Ray."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from support import ip_adapters, loras, runs, sd_layouts
from vcf_batch import images
from vcf_batch.config import MAX_PIXELS
from vcf_batch.models.parts import Parts
from vcf_batch.training.assembly import assemble
from vcf_batch.vcf.aligner import ImageAligner
from vcf_batch.vcf.pipeline import VCFPipeline
from vcf_batch.vcf.sampling import make_scheduler

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("restored_torch")]

ROWS = 32
RUN_SCALE = 0.5


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion with a random aligner; beside it a judge, an IP-Adapter, LoRAs and a manifest.

    Of four rows one has a LoRA of its own and a reference, one has a LoRA and no reference, one asks for none, and one
    has that of the run.
    """
    folder = tmp_path_factory.mktemp(request.param)
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
    names = [*loras.names_of(folder / "in", VCFPipeline.from_pretrained(str(base)), 4, loras.EVERYTHING)]
    values = [f"{names[row % 3]}:{0.25 * (row % 5)}" for row in range(ROWS)]
    columns = {
        "reference": [None if row % 4 == 1 else f"reference{row % 3}.png" for row in range(ROWS)],
        "lora": [None if row % 4 == 3 else "" if row % 4 == 2 else values[row] for row in range(ROWS)],
    }
    runs.write_manifest(folder / "in", ROWS, columns)
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
        "lora": f"all={model}/in/lora3.safetensors:{RUN_SCALE}",
        **({"ip-adapter": model / "adapter"} if fusion == "ip_adapter" else {}),
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "vcf_batch", "generate", str(model / "in"), str(output), *given]


@pytest.mark.parametrize("fusion", ["concat", "ip_adapter"])
def test_a_killed_run_with_loras_by_row_has_the_bytes_of_an_undisturbed_one_and_stock_images(
    model: Path, tmp_path: Path, fusion: str
) -> None:
    """Rows without a reference are compared with the pipelines of diffusers, which have loaded the same LoRA."""
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
    assert 0 < len([*(tmp_path / "out").glob("*_stats.json")]) < 4
    subprocess.run(command(model, tmp_path / "out", fusion), env=environment, check=True, capture_output=True)
    assert runs.data_files(tmp_path / "out") == runs.data_files(tmp_path / "whole")
    rows = runs.rows_of(tmp_path / "out")
    assert [row["status"] for row in rows] == ["success"] * ROWS
    text_only = [row for row in rows if row["reference"] is None]
    assert len({str(row["lora"]) for row in text_only}) == 8
    given = pq.read_table(model / "in" / "manifest.parquet")["lora"].to_pylist()
    drawn = pictures(tmp_path / "out")
    for row in text_only:
        expected = stock(model, row, given[int(row["key"])])
        assert abs(drawn[row["key"]] - expected).max() < 0.5 / 255 + 1e-4, row["key"]


def pictures(output: Path) -> dict[str, Any]:
    """The images of a run by key, ``[H, W, 3]`` in [0, 1], rounded to 8 bits."""
    files = [runs.Files(output, path.stem).members for path in sorted(output.glob("*.tar"))]
    return {
        name.partition(".")[0]: np.asarray(images.decode(data, MAX_PIXELS), np.float32) / 255
        for members in files
        for name, data in members
        if name.endswith(".png")
    }


def stock(model: Path, row: dict[str, Any], lora: str) -> Any:
    """The image of diffusers' own pipeline for a row, ``[H, W, 3]`` in [0, 1]."""
    is_xl = (model / "base" / "text_encoder_2").exists()
    kind: Any = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
    extra: dict[str, Any] = {"add_watermarker": False} if is_xl else {"safety_checker": None}
    pipeline = kind.from_pretrained(model / "base", **extra)
    pipeline.set_progress_bar_config(disable=True)
    own = pipeline.scheduler
    pipeline.scheduler = make_scheduler("ddim", {**own.config, "_class_name": type(own).__name__})
    name, _, scale = lora.rpartition(":")
    pipeline.load_lora_weights(str(model / "in"), weight_name=name, adapter_name="one")
    pipeline.set_adapters(["one"], [float(scale)])
    given = {"num_inference_steps": row["steps"], "guidance_scale": row["guidance_scale"], "output_type": "np"}
    return pipeline(row["prompt"], generator=torch.Generator().manual_seed(row["seed"]), **given).images[0]
