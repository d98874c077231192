"""Rows with LoRAs of their own beside rows with none, on Stable Diffusion 1.5 and XL, killed and resumed on Ray."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from support import layout_runs, loras, runs
from vcf_batch import images
from vcf_batch.config.limits import MAX_PIXELS
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
    base = layout_runs.save_models(folder, request.param)
    names = [*loras.names_of(folder / "in", VCFPipeline.from_pretrained(str(base)), 4, loras.EVERYTHING)]
    values = [f"{names[row % 3]}:{0.25 * (row % 5)}" for row in range(ROWS)]
    columns = {
        "reference": [None if row % 4 == 1 else f"reference{row % 3}.png" for row in range(ROWS)],
        "lora": [None if row % 4 == 3 else "" if row % 4 == 2 else values[row] for row in range(ROWS)],
    }
    runs.write_manifest(folder / "in", ROWS, columns)
    return folder


@pytest.mark.parametrize("fusion", ["concat", "ip_adapter"])
def test_a_killed_run_with_loras_by_row_has_the_bytes_of_an_undisturbed_one_and_stock_images(
    model: Path, tmp_path: Path, fusion: str
) -> None:
    """Rows without a reference are compared with the pipelines of diffusers, which have loaded the same LoRA."""
    lora = f"all={model}/in/lora3.safetensors:{RUN_SCALE}"
    out = layout_runs.kill_and_resume(
        lambda to: layout_runs.command(model, model / "in", to, fusion, lora=lora), tmp_path, 4
    )
    rows = runs.rows_of(out)
    assert [row["status"] for row in rows] == ["success"] * ROWS
    text_only = [row for row in rows if row["reference"] is None]
    assert len({str(row["lora"]) for row in text_only}) == 8
    given = pq.read_table(model / "in" / "manifest.parquet")["lora"].to_pylist()
    drawn = pictures(out)
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
