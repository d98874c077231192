"""The machines of a cluster: how many workers they have room for, and whether they see the run's storage."""

import logging
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import UsageError
from vcf_batch.models.resolution import TINY
from vcf_batch.pool import ray_errors
from vcf_batch.setup import storage_check

_log = logging.getLogger(__name__)

CHECK_SECONDS = 60.0
"""Seconds that nodes have to look at the storage."""


def with_gpus(config: RunConfig) -> RunConfig:
    """Choose whether workers compute on GPUs, by what the cluster has, if the run leaves it open."""
    if config.gpus_per_worker is not None:
        return config
    if ray.cluster_resources().get("GPU"):
        return config.replace(gpus_per_worker=1.0)
    if config.model not in (None, TINY):
        _log.warning(
            "No node of the cluster has a GPU, so workers compute on CPUs. Where an autoscaler is still to add nodes "
            "with GPUs, give --gpus-per-worker 1."
        )
    return config.replace(gpus_per_worker=0.0)


def room(config: RunConfig) -> dict[str, int]:
    """Number of workers that fit on each node, whatever runs there now."""
    return {node["NodeID"]: _room_on(node, config) for node in ray.nodes()}


def at(address: str) -> str:
    """The node with an address; empty where there is none, or more than one."""
    found = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] == address]
    return found[0] if len(found) == 1 else ""


def describe(config: RunConfig) -> str:
    """Resources that a worker needs and that the cluster has, in words."""
    there = ray.cluster_resources()
    return (
        f"each needs {config.cpus_per_worker} CPUs and {config.gpus_per_worker:g} GPUs, "
        f"the cluster has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs"
    )


class StorageCheck:
    """Check that every node that can hold a worker sees the run's storage. It goes on beside the start of workers.

    Args:
        job: the run.
    """

    def __init__(self, job: storage_check.Places) -> None:
        look = ray.remote(num_cpus=0, max_retries=0)(storage_check.check_storage)
        self._asked = [
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(job)
            for node, workers in room(job.config).items()
            if workers
        ]

    def finish(self) -> None:
        """Wait for the nodes, :data:`CHECK_SECONDS` at most; another call does nothing.

        Raises:
            UsageError: a node does not see the storage.
        """
        asked, self._asked = self._asked, []
        for answer in ray.wait(asked, num_returns=len(asked), timeout=CHECK_SECONDS)[0] if asked else []:
            try:
                ray.get(answer)
            except RayError as error:
                # Other errors may pass, such as a node that leaves: a worker that starts there checks again.
                if isinstance(cause := ray_errors.cause(error), UsageError):
                    raise cause from error


def _room_on(node: dict[str, Any], config: RunConfig) -> int:
    resources = node["Resources"] if node["Alive"] else {}
    fits = resources.get("CPU", 0) / config.cpus_per_worker
    if config.gpus_per_worker:
        fits = min(fits, resources.get("GPU", 0) / config.gpus_per_worker)
    return int(fits)
