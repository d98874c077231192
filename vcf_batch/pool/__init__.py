"""The run on a Ray cluster: the only package of the job that knows Ray.

The driver's loop (:mod:`vcf_batch.driver.loop`) hands shards to workers and has the results committed. It sees the
cluster through :mod:`vcf_batch.pool.ray_cluster`. Workers are actors (:mod:`vcf_batch.pool.actor`); Ray does placement,
processes, transfer, failure detection and autoscaling.

Ray's own restarts are wrong for shards, so the loop does them: Ray never restarts an actor and never retries its task.
The constructor of an actor is light, and a task loads the model. A loaded actor gets a shard to sample and, as long as
there are fresh shards for all, another one to read ahead. So an actor that waits for a machine holds no shard, and a
device does not wait between two shards.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vcf_batch.pool.connection import cluster
    from vcf_batch.pool.launch import ChooseRedo, run

_HOMES = {
    "ChooseRedo": "vcf_batch.pool.launch",
    "cluster": "vcf_batch.pool.connection",
    "run": "vcf_batch.pool.launch",
}

__all__ = ["ChooseRedo", "cluster", "run"]


def __getattr__(name: str) -> Any:
    """A public name. Its module is loaded when it is first used, as an actor's process needs none of the driver's."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
