"""The batch size of a run that is given none: measured on a worker of the cluster."""

import logging

import ray
from ray.exceptions import RayError

from vcf_batch.config.limits import MAX_BATCH_SIZE
from vcf_batch.config.run_config import RunConfig
from vcf_batch.driver.loop import WAITING_SECONDS
from vcf_batch.errors import VcfBatchError
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.pool import nodes, ray_errors
from vcf_batch.setup import defaults
from vcf_batch.setup.environment import environment
from vcf_batch.setup.job import Job
from vcf_batch.setup.run_models import Models

_log = logging.getLogger(__name__)


def with_batch_size(config: RunConfig, manifest: Manifest, models: Models) -> RunConfig:
    """Choose the batch size of a run that is given none, by measuring it on a worker.

    Raises:
        VcfBatchError: no worker could measure it.
    """
    if config.batch_size is not None:
        return config
    job = defaults.settle(config.replace(batch_size=1), manifest, models)
    limit = min(manifest.num_rows, config.shard_size or manifest.num_rows, MAX_BATCH_SIZE)
    _log.warning("Looking for the fastest batch size on a first worker.")
    measure = ray.remote(
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker or 0,
        max_retries=2,  # when a machine goes away
        runtime_env={"env_vars": environment(config.cpus_per_worker)},
    )(_fastest)
    answer = measure.remote(job, limit)
    while not ray.wait([answer], timeout=WAITING_SECONDS)[0]:
        _log.warning("No batch size yet: a worker measures it, or waits for a machine (%s).", nodes.describe(config))
    try:
        size = ray.get(answer)
    except RayError as error:
        why = ray_errors.cause(error)
        if isinstance(why, VcfBatchError):
            raise why from error
        reason = ray_errors.fault_of(error, node="").reason
        raise VcfBatchError(f"no batch size could be found ({reason}); name one with --batch-size") from error
    _log.warning("The batch size is %d from here on.", size)
    return config.replace(batch_size=size)


def _fastest(job: Job, limit: int) -> int:
    """Measure :func:`vcf_batch.worker.calibration.fastest_batch_size` on a node of the cluster."""
    from vcf_batch.worker import calibration, worker

    loaded = worker.load(job)
    return calibration.fastest_batch_size(loaded.components, job.manifest, limit)
