"""Load and sample Stable Diffusion 1.5 with an IP-Adapter at full size: ``python benchmarks/ip_adapter.py``.

The files have the published layouts, shapes and sizes, and random weights: Stable Diffusion 1.5 with 860 M parameters
in its UNet, ``ip-adapter_sd15.safetensors``, and ViT-H beside it. A process of its own loads them in bfloat16 and
samples an image of 512 x 512 pixels on the CPU. Its peak memory is printed. The files take 4 GB.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import safetensors.torch
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from full_size import FULL, MEAN, STD, tokenizer
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from vcf_batch.vcf import quiet
from vcf_batch.vcf.pipeline import VCFPipeline

WIDTH, EMBEDDING = 768, 1024
"""Widths of the text tokens and of ViT-H's embedding."""
LIMIT = 12.0
"""Peak memory in GiB that is allowed."""


def save(folder: Path) -> None:
    """Write the files: ``sd15``, and ``IP-Adapter/models`` as the Hub's repository has it."""
    blocks = {name: FULL.unet[name] for name in ("block_out_channels", "down_block_types", "up_block_types")}
    depth = len(FULL.vae["block_out_channels"])
    words = tokenizer(FULL)
    special = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {"hidden_size": WIDTH, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    unet = UNet2DConditionModel(sample_size=64, attention_head_dim=8, cross_attention_dim=WIDTH, **blocks)
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            **FULL.vae,
            down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth,
            latent_channels=4,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text, **special)),
        tokenizer=words,
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False),
        safety_checker=None,
        feature_extractor=CLIPImageProcessorPil(image_mean=MEAN, image_std=STD),
        requires_safety_checker=False,
    ).to(dtype=torch.bfloat16).save_pretrained(folder / "sd15")
    tensors: dict[str, Tensor] = {
        "image_proj.proj.weight": torch.randn(4 * WIDTH, EMBEDDING) / EMBEDDING**0.5,
        "image_proj.proj.bias": torch.zeros(4 * WIDTH),
        "image_proj.norm.weight": torch.ones(WIDTH),
        "image_proj.norm.bias": torch.zeros(WIDTH),
    }
    for number, name in enumerate(unet.attn_processors):
        if number % 2:
            width = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
            for kind in "kv":
                tensors[f"ip_adapter.{number}.to_{kind}_ip.weight"] = torch.randn(width, WIDTH) / WIDTH**0.5
    models = folder / "IP-Adapter" / "models"
    models.mkdir(parents=True)
    halves = {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
    safetensors.torch.save_file(halves, models / "ip-adapter_sd15.safetensors")
    vision = CLIPVisionConfig(**FULL.vision, projection_dim=EMBEDDING)
    CLIPVisionModelWithProjection(vision).to(torch.bfloat16).save_pretrained(models / "image_encoder")


def sample(folder: Path, steps: int) -> None:
    """Load the files, sample an image, and print seconds and peak memory."""
    begin = time.perf_counter()
    pipeline = VCFPipeline.from_pretrained(folder / "sd15", dtype=torch.bfloat16, local_files_only=True)
    models = folder / "IP-Adapter" / "models"
    pipeline.use_ip_adapter(str(models / "ip-adapter_sd15.safetensors"), str(models / "image_encoder"))
    pipeline.set_up("cpu")
    loaded = time.perf_counter()
    picture = Image.effect_noise((640, 480), 80).convert("RGB")
    images = pipeline.generate(["a photo of a cat"], [picture], seeds=[0], fusion="ip_adapter", steps=steps)
    taken = time.perf_counter() - loaded
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    click.echo(f"loaded in {loaded - begin:.0f} s, {steps} steps at {images.shape[2]} px in {taken:.0f} s")
    click.echo(f"peak memory: {peak:.1f} GiB (limit {LIMIT:g}); all values finite: {bool(images.isfinite().all())}")
    if peak > LIMIT:
        raise SystemExit(1)


@click.command()
@click.option("--steps", default=2, show_default=True, help="Denoising steps.")
@click.option("--files", help="Folder with the files, which are written if they are not there.  [default: temporary]")
@click.option("--load", is_flag=True, help="Load and sample in this process, from --files.")
def main(steps: int, files: str | None, load: bool) -> None:
    """Print the peak memory. Exit with 1 if it is above the limit."""
    quiet()
    if load:
        if files is None:
            raise click.UsageError("--load needs --files")
        sample(Path(files), steps)
        return
    with tempfile.TemporaryDirectory(prefix="vcf-batch-sd15-") as temporary:
        folder = Path(files or temporary)
        if not (folder / "sd15").exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                save(folder)
        subprocess.run([sys.executable, __file__, "--load", "--files", str(folder), "--steps", str(steps)], check=True)


if __name__ == "__main__":
    main()
