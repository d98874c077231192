"""Load and sample Stable Diffusion 1.5 with an IP-Adapter at full size: ``python benchmarks/ip_adapter.py``.

The files have the published layouts, shapes and sizes, and random weights: Stable Diffusion 1.5 with 860 M parameters
in its UNet, ``ip-adapter_sd15.safetensors``, and ViT-H beside it. A process of its own loads them in bfloat16 and
samples an image of 512 x 512 pixels on the CPU. Its peak memory is printed. The files take 4 GB. Where the CPU has no
products of bfloat16, each layer is computed in float32.

``--xl`` takes Stable Diffusion XL with 2,567 M parameters in its UNet, an aligner and ViT-H, and the fusion concat. Its
files take 9 GB.
"""

import functools
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from full_size import FULL, FULL_XL, MEAN, STD, pipeline, tokenizer
from PIL import Image
from torch import Tensor, nn
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
XL_LIMIT = 14.0
"""The same for Stable Diffusion XL."""


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


def save_xl(folder: Path) -> None:
    """Write ``sdxl``, with image encoder and aligner. Its VAE is in float32, as the published one is loaded."""
    made = pipeline(FULL_XL, "meta", torch.bfloat16)
    noise = torch.randn(1 << 26) / 50  # as many numbers as the largest of the weights has, and more
    for part in made.components.values():
        if isinstance(part, nn.Module):
            part.to_empty(device="cpu")
            for name, values in part.named_parameters():
                if values.ndim > 1:
                    values.data.copy_(noise[: values.numel()].view_as(values))
                else:
                    values.data.fill_(float(name.endswith("weight")))  # 1 in norms, 0 in biases
    made.save_pretrained(folder / "sdxl")


def use_float32(network: nn.Module) -> None:
    """Compute each layer of a network in float32, for a CPU without products of bfloat16."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.forward = functools.partial(_forward, layer)  # type: ignore[method-assign]


def _forward(layer: nn.Linear | nn.Conv2d, inputs: Tensor) -> Tensor:
    weight, bias = layer.weight.float(), None if layer.bias is None else layer.bias.float()
    if isinstance(layer, nn.Linear):
        return F.linear(inputs.float(), weight, bias).to(inputs.dtype)
    return layer._conv_forward(inputs.float(), weight, bias).to(inputs.dtype)


def sample(folder: Path, steps: int, is_xl: bool) -> None:
    """Load the files, sample an image, and print seconds and peak memory."""
    begin = time.perf_counter()
    loaded = VCFPipeline.from_pretrained(folder / ("sdxl" if is_xl else "sd15"), dtype=torch.bfloat16)
    if not is_xl:
        models = folder / "IP-Adapter" / "models"
        loaded.use_ip_adapter(str(models / "ip-adapter_sd15.safetensors"), str(models / "image_encoder"))
    loaded.set_up("cpu")
    is_slow = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for part in loaded.components.values():
        if is_slow and isinstance(part, nn.Module):
            use_float32(part)
    ready = time.perf_counter()
    picture = Image.effect_noise((640, 480), 80).convert("RGB")
    settings: dict[str, Any] = {
        "fusion": "concat" if is_xl else "ip_adapter",
        "steps": steps,
        "height": 512,
        "width": 512,
    }
    images = loaded.generate(["a photo of a cat"], [picture], seeds=[0], **settings)
    taken = time.perf_counter() - ready
    peak, limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, XL_LIMIT if is_xl else LIMIT
    parts = {name: part.dtype for name, part in loaded.components.items() if isinstance(part, nn.Module)}
    click.echo(", ".join(f"{name} in {dtype}" for name, dtype in parts.items()))
    if is_slow:
        click.echo("each layer computed in float32, as this CPU has no products of bfloat16")
    click.echo(f"loaded in {ready - begin:.0f} s, {steps} steps at {images.shape[2]} px in {taken:.0f} s")
    click.echo(f"peak memory: {peak:.1f} GiB (limit {limit:g}); all values finite: {bool(images.isfinite().all())}")
    if peak > limit:
        raise SystemExit(1)


@click.command()
@click.option("--steps", default=2, show_default=True, help="Denoising steps.")
@click.option("--files", help="Folder with the files, which are written if they are not there.  [default: temporary]")
@click.option("--xl", is_flag=True, help="Stable Diffusion XL with an aligner, instead of 1.5 with an IP-Adapter.")
@click.option("--load", is_flag=True, help="Load and sample in this process, from --files.")
def main(steps: int, files: str | None, xl: bool, load: bool) -> None:
    """Print the peak memory. Exit with 1 if it is above the limit."""
    quiet()
    if load:
        if files is None:
            raise click.UsageError("--load needs --files")
        sample(Path(files), steps, xl)
        return
    with tempfile.TemporaryDirectory(prefix="vcf-batch-full-") as temporary:
        folder = Path(files or temporary)
        if not (folder / ("sdxl" if xl else "sd15")).exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                (save_xl if xl else save)(folder)
        command = [sys.executable, __file__, "--load", "--files", str(folder), "--steps", str(steps)]
        subprocess.run([*command, "--xl"] if xl else command, check=True)


if __name__ == "__main__":
    main()
