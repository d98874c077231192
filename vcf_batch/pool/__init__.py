"""The run on a Ray cluster: the only package of the job that knows Ray.

One short loop over ``ray.wait`` (:mod:`vcf_batch.pool.dispatch`) hands shards to actors (:mod:`vcf_batch.pool.actor`)
and commits what comes back. Ray does placement, processes, transfer, failure detection and autoscaling; the loop does
what Ray's own restarts get wrong for shards: an actor is never restarted, its task is never retried by Ray, its
constructor is light and the model is loaded by a task, and it gets shards once it is loaded: one to sample, and beside
it the next one to read ahead, as long as there are fresh ones for all. So an actor that waits for a machine holds no
shard, and joins when the cluster has grown; and a device does not wait between two shards.
"""

from vcf_batch.pool.connection import cluster
from vcf_batch.pool.launch import Again, run

__all__ = ["Again", "cluster", "run"]
