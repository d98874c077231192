"""Defaults, settled once: a value for every setting that was left open, from the model's JSON files. No torch here."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from vcf_batch import sharding
from vcf_batch.config import (
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_STEPS,
    IP_ADAPTER,
    REFERENCE_PARTS,
    RunConfig,
    default_strengths,
    fingerprint_fields,
)
from vcf_batch.errors import ModelError, UsageError
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.models import resolution
from vcf_batch.models.loading import load_errors
from vcf_batch.models.prompt_tokens import require_vocabulary
from vcf_batch.models.schedule import SCHEDULER_CONFIG, check_schedule
from vcf_batch.setup.job import Job, is_guided
from vcf_batch.setup.run_models import OWN_GUIDE, Models
from vcf_batch.setup.storage_check import is_seen

SILENT_SECONDS, SILENT_STEPS = 600.0, 20.0
"""Time without a heartbeat after which a worker counts as hung: SILENT_SECONDS, or the estimated time of SILENT_STEPS
denoising steps of a batch if that is longer. Reading one reference always takes less than SILENT_SECONDS."""

COMPILING_SECONDS = 3600.0
"""Replacement for SILENT_SECONDS with compiled networks: a new shape is compiled in the middle of a shard, without a
heartbeat."""

UNET_INPUTS = (
    "time_cond_proj_dim",
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim_type",
)
"""Keys of a UNet's configuration that stand for a further input."""

OPERATIONS = 700.0
"""Operations of a UNet forward for each latent position and squared channel: 2.15 TFLOP for Stable Diffusion 2.1 at
768 px."""
PNO_STEP = 3.3
"""Cost of a step of prompt-noise optimisation, in images: forward, forward again for the gradient, and backward."""
GPU_SPEED = 4e13
CPU_SPEED = 2e10
"""Operations a second of a modest data-center GPU in 16 bits, and of one CPU thread."""


def settle(config: RunConfig, manifest: Manifest, resolved: Models) -> Job:
    """Give every setting that was left open its value. Settling a settled configuration changes nothing.

    Args:
        config: the run, with ``gpus_per_worker`` and ``batch_size`` chosen and paths absolute.
        manifest: the manifest of the run.
        resolved: the models of the run.

    Raises:
        ModelError: the model says nothing about its UNet or VAE, its UNet is of another kind, its tokenizer has no
            vocabulary, or the scheduler does not sample as the model's own says; or it cannot take the references that
            the manifest has, or cannot guide, or recommends a value that is no number or out of limits.
        UsageError: references are asked for, and the manifest has none; or the PNO guide is the judge.
    """
    if config.batch_size is None:
        raise UsageError("the batch size is auto, which only a run on a cluster finds out: name a number")
    on_gpu = bool(config.gpus_per_worker)
    model = config.model or resolved.pipeline.name
    index, unet, vae, aligner = (
        resolution.read_config(resolved.pipeline, file)
        for file in ("model_index.json", "unet/config.json", "vae/config.json", "aligner/config.json")
    )
    if not (index and unet and vae):
        raise ModelError(
            f"{model} is not a Stable Diffusion model in diffusers layout: it needs model_index.json, "
            "unet/config.json and vae/config.json"
        )
    _check_unet(model, unet, vae)
    require_vocabulary(resolved.pipeline)
    check_schedule(config.scheduler, resolution.read_config(resolved.pipeline, SCHEDULER_CONFIG) or {}, model)
    # model_index.json gives the library and the class of each part, or two nulls.
    lacking = [name for name in REFERENCE_PARTS if not any(index.get(name) or ())]
    aligned = config.fusion != IP_ADAPTER or manifest.has_any("fusion")
    if lacking and aligned and (manifest.has_any("reference") or manifest.has_any("negative_reference")):
        raise ModelError(
            f"{model} has no {lacking[0]}, and rows of the manifest have references: use the published weights "
            "of an IP-Adapter for it (--fusion ip_adapter --ip-adapter WEIGHTS, and no column 'fusion'), or a model "
            "with a trained aligner, as VCFPipeline.save_pretrained writes it, or remove the column 'reference'"
        )
    if config.unconditional == "negative" and not manifest.has_any("negative_reference"):
        raise UsageError(
            "unconditional is 'negative', but the manifest has no negative references: give them in a column "
            "'negative_reference', or choose zeros or blank"
        )
    if config.pno_steps and not manifest.has_any("reference"):
        raise UsageError(
            f"pno_steps is {config.pno_steps}, but the manifest has no references to follow: give them in a column "
            "'reference', or leave pno_steps at 0"
        )
    guided = is_guided(config, manifest)
    if guided:
        _check_guide(resolved, index)
    _check_quality(config, resolved, manifest)
    with load_errors(f"the configuration of {model}"):
        if config.strength is None:
            strengths = default_strengths(index.get("default_strength"))
            config = config.replace(strength=strengths[config.fusion], default_strengths=strengths)
        native = unet["sample_size"]
        native_height, native_width = (native, native) if isinstance(native, int) else native
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        config = config.replace(
            model=model,
            image_tokens=config.image_tokens or (aligner or {}).get("tokens"),
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
        seconds = _seconds_per_sample(config, unet["block_out_channels"], factor)
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
    )
    fields["lpips"] = resolved.lpips
    if on_gpu:
        # CPUs beside a GPU only prepare and encode, and no sum in the output depends on their number.
        del fields["cpus_per_worker"]
    return Job(config, manifest, resolved, fields, tuple(root for root in config.reference_root if is_seen(root)))


def _check_unet(model: str, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Refuse a UNet that takes more than noise, timestep and text, before its first batch fails or goes wrong."""
    latent = vae.get("latent_channels", 4)
    for name in ("in_channels", "out_channels"):
        if unet.get(name, 4) != latent:
            raise ModelError(
                f"{name} is {unet[name]!r:.60} in unet/config.json of {model}, and its VAE's latents have "
                f"{latent!r:.60} channels; use a model that needs text alone, not one for inpainting or editing"
            )
    for name in UNET_INPUTS:
        if unet.get(name) is not None:
            raise ModelError(
                f"{name} is {unet[name]!r:.60} in unet/config.json of {model}, so its UNet needs a further input; use "
                "a Stable Diffusion 1 or 2, neither distilled nor XL"
            )


def _check_guide(resolved: Models, index: Mapping[str, Any]) -> None:
    """Check the guide before its weights are loaded; workers compare the weights of guide and judge."""
    if resolved.pno_guide is None and not any(index.get(OWN_GUIDE) or ()):
        raise ModelError(
            f"{resolved.pipeline.name} has no image encoder of its own to guide prompt-noise optimisation: name a CLIP "
            "with --pno-guide"
        )
    if resolved.pno_guide is None and "Projection" not in index[OWN_GUIDE][1]:
        raise ModelError(
            f"the image encoder of {resolved.pipeline.name} is a {index[OWN_GUIDE][1]}, whose images "
            "cannot be compared without a projection: name a PNO guide with --pno-guide"
        )
    if resolved.guide_identity == resolved.judge_identity:
        assert resolved.pno_guide
        raise UsageError(
            f"{resolved.pno_guide.name} is both the PNO guide and the judge, so PNO would raise its "
            "own marks: name another guide with --pno-guide, or another judge with --judge"
        )


def _check_quality(config: RunConfig, resolved: Models, manifest: Manifest) -> None:
    """Refuse gates that no sample can miss, and triplets without a reference: both are mistakes."""
    for name in sorted(config.gates.keys() & {"max_lpips", "min_style_similarity"}):
        if resolved.lpips == "none":
            raise UsageError(
                f"{name} is {getattr(config, name):g}, but there is no perceptual network to measure it: name one with "
                "--lpips, or leave the gate out"
            )
    if config.best_by in ("lpips", "style_similarity") and resolved.lpips == "none":
        raise UsageError(
            f"best_by is {config.best_by}, but there is no perceptual network to measure it: name one with --lpips, or "
            "another score"
        )
    if manifest.has_any("reference"):
        return
    if config.triplets:
        raise UsageError(
            "triplets need a reference in each row, and the manifest has none: give them in a column 'reference', or "
            "leave --triplets out"
        )
    for name in sorted(config.gates.keys() - {"min_clip_score"}):
        raise UsageError(
            f"{name} is {getattr(config, name):g}, but the manifest has no references to compare with: give them "
            "in a column 'reference', or leave the gate out"
        )


def _seconds_per_sample(config: RunConfig, channels: Sequence[int], factor: int) -> float:
    """Estimate on the slow side, from the UNet's shape: operations grow with the area and the square of the
    channels."""
    area = cast(int, config.height) * cast(int, config.width) / factor**2
    operations = OPERATIONS * area * sum(width**2 / 4**level for level, width in enumerate(channels))
    speed = GPU_SPEED if config.gpus_per_worker else CPU_SPEED * config.cpus_per_worker
    return 2 * cast(int, config.steps) * (1 + PNO_STEP * config.pno_steps) * operations / speed
