"""An output for this run alone: ``run.json`` published, or found to be of this very run."""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import vcf_batch
from vcf_batch import sharding
from vcf_batch.config import (
    RunConfig,
)
from vcf_batch.errors import redact
from vcf_batch.manifest import appended
from vcf_batch.output import commits, receipts, run_file
from vcf_batch.setup.job import Job


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
