"""The process of a worker: its environment, and what reads it."""

import ctypes
import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import runs

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray

from vcf_batch.driver.cluster import WorkerHandle
from vcf_batch.output import lease
from vcf_batch.pool.ray_cluster import RayCluster
from vcf_batch.setup.environment import environment

OF_THE_JOB = {"OF_THE_JOB": "here", "OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true"}
"""Variables that the job gives its processes; a run has the last two, too."""


@pytest.fixture
def own_ray() -> Iterator[None]:
    """A Ray of this test's own, whose job has a ``runtime_env``, as ``ray job submit --runtime-env`` gives one."""
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": OF_THE_JOB}
    )
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find it
    try:
        yield
    finally:
        ray.shutdown()


def look(_: Any) -> dict[str, Any]:
    """The environment of this process, and the threads of the libraries that have read it."""
    importlib.import_module("numpy")
    import torch

    with open("/proc/self/maps") as file:
        libraries = set(re.findall(r"/\S*openblas\S*\.so\S*", file.read()))
    threads = [ctypes.CDLL(path).scipy_openblas_get_num_threads64_() for path in libraries]
    return {"environment": dict(os.environ), "numpy": threads, "torch": torch.get_num_threads()}


@pytest.mark.usefixtures("own_ray")
def test_a_worker_has_the_environment_of_the_run_and_that_of_the_job(tmp_path: Path) -> None:
    """Threads are fixed before numpy and torch are loaded, whatever loads them. The job's own variables stay; where
    both name one, the run's counts."""
    manifest, model = runs.write_manifest(tmp_path / "in", 2), runs.save_model(tmp_path / "model")
    job = runs.settled(manifest, tmp_path / "out", model)
    with lease.hold(job.config.output) as held:
        cluster = RayCluster(dataclasses.replace(job, token=held.token))
        worker = WorkerHandle(cluster.start([]), cluster.now())
        found = ray.get(worker.process.__ray_call__.remote(look))
    expected = {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TOKENIZERS_PARALLELISM": "false"}
    assert environment(job.config.cpus_per_worker) == expected
    assert found["environment"] | expected | {"OF_THE_JOB": "here"} == found["environment"]
    assert found["numpy"] == [1]
    assert found["torch"] == 1
