"""The run on a Ray cluster: the only package of the job that knows Ray.

The driver's loop (:mod:`vcf_batch.driver.loop`) hands shards to workers and has what comes back committed. Here is what
it asks of a cluster, on Ray (:mod:`vcf_batch.pool.ray_cluster`): workers are actors (:mod:`vcf_batch.pool.actor`), and
Ray does placement, processes, transfer, failure detection and autoscaling. The loop does what Ray's own restarts get
wrong for shards: an actor is never restarted, its task is never retried by Ray, its constructor is light and the model
is loaded by a task. It gets shards once it is loaded: one to sample and, as long as there are fresh ones for all,
another one to read ahead. So an actor that waits for a machine holds no shard, and joins when the cluster has grown;
and a device does not wait between two shards.
"""

from vcf_batch.pool.connection import cluster
from vcf_batch.pool.launch import ChooseRedo, run

__all__ = ["ChooseRedo", "cluster", "run"]
