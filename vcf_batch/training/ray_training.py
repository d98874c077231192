"""Training on a Ray cluster: Ray Train places the workers, connects them, restarts them, and keeps the checkpoints.

Rerunning the same command resumes: Ray Train finds the last checkpoint in the output by itself. Only the driver writes
the trained aligner, once, at the end of the training.
"""

import contextlib
import dataclasses
import logging
import os
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vcf_batch import storage
from vcf_batch.config.fingerprint import fingerprint
from vcf_batch.config.signature import with_settings_of
from vcf_batch.driver.progress import Progress, configure_log, duration
from vcf_batch.errors import StorageError, UsageError, VcfBatchError, redact
from vcf_batch.output import commits, lease, run_file
from vcf_batch.output.lease import Lease
from vcf_batch.pool import cluster
from vcf_batch.pool.signals import Signals
from vcf_batch.setup.absolute_paths import absolute_output
from vcf_batch.setup.claim import holds
from vcf_batch.training.training_config import TrainingConfig
from vcf_batch.training.training_job import (
    ALIGNER,
    CHECKPOINTS,
    TrainingJob,
    best_of,
    checkpoint_name,
    read_log,
    transfer_in_words,
)

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's own record of the checkpoints in its folder."""

MAX_FAILURES = 3
"""Number of times that a training continues from its last checkpoint after a worker has failed."""
POLL_SECONDS = 1.0
PROGRESS_SECONDS = 0.5
SILENT_START_SECONDS = 30.0
"""Seconds without any message from a worker, at the start, before the user is told what the training waits for."""


@dataclass(frozen=True)
class TrainingSummary:
    """The result of a training."""

    out: str
    steps: int
    pairs: int
    before: dict[str, float]
    """Metrics of the validation before the first step."""
    best: dict[str, float]
    """Metrics of the validation of the aligner that was kept."""
    seconds: float

    def __str__(self) -> str:
        recall = ", ".join(
            f"recall@{k} {self.best[name]:.1%} ({self.before[name]:.1%} before)"
            for k, name in ((1, "recall_at_1"), (5, "recall_at_5"))
        )
        return (
            f"{redact(self.out)}: {self.steps:,} steps over {self.pairs:,} pairs; best at step "
            f"{self.best['step']:,.0f}: validation loss {self.best['validation_loss']:.4f}, {recall} among "
            f"{self.best['validation_pairs']:,.0f} pairs{transfer_in_words(self.best)}; {duration(self.seconds)}"
        )


@with_settings_of(TrainingConfig)
def train_aligner(data: str | os.PathLike[str], out: str | os.PathLike[str], **settings: Any) -> TrainingSummary:
    """Train an aligner on captioned images, with Ray Train.

    The same call again resumes. ``out`` becomes a folder that :meth:`ImageAligner.from_pretrained` loads. It is
    ``vcf-batch model train``; ``vcf-batch model assemble`` makes a model of it.

    Args:
        data: captioned images: WebDataset tars, Parquet files, or the output of a run, at a path or URL.
        out: folder or URL for the aligner, its checkpoints and its log.
        settings: fields of :class:`TrainingConfig`; ``model`` is needed.

    Raises:
        UsageError: a setting, a model or the data is wrong.
        RefusedError: ``out`` holds another training, or another driver owns it.
        StorageError: the storage failed repeatedly.
        VcfBatchError: workers failed repeatedly, or the training has diverged.
        Interrupted: Ctrl-C or SIGTERM. The same call resumes.
    """
    return run(TrainingConfig.from_mapping({**settings, "data": data, "out": out}))


def run(config: TrainingConfig) -> TrainingSummary:
    """Train to the end, and write the best validation's aligner to ``config.out``. Resumes if possible.

    Raises:
        UsageError: an option, a model or the data is wrong.
        RefusedError: the output holds another training, or another driver owns it.
        StorageError: the storage failed repeatedly.
        VcfBatchError: workers failed repeatedly, or the training has diverged.
        Interrupted: Ctrl-C or SIGTERM; rerunning resumes.
    """
    begin = time.monotonic()
    with Signals() as signals:
        job = TrainingJob.plan(_absolute(config))
        with cluster(config.address):
            signals.install()  # Installed a second time, because ray.init replaces the handler of SIGTERM.
            job = _settled(job)
            signals.hold()
            with lease.hold(job.config.out) as held:
                _claim(job, held)
                if not storage.exists(storage.join(job.config.out, "config.json")):
                    checkpoint = _train(job, held)
                    held.confirm()
                    _publish(checkpoint, job.config.out)
    rows = read_log(job.config.out)
    best = best_of(rows[1:], job.config)
    return TrainingSummary(job.config.out, job.steps, job.pairs, rows[0], best, time.monotonic() - begin)


def _absolute(config: TrainingConfig) -> TrainingConfig:
    """Make the paths absolute, because Ray Train's processes have other working directories."""
    cache, out = config.cache_features, absolute_output(config.out)
    return config.replace(out=out, cache_features=cache and storage.absolute(cache))


def _settled(job: TrainingJob) -> TrainingJob:
    """Settle GPUs, number of workers and dtype, where they were not given, by the cluster's resources."""
    config, cluster_has = job.config, ray.cluster_resources()
    gpus = config.gpus_per_worker
    if gpus is None:
        gpus = 1 if cluster_has.get("GPU") else 0
    workers = config.num_workers
    if workers is None:
        room = cluster_has.get("GPU", 0) if gpus else cluster_has.get("CPU", 0) / config.cpus_per_worker
        workers = max(count for count in range(1, max(int(room), 1) + 1) if config.batch_size % count == 0)
    if config.batch_size % workers:
        raise UsageError(
            f"--batch-size {config.batch_size} is shared by all workers, so it must be a multiple of --num-workers "
            f"{workers}"
        )
    dtype = ("bfloat16" if gpus else "float32") if config.dtype == "auto" else config.dtype
    config = config.replace(gpus_per_worker=gpus, num_workers=workers, dtype=dtype)
    return dataclasses.replace(job, config=config)


def _claim(job: TrainingJob, held: Lease) -> None:
    """Publish ``run.json``, or check that the output holds this same training. Then delete what earlier owners staged.

    Raises:
        RefusedError: the output holds another training or something else, or another driver took over.
        StorageError: the storage failed.
    """
    out, fields = job.config.out, job.fields()
    there = run_file.read_document(out)
    begun = storage.exists(storage.join(out, CHECKPOINTS, SNAPSHOT))
    if not holds(out, there and there["fields"], fields, begun=begun):
        described = {
            "model": redact(job.parts.base.name),
            "image_encoder": redact((job.parts.image_encoder or job.parts.base).name),
            "data": redact(job.data.url),
            "pairs": job.pairs,
            "steps": job.steps,
        }
        document = run_file.document(fields, described)
        run_file.write(out, document, replaces=there is not None, confirm=held.confirm)
    held.confirm()
    storage.remove_tree(storage.join(out, commits.STAGING))
    run_file.check_stays(out, fingerprint(fields))


def _train(job: TrainingJob, held: Lease) -> ray.train.Checkpoint:
    """Run Ray Train, show its progress, and return the best checkpoint."""
    config = job.config
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    filesystem, path = storage.arrow_filesystem(config.out)
    resources = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    attribute, order = ("transfer", "max") if config.select_by == "transfer" else ("validation_loss", "min")
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"job": job, "board": board},
        scaling_config=ray.train.ScalingConfig(
            num_workers=cast(int, config.num_workers),
            use_gpu=bool(config.gpus_per_worker),
            resources_per_worker={name: amount for name, amount in resources.items() if amount},
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # the hints are those of Ray Train's first version
            name=CHECKPOINTS,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=attribute, checkpoint_score_order=order
            ),
            worker_runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false"}},
        ),
    )
    done = max((int(row["step"]) for row in read_log(config.out)), default=0)
    configure_log("text")
    with Progress(job.steps * config.batch_size, done * config.batch_size, sys.stderr) as progress:
        for remark in job.remarks:
            progress.note(remark, level=logging.WARNING)
        result = _watch(trainer, board, progress, job, held)
    best = result.get_best_checkpoint(attribute, order)
    assert best is not None, "every training ends with a checkpoint"
    return best


def _watch(trainer: Any, board: Queue, progress: Progress, job: TrainingJob, held: Lease) -> ray.train.Result:
    # Ray Train does not run in the main thread, because there it would handle Ctrl-C and exit with 0.
    outcome: Future[ray.train.Result] = Future()
    threading.Thread(target=_run_into, args=(trainer.fit, outcome), daemon=True).start()
    silent_since: float | None = time.monotonic()
    while not (outcome.done() and board.empty()):
        if held.lost:
            raise held.lost
        try:
            message = board.get(timeout=POLL_SECONDS)
        except Empty:
            if silent_since is not None and time.monotonic() - silent_since > SILENT_START_SECONDS:
                silent_since = time.monotonic()
                progress.note(_waiting(job.config))
            continue
        silent_since = None
        if isinstance(message, Exception):
            raise message
        if isinstance(message, str):
            progress.note(message)
        else:
            progress.update(message[0], message[1], cast(int, job.config.num_workers))
    try:
        return outcome.result()
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error


def _run_into(call: Any, outcome: Future) -> None:
    try:
        outcome.set_result(call())
    except BaseException as error:
        outcome.set_exception(error)


def _waiting(config: TrainingConfig) -> str:
    has = ray.cluster_resources()
    return (
        f"no worker has started yet; {config.num_workers} are needed at once, each with {config.cpus_per_worker} CPUs "
        f"and {config.gpus_per_worker} GPUs; the cluster has {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs"
    )


def _cause(error: ray.train.TrainingFailedError) -> VcfBatchError:
    """The cause of a failed training: this package's own error, or the last line of another error."""
    failures = getattr(error, "worker_failures", {}).values()
    causes = [getattr(failure, "_base_exc", failure) for failure in failures]
    for cause in causes:
        if isinstance(cause, VcfBatchError):
            return cause
    lines = [line.strip() for line in str(causes[0] if causes else error).splitlines() if line.strip()]
    return VcfBatchError(
        f"the training failed {MAX_FAILURES + 1} times; the last time: {lines[-1] if lines else 'no message'}\n"
        "Its checkpoints are kept: once the cause is gone, rerun the same command to go on."
    )


def _work(settings: dict[str, Any]) -> None:
    """One worker's part, in a process that Ray Train has started."""
    from vcf_batch.training.fit import Place, fit  # Imported here because the driver needs no models.

    job, board = settings["job"], settings["board"]
    context = ray.train.get_context()
    shown = 0.0

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        checkpoint = ray.train.Checkpoint.from_directory(folder) if folder else None
        ray.train.report(metrics, checkpoint, checkpoint_dir_name=checkpoint_name(metrics["step"]))

    def progress(done: int, broken: int) -> None:
        nonlocal shown
        if context.get_world_rank() == 0 and time.monotonic() - shown > PROGRESS_SECONDS:
            shown = time.monotonic()
            board.put((done, broken))

    place = Place(
        report=report,
        progress=progress,
        note=board.put,
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device=ray.train.torch.get_device(),
        parallel=ray.train.torch.prepare_model,
    )
    latest = ray.train.get_checkpoint()
    try:
        with latest.as_directory() if latest else contextlib.nullcontext() as folder:
            fit(job, place, Path(folder) if folder else None)
    except StorageError:
        raise  # The failure may be temporary: Ray Train restarts the workers.
    except VcfBatchError as error:
        board.put(error)
        raise


def _publish(checkpoint: ray.train.Checkpoint, out: str) -> None:
    """Copy the checkpoint's aligner to the output. ``config.json`` comes last and proves that the aligner is whole."""
    with checkpoint.as_directory() as folder:
        for file in sorted(os.listdir(os.path.join(folder, ALIGNER)), key=lambda name: (name == "config.json", name)):
            storage.upload(os.path.join(folder, ALIGNER, file), storage.join(out, file))
