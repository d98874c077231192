"""Runs on Ray of models in the published layouts, killed and resumed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from support import ip_adapters, runs, sd_layouts
from vcf_batch.models.parts import Parts
from vcf_batch.training.assembly import assemble
from vcf_batch.vcf.aligner import ImageAligner

SAVED: dict[str, Callable[[Path], Path]] = {"sd15": sd_layouts.save_sd15, "sdxl": sd_layouts.save_sdxl}
"""Families of Stable Diffusion, each with what saves a tiny one."""


def save_models(folder: Path, family: str) -> Path:
    """Save ``base``, a Stable Diffusion; ``vcf``, the same with a random aligner; ``judge``; and ``adapter``. Where the
    base is."""
    base, encoder = SAVED[family](folder / "base"), sd_layouts.save_clip(folder / "clip", act="quick_gelu")
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    torch.manual_seed(1)
    ImageAligner(40, unet.config.cross_attention_dim).save_pretrained(folder / "aligner")
    parts = Parts.resolve(str(base), image_encoder=str(encoder))
    assemble(parts, str(folder / "aligner"), str(folder / "vcf"), torch.float32)
    sd_layouts.save_clip(folder / "judge")
    ip_adapters.save_adapter(folder / "adapter" / f"ip-adapter_{family}.safetensors", unet)
    ip_adapters.save_encoder(folder / "adapter" / "image_encoder")
    return base


def command(models: Path, manifest: Path, output: Path, fusion: str, **more: object) -> list[str]:
    """A run of the saved models with two workers, in shards of eight rows."""
    options = {
        "model": models / ("base" if fusion == "ip_adapter" else "vcf"),
        "judge": models / "judge",
        "fusion": fusion,
        "steps": 2,
        "shard-size": 8,
        "batch-size": 4,
        "num-workers": 2,
        "address": "local",
        **more,
        **({"ip-adapter": models / "adapter"} if fusion == "ip_adapter" else {}),
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "vcf_batch", "generate", str(manifest), str(output), *given]


def kill_and_resume(command: Callable[[Path], list[str]], folder: Path, shards: int) -> Path:
    """Check that a run that is killed once a shard is finished, and resumed, has the bytes of an undisturbed one.

    Args:
        command: the run, for an output.
        folder: folder for the outputs.
        shards: number of shards of the run.

    Returns:
        The output of the run that was killed.
    """
    whole, out = folder / "whole", folder / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(whole), env=environment, check=True, capture_output=True)
    with open(folder / "log", "w") as log:
        driver = subprocess.Popen(command(out), env=environment, stderr=log, start_new_session=True)
    while driver.poll() is None and not [*out.glob("*_stats.json")]:
        time.sleep(0.05)
    assert driver.poll() is None, (folder / "log").read_text()
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert 0 < len([*out.glob("*_stats.json")]) < shards
    subprocess.run(command(out), env=environment, check=True, capture_output=True)
    assert runs.data_files(out) == runs.data_files(whole)
    return out
