"""A worker in this process, for what needs no cluster: a calibration, a preview. No Ray here."""

import os
from typing import TYPE_CHECKING

from vcf_batch import prepare
from vcf_batch.prepare import Job

if TYPE_CHECKING:
    from vcf_batch.worker import Worker

QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""What libraries say while they load belongs into the logs of workers."""


def load(job: Job, scratch: str) -> "Worker":
    """A worker for a run that writes nothing into the run's output.

    Args:
        job: the run.
        scratch: local folder that takes what it writes.

    Raises:
        VcfBatchError: as :func:`vcf_batch.worker.load`.
    """
    os.environ.update(prepare.environment(job.config) | QUIET)
    from vcf_batch import worker  # brings torch, which reads the environment

    return worker.load(
        config=job.config.replace(output=scratch),
        fingerprint=job.fingerprint,
        manifest=job.manifest,
        models_used=job.models,
    )
