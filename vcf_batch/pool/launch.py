"""The run on a Ray cluster: the only package of the job that knows Ray.

One short loop over ``ray.wait`` (:mod:`vcf_batch.pool.dispatch`) hands shards to actors (:mod:`vcf_batch.pool.actor`)
and commits what comes back. Ray does placement, processes, transfer, failure detection and autoscaling; the loop does
what Ray's own restarts get wrong for shards: an actor is never restarted, its task is never retried by Ray, its
constructor is light and the model is loaded by a task, and it gets shards once it is loaded: one to sample, and beside
it the next one to read ahead, as long as there are fresh ones for all. So an actor that waits for a machine holds no
shard, and joins when the cluster has grown; and a device does not wait between two shards.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping

from vcf_batch.config import RunConfig
from vcf_batch.driver.ledger import Ledger, Summary
from vcf_batch.driver.progress import Progress
from vcf_batch.output import commits, lease, run_file
from vcf_batch.pool import log, nodes
from vcf_batch.pool.batch_size import with_batch_size
from vcf_batch.pool.connection import cluster
from vcf_batch.pool.dispatch import Dispatch
from vcf_batch.pool.signals import Signals
from vcf_batch.records import RowMask
from vcf_batch.setup import claim, defaults, manifest_check, paths, run_models

Again = Callable[[], Mapping[int, RowMask]]
"""Tells what of an output is generated again: see :attr:`vcf_batch.setup.job.Job.redo`."""


def run(config: RunConfig, again: Again = dict) -> Summary:
    """Generate what is left of a run.

    Args:
        config: what to generate, and where.
        again: asked once this run owns the output.

    Returns:
        The counts of the whole run.

    Raises:
        UsageError: an option, the manifest or a model is wrong, or the nodes do not share the output.
        RefusedError: the output holds another run, or another driver is at work there.
        StorageError: the storage failed, again and again; shards that do not need it are finished.
        VcfBatchError: some shards, or the start of workers, failed again and again; the other shards are finished.
        Interrupted: Ctrl-C or SIGTERM. Rerunning resumes.
    """
    begin = time.monotonic()
    log.configure(config.log_format)
    with Signals() as signals:
        config = paths.absolute(config)
        record = run_file.read(config.output)
        config = claim.resume(config, record)
        manifest = manifest_check.open_checked(config, record)
        models = run_models.resolve(config)
        with cluster(config.address):
            signals.install()  # once more: ray.init takes SIGTERM for itself
            config = with_batch_size(nodes.with_gpus(config), manifest, models)
            job = defaults.settle(config, manifest, models)
            with lease.hold(job.config.output) as held:
                job = dataclasses.replace(job, token=held.token, extends=claim.claim(job))
                held.confirm()
                # Before anything is read: from here on, no earlier owner can change what there is.
                commits.clean(job.config.output)
                job = dataclasses.replace(job, redo=again())
                ledger = Ledger(job)
                if ledger.left:
                    if config.profile:
                        job = dataclasses.replace(job, profiled=next(ledger.remaining()).index)
                    bar = None if config.log_format == "json" else sys.stderr
                    with Progress(job.manifest.num_rows, ledger.finished_rows, bar) as progress:
                        nodes.check(job)
                        Dispatch(job, held, ledger, progress).run()
                    held.confirm()
                    commits.clean(job.config.output)
    return ledger.summary(time.monotonic() - begin)
