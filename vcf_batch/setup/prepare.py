"""What the driver settles before a worker starts: a value for every default, an output of its own.

Neither torch nor Ray is needed for that.
"""

import importlib.metadata
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import vcf_batch
from vcf_batch import sharding, storage
from vcf_batch.config import (
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_STEPS,
    REFERENCE_PARTS,
    RunConfig,
    fingerprint,
    fingerprint_fields,
)
from vcf_batch.errors import ModelError, StorageError, UsageError, redact
from vcf_batch.manifest import appended
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.models import resolution
from vcf_batch.output import commits, lease, receipts, run_file
from vcf_batch.setup.run_models import OWN_GUIDE, Models
from vcf_batch.sharding import ShardPlan

SILENT_SECONDS, SILENT_STEPS = 600.0, 20.0
"""A worker hangs that gives no sign of life for so long, and not in the time of so many denoising steps of a batch
either. No reference takes longer to read than the first."""

COMPILING_SECONDS = 3600.0
"""The same with compiled networks: a new shape is compiled in the middle of a shard, without a sign of life."""

OPERATIONS = 700.0
"""Of a UNet forward, for each latent position and squared channel: 2.15 TFLOP for Stable Diffusion 2.1 at 768 px."""
PNO_STEP = 3.3
"""What a step of prompt-noise optimisation costs, in images: forward, forward again for the gradient, and backward."""
GPU_SPEED = 4e13
CPU_SPEED = 2e10
"""Operations a second, of a modest data-center GPU in 16 bits and of one CPU thread."""

TRACE = "profile/trace.json"
"""Where ``--profile`` leaves its trace in an output."""


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know of a run. Small, and picklable."""

    config: RunConfig
    """With every default resolved and every path absolute."""
    manifest: Manifest
    models: Models
    fields: dict[str, Any]
    """What the fingerprint covers."""
    roots: tuple[str, ...] = ()
    """Places of references, besides the manifest's own folder, that the driver sees."""
    token: str = ""
    """Of the driver's lease, which every node has to see."""
    extends: tuple[str, ...] = ()
    """Fingerprints of the run before rows were appended to its manifest. Receipts that have them are its own."""
    again: Mapping[int, bytes] = field(default_factory=dict)
    """Shards that are generated again though they may exist, by index: of each row, 1 if it is generated, 0 if the
    committed sample stays."""
    profiled: int | None = None
    """Index of the shard whose first batches are recorded for ``--profile``."""

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.fields)

    @property
    def guided(self) -> bool:
        return is_guided(self.config, self.manifest)

    @property
    def shards(self) -> ShardPlan:
        assert self.config.shard_size is not None
        return ShardPlan(self.manifest.num_rows, self.config.shard_size)


def absolute(config: RunConfig) -> RunConfig:
    """Make paths absolute, so that they mean the same to every process.

    Raises:
        UsageError: an output in the temporary working directory of a Ray job, which is where a relative one would go.
    """
    return config.replace(
        manifest=storage.absolute(config.manifest),
        output=absolute_output(config.output),
        reference_root=tuple(storage.absolute(root) for root in config.reference_root),
    )


def absolute_output(url: str) -> str:
    """The output's absolute path or URL.

    Raises:
        UsageError: it lies in the temporary working directory of a Ray job, which is where a relative one would go.
    """
    output = storage.absolute(url)
    if storage.is_local(output) and any(map(_is_job_copy, Path(output).parts)):
        raise UsageError(
            f"output {url!r} lies in the temporary copy of the directory that this job was submitted with "
            f"({output}), which Ray deletes: name an absolute path on shared storage, or a URL such as s3://bucket/folder"
        )
    return output


def _is_job_copy(folder: str) -> bool:
    return folder == "working_dir_files" or folder.startswith("_ray_pkg_")


def resume(config: RunConfig, found: Mapping[str, Any] | None) -> RunConfig:
    """Take what is left open, and what a later start could settle otherwise, from the run that has begun the output.

    Args:
        found: the output's ``run.json``.

    Raises:
        StorageError: the storage failed.
    """
    names = [name for name in ("shard_size", "batch_size", "gpus_per_worker") if getattr(config, name) is None]
    if found is None or not names or not commits.any_committed(config.output):
        return config
    return config.replace(**{name: found.get("config", {}).get(name) for name in names})


def is_guided(config: RunConfig, manifest: Manifest) -> bool:
    """Whether a row may be brought closer to its reference by prompt-noise optimisation."""
    return (config.pno_steps > 0 or manifest.has_any("pno_steps")) and manifest.has_any("reference")


def settle(config: RunConfig, manifest: Manifest, resolved: Models) -> Job:
    """Give every setting that was left open its value.

    Args:
        config: with ``gpus_per_worker`` and ``batch_size`` resolved.

    Raises:
        ModelError: the model says nothing about its UNet or VAE, or cannot take the references that the manifest has,
            or cannot guide.
        UsageError: references are asked for, and the manifest has none; or the judge is to guide.
    """
    if config.batch_size is None:
        raise UsageError("the batch size is auto, which only a run on a cluster finds out: name a number")
    on_gpu = bool(config.gpus_per_worker)
    index, unet, vae, aligner = (
        resolution.read_config(resolved.pipeline, file)
        for file in ("model_index.json", "unet/config.json", "vae/config.json", "aligner/config.json")
    )
    if not (index and unet and vae):
        raise ModelError(
            f"{config.model} is not a Stable Diffusion model in diffusers layout: it needs model_index.json, "
            "unet/config.json and vae/config.json"
        )
    # model_index.json gives the library and the class of each part, or two nulls.
    lacking = [name for name in REFERENCE_PARTS if not any(index.get(name) or ())]
    if lacking and (manifest.has_any("reference") or manifest.has_any("negative_reference")):
        raise ModelError(
            f"{config.model} has no {lacking[0]}, and rows of the manifest have references: use a "
            "model with a trained aligner, as VCFPipeline.save_pretrained writes it, or remove the column 'reference'"
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
    with resolution.load_errors(f"the configuration of {config.model}"):
        native = unet["sample_size"]
        native_height, native_width = (native, native) if isinstance(native, int) else native
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        config = config.replace(
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
    fields = fingerprint_fields(
        config,
        manifest=manifest.identity,
        model=resolved.pipeline.identity,
        judge=resolved.judge_identity,
        lpips=resolved.lpips_identity,
        pno_guide=resolved.guide_identity if guided else None,
        safety_checker=resolved.safety_identity,
    )
    fields["lpips"] = resolved.lpips
    if on_gpu:
        # Its CPUs prepare and encode; no sum that is in the output depends on how many there are.
        del fields["cpus_per_worker"]
    return Job(config, manifest, resolved, fields, tuple(root for root in config.reference_root if _is_seen(root)))


def _check_guide(resolved: Models, index: Mapping[str, Any]) -> None:
    """What can be told before the weights are loaded; workers compare those of guide and judge."""
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
    """A gate that nothing can miss is a mistake, and so are triplets without a reference."""
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
    """A cautious guess from the UNet's shape: its operations grow with the area and the square of the channels."""
    area = cast(int, config.height) * cast(int, config.width) / factor**2
    operations = OPERATIONS * area * sum(width**2 / 4**level for level, width in enumerate(channels))
    speed = GPU_SPEED if config.gpus_per_worker else CPU_SPEED * config.cpus_per_worker
    return 2 * cast(int, config.steps) * (1 + PNO_STEP * config.pno_steps) * operations / speed


def claim(job: Job, publish: bool = True) -> tuple[str, ...]:
    """Publish ``run.json``, or find that the output holds this very run. For the driver that owns the output.

    Args:
        job: the run.
        publish: False only looks, which anybody may.

    Returns:
        See :attr:`Job.extends`.

    Raises:
        RefusedError: the output holds another run.
        StorageError: the storage failed.
    """
    manifest = {
        "url": redact(job.manifest.url),
        "identity": job.manifest.identity,
        "rows": job.manifest.num_rows,
    }
    packages = ("torch", "diffusers", "transformers", "ray", "pyarrow")
    output = job.config.output
    found = run_file.read(output)  # once more: an earlier owner may have written it meanwhile
    return run_file.claim(
        output,
        found,
        job.fields,
        {
            "config": {name: _redacted(value) for name, value in job.config.to_dict().items()},
            "manifest": manifest,
            "models": job.models.describe(job.guided),
            "shards": len(job.shards),
            "shard_digits": len(sharding.shard_name(0, len(job.shards))),
            "versions": {"vcf_batch": vcf_batch.__version__}
            | {name: importlib.metadata.version(name) for name in packages},
        },
        # Without run.json even half a shard is somebody else's.
        begun=commits.any_committed(output) if found else bool(receipts.files_found(output)),
        obstacle=lambda there: appended.obstacle(there, job.manifest),
        publish=publish,
    )


def _redacted(value: Any) -> Any:
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return redact(value) if isinstance(value, str) and "://" in value else value


def _is_seen(root: str) -> bool:
    """Whether the driver sees a place of references. Web addresses have no folders, and what fails proves nothing."""
    if root.startswith(("http://", "https://")):
        return False
    try:
        return storage.exists(root)
    except (PermissionError, StorageError):
        return False


def environment(config: RunConfig) -> dict[str, str]:
    """Environment of a worker: fixed threads, and cuBLAS workspaces that keep its sums in order."""
    return {
        "OMP_NUM_THREADS": str(config.cpus_per_worker),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TOKENIZERS_PARALLELISM": "false",
    }


def check_storage(job: Job) -> None:
    """Prove that this node sees the run's storage: the driver's lease in the output, the manifest, the reference roots.

    Raises:
        UsageError: it does not.
        StorageError: the storage failed, or refuses this node.
    """
    node, output = socket.gethostname(), job.config.output
    roots = [("--reference-root", root) for root in job.roots]
    for what, place in [("output", output), ("manifest", job.manifest.url), *roots]:
        try:
            seen = lease.is_seen(output, job.token) if what == "output" else storage.exists(place)
        except PermissionError as error:
            raise StorageError(f"node {node} may not look at the {what}: {error}") from error
        if not seen:
            raise UsageError(
                f"node {node} does not see the {what} {place}; "
                "it must be on storage that every node shares, such as s3://bucket/folder"
            )
