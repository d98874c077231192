"""A run from its command to its summary: settled, claimed, driven on a Ray cluster, counted."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from vcf_batch.config.run_config import RunConfig
from vcf_batch.driver.commit_queue import COMMITS_AT_ONCE, CommitQueue
from vcf_batch.driver.ledger import Ledger, Summary
from vcf_batch.driver.loop import Loop
from vcf_batch.driver.progress import Progress, bar_stream, configure_log
from vcf_batch.errors import UsageError
from vcf_batch.output import commits, lease, run_file
from vcf_batch.pool import nodes
from vcf_batch.pool.batch_size import with_batch_size
from vcf_batch.pool.connection import cluster
from vcf_batch.pool.prometheus import PrometheusExporter
from vcf_batch.pool.ray_cluster import RayCluster
from vcf_batch.pool.signals import Signals
from vcf_batch.records import RowMask
from vcf_batch.setup import absolute_paths, claim, defaults, manifest_check, model_check, run_models
from vcf_batch.setup.job import Job, fusions_of

ChooseRedo = Callable[[], Mapping[int, RowMask]]
"""Function that gives the redo rows of an output: see :attr:`vcf_batch.setup.job.Job.redo`."""


def run(config: RunConfig, choose_redo: ChooseRedo = dict, deadline: float | None = None) -> Summary:
    """Generate what is left of a run.

    Args:
        config: the configuration of the run.
        choose_redo: called once this run owns the output.
        deadline: seconds since 1970 from which on workers are given no shard; None for none.

    Returns:
        The counts of the whole run.

    Raises:
        UsageError: an option, the manifest or a model is wrong, or the nodes do not share the output.
        RefusedError: the output holds another run, or another driver is at work there.
        StorageError: the storage failed, again and again; shards that do not need it are finished.
        Unfinished: the deadline came first.
        VcfBatchError: some shards, or the start of workers, failed again and again; the other shards are finished.
        Interrupted: Ctrl-C or SIGTERM. Rerunning resumes.
    """
    begin = time.monotonic()
    configure_log(config.log_format, config.verbosity)
    with Signals() as signals:
        config = absolute_paths.absolute(config)
        record = run_file.read(config.output)
        config = claim.resume(config, record)
        manifest = manifest_check.open_checked(config, record)
        models = run_models.resolve(config, claim.commits_of(config, record))
        model_check.check(config, manifest, models, fusions_of(config, manifest))
        with contextlib.ExitStack() as connected:

            def connect() -> None:
                connected.enter_context(cluster(config.address))
                signals.install()  # again, because ray.init takes SIGTERM for itself

            # A run that is there has settled what the cluster decides. Ray, which takes seconds to start, can wait
            # until it is known that something is left to do.
            later = record is not None and None not in (config.gpus_per_worker, config.batch_size)
            if not later:
                connect()
                config = with_batch_size(nodes.with_gpus(config), manifest, models)
            job = defaults.settle(config, manifest, models)
            signals.hold()

            def drive(job: Job, held: lease.Lease, ledger: Ledger) -> None:
                if later:
                    connect()
                _drive(job, held, ledger, signals, deadline)

            ledger = generate_left(job, choose_redo, drive)
    return ledger.summary(time.monotonic() - begin)


def generate_left(job: Job, choose_redo: ChooseRedo, drive: Callable[[Job, lease.Lease, Ledger], None]) -> Ledger:
    """Own the output of a run while what is left of it is generated.

    Args:
        job: the run.
        choose_redo: see :func:`run`.
        drive: generates what is left; called only if something is.

    Returns:
        The record of the run's shards.

    Raises:
        RefusedError, StorageError: see :func:`run`; and what ``drive`` raises.
    """
    with lease.hold(job.config.output) as held:
        job = dataclasses.replace(job, token=held.token, extends=claim.claim(job, confirm=held.confirm))
        held.confirm()
        # This comes before all reading: from here on, no earlier owner can change the output.
        commits.clean(job.config.output, held.confirm)
        run_file.check_stays(job.config.output, job.fingerprint)
        job = dataclasses.replace(job, redo=choose_redo())
        held.confirm()
        ledger = Ledger(job)
        if ledger.left:
            drive(job, held, ledger)
            held.confirm()
            run_file.check_stays(job.config.output, job.fingerprint)
            commits.clean(job.config.output, held.confirm)
    return ledger


def _drive(job: Job, held: lease.Lease, ledger: Ledger, signals: Signals, deadline: float | None) -> None:
    """Generate what is left, on the cluster that this process is connected to."""
    if job.config.profile:
        job = dataclasses.replace(job, profiled=next(ledger.remaining()).index)
    bar = bar_stream(job.config.log_format, job.config.verbosity)
    with Progress(job.manifest.num_rows, ledger.finished_rows, bar) as progress:
        try:
            on_ray = RayCluster(job, signals.check)
            ends = math.inf if deadline is None else on_ray.now() + deadline - time.time()
            loop_on(on_ray, job, held, ledger, progress).run(ends)
        except UsageError:
            # Nodes do not see the lease of a driver that has lost it either, which is no wrong use.
            held.confirm()
            raise


def loop_on(on_ray: RayCluster, job: Job, held: lease.Lease, ledger: Ledger, progress: Progress) -> Loop:
    """The driver's loop over the workers of a Ray cluster, with threads for its commits."""
    threads = ThreadPoolExecutor(COMMITS_AT_ONCE, "commits")

    def check() -> None:
        run_file.check_stays(job.config.output, job.fingerprint)

    queue = CommitQueue(job.config.output, held, ledger, progress.note, on_ray.now, threads, check)
    exporter = PrometheusExporter(job.config.output, job.manifest.num_rows)
    return Loop(job, on_ray, ledger, queue, progress, exporter)
