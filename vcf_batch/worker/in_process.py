"""A worker in this process, for a calibration or a preview, which need no cluster. No Ray here."""

import contextlib
import ctypes
import dataclasses
import importlib.util
import logging
import os
import runpy
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vcf_batch.config.run_config import RunConfig
from vcf_batch.setup.environment import environment
from vcf_batch.setup.job import Job

if TYPE_CHECKING:
    from vcf_batch.worker.worker import Worker

_log = logging.getLogger(__name__)

BATCH_SIZE = 8
"""Batch size that is used instead of a measured one."""


def has_gpu() -> bool:
    """Whether torch can use a GPU of this machine: what ``torch.cuda.is_available()`` says, without importing torch.

    CUDA's driver is asked as torch asks it, so ``CUDA_VISIBLE_DEVICES`` counts. Never run on a GPU so far.
    """
    found = importlib.util.find_spec("torch")
    assert found and found.origin, "torch is a dependency"
    built = runpy.run_path(os.path.join(os.path.dirname(found.origin), "version.py"))
    if built.get("hip"):
        import torch  # takes seconds

        return torch.cuda.is_available()
    return bool(built["cuda"]) and _cuda_devices(int(built["cuda"].partition(".")[0])) > 0


def _cuda_devices(runtime: int) -> int:
    """Number of GPUs that CUDA's driver has for this process; 0 if it is too old for a runtime of a major version."""
    version, count = ctypes.c_int(), ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        failed = driver.cuDriverGetVersion(ctypes.byref(version)) or driver.cuInit(0)
        if not failed and version.value // 1000 >= runtime and not driver.cuDeviceGetCount(ctypes.byref(count)):
            return count.value
    return 0


def settled(config: RunConfig) -> RunConfig:
    """Fill in what a cluster would decide: GPUs from this machine, and a fixed batch size instead of a measured one."""
    if config.gpus_per_worker is None:
        config = config.replace(gpus_per_worker=float(has_gpu()))
    return config.replace(batch_size=BATCH_SIZE) if config.batch_size is None else config


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Give a process that goes on afterwards, as a notebook's does, its environment and torch's settings back."""
    import torch  # before a worker's environment decides on its threads

    variables, threads = dict(os.environ), torch.get_num_threads()
    deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(variables)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = benchmark
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def load(job: Job, scratch: str) -> "Worker":
    """Load a worker that writes nothing into the run's output.

    Args:
        job: the run.
        scratch: a local folder for the files that the worker writes.

    Raises:
        VcfBatchError: as :func:`vcf_batch.worker.worker.load`.
    """
    _log.info("loading the models")
    os.environ.update(environment(job.config.cpus_per_worker))
    from vcf_batch.worker import worker  # brings torch, which reads the environment

    return worker.load(dataclasses.replace(job, config=job.config.replace(output=scratch)))
