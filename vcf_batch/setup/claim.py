"""The claim of a run on its output: ``run.json`` is published, or found to be the record of this very run."""

import importlib.metadata
from collections.abc import Callable
from typing import Any

from vcf_batch import __version__, sharding
from vcf_batch.config import RunConfig
from vcf_batch.errors import redact
from vcf_batch.manifest import appended
from vcf_batch.output import commits, receipts, run_file
from vcf_batch.output.run_file import RecordedManifest, RunRecord
from vcf_batch.setup.job import Job

PACKAGES = ("torch", "diffusers", "transformers", "ray", "pyarrow")
"""Libraries whose versions are recorded beside that of vcf-batch."""


def resume(config: RunConfig, record: RunRecord | None) -> RunConfig:
    """Take the shard size, batch size and GPUs of a worker from the run in the output, if they are not given.

    So a restart cannot choose them differently.

    Args:
        config: the run, with an absolute output.
        record: the record of the output's run; None if it has none.

    Raises:
        StorageError: the storage failed.
    """
    names = [name for name in ("shard_size", "batch_size", "gpus_per_worker") if getattr(config, name) is None]
    if record is None or not names or not commits.any_committed(config.output):
        return config
    return config.replace(**{name: record.config.get(name) for name in names})


def claim(job: Job, publish: bool = True, confirm: Callable[[], object] = lambda: None) -> tuple[str, ...]:
    """Publish ``run.json``, or find that the output holds this very run. For the driver that owns the output.

    Args:
        job: the run.
        publish: whether ``run.json`` is written. Without it any process may call this.
        confirm: raises if the driver no longer owns the output. Called right before ``run.json`` is published.

    Returns:
        The fingerprints of :attr:`Job.extends`.

    Raises:
        RefusedError: the output holds another run, or another driver took over.
        StorageError: the storage failed.
    """
    output = job.config.output
    there = run_file.read(output)  # again, because an earlier owner may have written it meanwhile
    return run_file.claim(
        output,
        there,
        record_of(job),
        # Without run.json, any file of a shard belongs to an unknown run.
        begun=commits.any_committed(output) if there else bool(receipts.files_found(output)),
        obstacle=lambda fields: appended.obstacle(fields, job.manifest),
        publish=publish,
        confirm=confirm,
    )


def record_of(job: Job) -> RunRecord:
    """The record of a run that extends no other."""
    return RunRecord(
        fields=job.fields,
        config={name: _redacted(value) for name, value in job.config.to_dict().items()},
        manifest=RecordedManifest(redact(job.manifest.url), job.manifest.identity, job.manifest.num_rows),
        models=job.models.describe(job.guided),
        shards=len(job.shards),
        shard_digits=len(sharding.shard_name(0, len(job.shards))),
        versions={"vcf_batch": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
    )


def _redacted(value: Any) -> Any:
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return redact(value) if isinstance(value, str) and "://" in value else value
