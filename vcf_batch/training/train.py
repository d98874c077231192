"""The training on a Ray cluster: Ray Train places the workers, joins them, restarts them, and keeps the checkpoints.

Rerunning resumes: Ray Train finds the last checkpoint in the output by itself. The driver alone writes the trained
aligner, once, when the training is done.
"""

import contextlib
import dataclasses
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
from vcf_batch.driver.progress import Progress, duration
from vcf_batch.errors import StorageError, UsageError, VcfBatchError, redact
from vcf_batch.output import lease, run_file
from vcf_batch.output.lease import Lease
from vcf_batch.pool import cluster, log
from vcf_batch.pool.signals import Signals
from vcf_batch.setup.paths import absolute_output
from vcf_batch.training.training_config import TrainingConfig
from vcf_batch.training.training_job import ALIGNER, TrainingJob, read_log

CHECKPOINTS = "checkpoints"
"""Ray Train's folder in the output."""
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's own record of the checkpoints in its folder."""

MAX_FAILURES = 3
"""How often a training goes on from its last checkpoint after a worker has failed."""
POLL_SECONDS = 1.0
PROGRESS_SECONDS = 0.5
WAITING_SECONDS = 30.0
"""How long no worker may have said anything, at the start, before the user is told what the training waits for."""


@dataclass(frozen=True)
class TrainingSummary:
    """What came of a training."""

    out: str
    steps: int
    pairs: int
    before: dict[str, float]
    """The validation before the first step."""
    best: dict[str, float]
    """The validation of the aligner that was kept."""
    seconds: float

    def __str__(self) -> str:
        recall = ", ".join(
            f"recall@{k} {self.best[name]:.1%} ({self.before[name]:.1%} before)"
            for k, name in ((1, "recall_at_1"), (5, "recall_at_5"))
        )
        return (
            f"{redact(self.out)}: {self.steps:,} steps over {self.pairs:,} pairs; best at step "
            f"{self.best['step']:,.0f}: validation loss {self.best['validation_loss']:.4f}, {recall} among "
            f"{self.best['validation_pairs']:,.0f} pairs; "
            f"{duration(self.seconds)}"
        )


def run(config: TrainingConfig) -> TrainingSummary:
    """Train what is left of a training, and write the aligner with the lowest validation loss to ``config.out``.

    Raises:
        UsageError: an option, a model or the data is wrong.
        RefusedError: the output holds another training, or another driver is at work there.
        StorageError: the storage failed, again and again.
        VcfBatchError: workers failed, again and again, or the loss is not finite any more.
        Interrupted: Ctrl-C or SIGTERM. Rerunning resumes.
    """
    begin = time.monotonic()
    with Signals() as signals:
        task = TrainingJob.plan(_absolute(config))
        with cluster(config.address):
            signals.install()  # once more: ray.init takes SIGTERM for itself
            task = _settled(task)
            with lease.hold(task.config.out) as held:
                _claim(task)
                if not storage.exists(storage.join(task.config.out, "config.json")):
                    checkpoint = _train(task, held)
                    held.confirm()
                    _publish(checkpoint, task.config.out)
    rows = read_log(task.config.out)
    best = min(rows[1:], key=lambda row: row["validation_loss"])
    return TrainingSummary(task.config.out, task.steps, task.pairs, rows[0], best, time.monotonic() - begin)


def _absolute(config: TrainingConfig) -> TrainingConfig:
    """Paths that mean the same to every process: Ray Train's have working directories of their own."""
    cache, out = config.cache_features, absolute_output(config.out)
    return config.replace(out=out, cache_features=cache and storage.absolute(cache))


def _settled(task: TrainingJob) -> TrainingJob:
    """Settle what was left open by what the cluster has."""
    config, cluster_has = task.config, ray.cluster_resources()
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
    return dataclasses.replace(task, config=config)


def _claim(task: TrainingJob) -> None:
    """Publish ``run.json``, or find that the output holds this very training.

    Raises:
        RefusedError: it holds another one, or something else.
    """
    out, fields = task.config.out, task.fields()
    there = run_file.read_document(out)
    begun = storage.exists(storage.join(out, CHECKPOINTS, SNAPSHOT))
    if run_file.holds(out, there and there["fields"], fields, begun=begun):
        return
    described = {
        "model": redact(task.parts.base.name),
        "image_encoder": redact((task.parts.image_encoder or task.parts.base).name),
        "data": redact(task.data.url),
        "pairs": task.pairs,
        "steps": task.steps,
    }
    run_file.write(out, run_file.document(fields, described))


def _train(task: TrainingJob, held: Lease) -> ray.train.Checkpoint:
    """Run Ray Train, and show how far it is; the best checkpoint."""
    config = task.config
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    filesystem, path = storage.arrow_filesystem(config.out)
    resources = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"task": task, "board": board},
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
                num_to_keep=1, checkpoint_score_attribute="validation_loss", checkpoint_score_order="min"
            ),
            worker_runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false"}},
        ),
    )
    done = max((int(row["step"]) for row in read_log(config.out)), default=0)
    log.configure("text")
    with Progress(task.steps * config.batch_size, done * config.batch_size, sys.stderr) as progress:
        result = _watch(trainer, board, progress, task, held)
    best = result.get_best_checkpoint("validation_loss", "min")
    assert best is not None, "every training ends with a checkpoint"
    return best


def _watch(trainer: Any, board: Queue, progress: Progress, task: TrainingJob, held: Lease) -> ray.train.Result:
    # Not in the main thread, where Ray Train takes Ctrl-C for itself and ends the process with 0.
    outcome: Future[ray.train.Result] = Future()
    threading.Thread(target=_run_into, args=(trainer.fit, outcome), daemon=True).start()
    silent_since: float | None = time.monotonic()
    while not (outcome.done() and board.empty()):
        if held.lost:
            raise held.lost
        try:
            message = board.get(timeout=POLL_SECONDS)
        except Empty:
            if silent_since is not None and time.monotonic() - silent_since > WAITING_SECONDS:
                silent_since = time.monotonic()
                progress.note(_waiting(task.config))
            continue
        silent_since = None
        if isinstance(message, Exception):
            raise message
        if isinstance(message, str):
            progress.note(message)
        else:
            progress.update(message[0], message[1], cast(int, task.config.num_workers))
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
    """What a training failed of, in one line where it is not this package's own."""
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
    from vcf_batch.training.fit import Place, fit  # not at the top: the driver needs no models

    task, board = settings["task"], settings["board"]
    context = ray.train.get_context()
    shown = 0.0

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        checkpoint = ray.train.Checkpoint.from_directory(folder) if folder else None
        ray.train.report(metrics, checkpoint, checkpoint_dir_name=f"step-{metrics['step']:08d}")

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
            fit(task, place, Path(folder) if folder else None)
    except StorageError:
        raise  # may pass: Ray Train tries again
    except VcfBatchError as error:
        board.put(error)
        raise


def _publish(checkpoint: ray.train.Checkpoint, out: str) -> None:
    """Copy the checkpoint's aligner to the output; its ``config.json``, which says that it is whole, comes last."""
    with checkpoint.as_directory() as folder:
        for file in sorted(os.listdir(os.path.join(folder, ALIGNER)), key=lambda name: (name == "config.json", name)):
            storage.upload(os.path.join(folder, ALIGNER, file), storage.join(out, file))
