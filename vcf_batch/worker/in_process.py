"""A worker in this process, for a calibration or a preview, which need no cluster. No Ray here."""

import dataclasses
import os
from typing import TYPE_CHECKING

from vcf_batch.config import RunConfig
from vcf_batch.setup.environment import environment
from vcf_batch.setup.job import Job

if TYPE_CHECKING:
    from vcf_batch.worker.worker import Worker

BATCH_SIZE = 8
"""Batch size that is used instead of a measured one."""


def _gpus() -> float:
    """GPUs of a worker on this machine: 1 where there is one, else 0."""
    import torch  # imported here, because planning needs it for nothing else

    return 1.0 if torch.cuda.is_available() else 0.0


def settled(config: RunConfig) -> RunConfig:
    """Fill in what a cluster would decide: GPUs from this machine, and a fixed batch size instead of a measured one."""
    if config.gpus_per_worker is None:
        config = config.replace(gpus_per_worker=_gpus())
    return config.replace(batch_size=BATCH_SIZE) if config.batch_size is None else config


def load(job: Job, scratch: str) -> "Worker":
    """Load a worker that writes nothing into the run's output.

    Args:
        job: the run.
        scratch: a local folder for the files that the worker writes.

    Raises:
        VcfBatchError: as :func:`vcf_batch.worker.worker.load`.
    """
    os.environ.update(environment(job.config.cpus_per_worker))
    from vcf_batch.worker import worker  # brings torch, which reads the environment

    return worker.load(dataclasses.replace(job, config=job.config.replace(output=scratch)))
