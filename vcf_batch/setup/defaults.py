"""Defaults, settled once: a value for every setting that was left open, from the model's JSON files. No torch here."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from vcf_batch import sharding
from vcf_batch.config.fingerprint import fingerprint_fields
from vcf_batch.config.limits import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS, IP_ADAPTER
from vcf_batch.config.run_config import RunConfig
from vcf_batch.config.strengths import default_strengths
from vcf_batch.errors import UsageError
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.models import resolution
from vcf_batch.models.loading import load_errors
from vcf_batch.setup.calibrated_gates import with_calibrated_gates
from vcf_batch.setup.job import Job, fusions_of, is_guided
from vcf_batch.setup.run_models import Models
from vcf_batch.setup.storage_check import is_seen

SILENT_SECONDS, SILENT_STEPS = 600.0, 20.0
"""Time without a heartbeat after which a worker counts as hung: SILENT_SECONDS, or the estimated time of SILENT_STEPS
denoising steps of a batch if that is longer. Reading one reference always takes less than SILENT_SECONDS."""

COMPILING_SECONDS = 3600.0
"""Replacement for SILENT_SECONDS with compiled networks: a new shape is compiled in the middle of a shard, without a
heartbeat."""

OPERATIONS = 700.0
"""Operations of a UNet forward for each latent position and squared channel: 2.15 TFLOP for Stable Diffusion 2.1 at
768 px, whose blocks of attention have one layer each."""
LAYER_OPERATIONS = 220.0
"""What each further layer of a level's blocks of attention adds to OPERATIONS: 7.2 TFLOP for Stable Diffusion XL at
1024 px, whose levels have 1, 2 and 10 layers. Counted are 7.0 (benchmarks/counts.py)."""
PNO_STEP = 3.3
"""Cost of a step of prompt-noise optimisation, in images: forward, forward again for the gradient, and backward."""
GPU_SPEED = 4e13
CPU_SPEED = 2e10
"""Operations a second of a modest data-center GPU in 16 bits, and of one CPU thread."""

_BEFORE_0_9 = re.compile(r"0\.[0-8]\.")


def settle(config: RunConfig, manifest: Manifest, resolved: Models) -> Job:
    """Give every setting that was left open its value. Settling a settled configuration changes nothing.

    Args:
        config: the run, with ``gpus_per_worker`` and ``batch_size`` chosen and paths absolute.
        manifest: the manifest of the run.
        resolved: the models of the run, as :func:`vcf_batch.setup.model_check.check` has found them.

    Raises:
        ModelError: the model recommends a value that is no number or out of limits.
        UsageError: the batch size is open, or a calibration has no number for a gate.
        StorageError: the storage failed.
    """
    if config.batch_size is None:
        raise UsageError("the batch size is auto, which only a run on a cluster finds out: name a number")
    config = with_calibrated_gates(config, resolved)
    on_gpu = bool(config.gpus_per_worker)
    model = config.model or resolved.pipeline.name
    index, unet, vae, aligner = (
        resolution.read_config(resolved.pipeline, file)
        for file in ("model_index.json", "unet/config.json", "vae/config.json", "aligner/config.json")
    )
    assert index and unet and vae, "the check of the models has found them"
    guided = is_guided(config, manifest)
    is_aligned = fusions_of(config, manifest) != {IP_ADAPTER}
    with load_errors(f"the configuration of {model}"):
        if config.strength is None:
            strengths = default_strengths(aligner, index)
            config = config.replace(strength=strengths[config.fusion], default_strengths=strengths)
        native_height, native_width = _native_size(unet)
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        config = config.replace(
            model=model,
            image_tokens=config.image_tokens or (aligner or {}).get("tokens") if is_aligned else None,
            steps=config.steps or index.get("default_steps", DEFAULT_STEPS),
            guidance_scale=(
                index.get("default_guidance_scale", DEFAULT_GUIDANCE_SCALE)
                if config.guidance_scale is None
                else config.guidance_scale
            ),
            height=config.height or native_height * factor,
            width=config.width or native_width * factor,
            dtype=("bfloat16" if on_gpu else "float32") if config.dtype == "auto" else config.dtype,
        )
        seconds = _seconds_per_sample(config, _operations(unet), factor)
    if config.shard_size is None:
        config = config.replace(
            shard_size=sharding.default_shard_size(manifest.num_rows, cast(int, config.batch_size), seconds)
        )
    if config.stall_timeout is None:
        step = cast(int, config.batch_size) * seconds / cast(int, config.steps)
        silent = COMPILING_SECONDS if config.compile else SILENT_SECONDS
        config = config.replace(stall_timeout=max(silent, SILENT_STEPS * step))
    if manifest.is_whole:
        config = config.replace(limit=None)  # which is the same run
    fields = fingerprint_fields(
        config,
        manifest=manifest.identity,
        model=resolved.pipeline.identity,
        judge=resolved.judge_identity,
        lpips=resolved.lpips_identity,
        pno_guide=resolved.guide_identity if guided else None,
        safety_checker=resolved.safety_identity,
        ip_adapter=resolved.ip_adapter_identity,
        lora=resolved.lora_identity,
    )
    fields["lpips"] = resolved.lpips
    if on_gpu:
        # CPUs beside a GPU only prepare and encode, and no sum in the output depends on their number.
        del fields["cpus_per_worker"]
    return Job(config, manifest, resolved, fields, tuple(root for root in config.reference_root if is_seen(root)))


def _operations(unet: Mapping[str, Any]) -> float:
    """Estimated operations of a UNet forward for each latent position, from the channels and layers of its levels."""
    channels: Sequence[int] = unet["block_out_channels"]
    layers = unet.get("transformer_layers_per_block", 1)
    layers = [layers] * len(channels) if isinstance(layers, int) else layers
    return sum(
        (OPERATIONS + LAYER_OPERATIONS * (count - 1)) * width**2 / 4**level
        for level, (width, count) in enumerate(zip(channels, layers, strict=True))
    )


def _native_size(unet: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the latents that a UNet was trained on.

    diffusers before 0.9 wrote 32 for Stable Diffusion 1.x, and its pipelines take that for 64.
    """
    size = unet["sample_size"]
    if not isinstance(size, int):
        height, width = size
        return height, width
    is_old = _BEFORE_0_9.match(unet.get("_diffusers_version", "")) is not None
    return (64, 64) if is_old and size < 64 else (size, size)


def _seconds_per_sample(config: RunConfig, operations: float, factor: int) -> float:
    """Estimate on the slow side, from the operations of a UNet forward for each latent position."""
    area = cast(int, config.height) * cast(int, config.width) / factor**2
    speed = GPU_SPEED if config.gpus_per_worker else CPU_SPEED * config.cpus_per_worker
    return 2 * cast(int, config.steps) * (1 + PNO_STEP * config.pno_steps) * operations * area / speed
