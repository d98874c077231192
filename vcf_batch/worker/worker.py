"""A worker: one task in, a shard's staged files and its receipt out. No Ray here, so it is tested without a cluster."""

import contextlib
import dataclasses
import os
import socket
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType
from typing import cast

import torch

from vcf_batch import storage
from vcf_batch.config.row_settings import checked, settings_of
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.manifest.references import LoraReader, ReferenceReader
from vcf_batch.metrics.clip_score import ClipJudge
from vcf_batch.metrics.lpips import LPIPS, PerceptualDistance
from vcf_batch.metrics.scorer import Scorer
from vcf_batch.models.cache import fetch
from vcf_batch.models.loading import load_errors
from vcf_batch.models.prompt_tokens import text_lengths
from vcf_batch.output import commits, shards
from vcf_batch.output.receipts import Receipt
from vcf_batch.output.shards import ShardFiles
from vcf_batch.records import Row, Sample
from vcf_batch.setup.job import TRACE, Job, has_loras, schema_of
from vcf_batch.setup.run_models import OWN_JUDGE, OWN_PROBE, OWN_SAFETY, TINY_PERCEPTUAL, Models
from vcf_batch.setup.shard_task import ShardTask
from vcf_batch.storage import scratch
from vcf_batch.vcf.guide import Guide
from vcf_batch.vcf.pipeline import VCFPipeline
from vcf_batch.vcf.safety import SafetyChecker
from vcf_batch.worker.clock import Clock, Profile
from vcf_batch.worker.components import Components
from vcf_batch.worker.device import Device
from vcf_batch.worker.generation import Generation
from vcf_batch.worker.lora.shelf import LoraShelf
from vcf_batch.worker.shard_rows import ShardRows

NO_REFERENCE = "the row has no reference, which each triplet shows; give it one, or leave --triplets out"

_model_loads = 0
"""Number of times that this process has loaded models. Receipts show it: 1 is right."""


def load(job: Job) -> "Worker":
    """Fetch and load everything, and build the worker. Takes as long as loading a model does.

    Args:
        job: the run. The worker writes to the output that its ``config`` names.

    Raises:
        ModelError: a model is not there, unsafe, or incomplete.
        NodeError: this node cannot compute as the others do.
        StorageError: storage or network failed.
    """
    global _model_loads
    scratch.clean()
    config, manifest, models = job.config, job.manifest, job.models
    device = Device.set_up(config)
    folder = fetch(models.pipeline)
    pipeline = _load_pipeline(folder, models, device)
    scorer = load_scorer(models, folder, device.kind, config.texture)
    guide = None
    if job.guided:
        guide = _load_guide(models, pipeline, device)
        guide.refuse_judge(scorer.judge.model)
    safety = _load_safety(models, device)
    references = ReferenceReader(manifest.base, config.reference_root, config.max_pixels)
    loras = _load_loras(job, pipeline, device) if has_loras(config, manifest) else None
    _model_loads += 1
    components = Components(
        config, pipeline, scorer, references, models.pipeline.identity, device, guide=guide, loras=loras, safety=safety
    )
    return Worker(components, manifest, job.fingerprint, job.profiled)


def load_scorer(models: Models, folder: str, device: str, texture: bool) -> Scorer:
    """Fetch and load the judge and the perceptual distance of a run.

    Args:
        models: the models of the run.
        folder: where the model that generates lies on this node.
        device: ``cuda`` or ``cpu``.
        texture: whether the run measures texture.

    Raises:
        ModelError, StorageError: see :func:`load`.
    """
    judge_folder = os.path.join(folder, OWN_JUDGE) if models.judge is None else fetch(models.judge)
    judge = ClipJudge.from_pretrained(judge_folder, device=device)
    return Scorer(judge, _load_perceptual(models, folder, device), texture)


def _load_pipeline(folder: str, models: Models, device: Device) -> VCFPipeline:
    with load_errors(f"the model in {folder}"):
        pipeline = VCFPipeline.from_pretrained(folder, dtype=device.dtype, local_files_only=True)
    if models.ip_adapter is not None and models.image_encoder is not None:
        pipeline.use_ip_adapter(fetch(models.ip_adapter), fetch(models.image_encoder))
    return pipeline.set_up(device.kind, device.compiled, device.attention_kernel)


def _load_loras(job: Job, pipeline: VCFPipeline, device: Device) -> LoraShelf:
    reader = LoraReader(job.manifest.base, job.config.reference_root)
    return LoraShelf(pipeline, reader, {each.name: fetch(each.file) for each in job.models.loras}, device.use_threads)


def _load_guide(models: Models, pipeline: VCFPipeline, device: Device) -> Guide:
    if models.pno_guide is not None:
        return Guide.from_pretrained(fetch(models.pno_guide), device=device.kind)
    statistics = pipeline.feature_extractor
    return Guide(pipeline.image_encoder, statistics.image_mean, statistics.image_std)


def _load_safety(models: Models, device: Device) -> SafetyChecker | None:
    if models.safety_checker is None:
        return None
    folder = fetch(models.safety_checker)
    if models.safety_checker == models.pipeline:
        folder = os.path.join(folder, OWN_SAFETY)
    return SafetyChecker.from_pretrained(folder, device=device.kind)


def _load_perceptual(models: Models, folder: str, device: str) -> PerceptualDistance | None:
    if models.lpips == TINY_PERCEPTUAL:
        from vcf_batch.tiny.probe import Probe  # only a model that brings one needs it

        with load_errors(f"the probe of the model in {folder}"):
            probe = Probe.from_pretrained(os.path.join(folder, OWN_PROBE), dtype=torch.float32)
        return PerceptualDistance(probe.to(device).eval().features, device=device)
    if models.lpips_source is None:
        return None
    return LPIPS.from_pretrained(models.lpips, models.lpips_source, device=device)


class Worker:
    """Generator of shards, from given components.

    Two shards may be under way at once, each in a thread of its own. While one is sampled, the next one's first
    references are read, or the last one's files are finished and staged.

    Args:
        components: models, settings and tools, with the run's configuration.
        manifest: the manifest that rows are read from.
        fingerprint: name of the run, for the receipts.
        profiled: index of the shard whose first batches are recorded, see :attr:`vcf_batch.setup.job.Job.profiled`.
    """

    def __init__(
        self, components: Components, manifest: Manifest, fingerprint: str, profiled: int | None = None
    ) -> None:
        self.components = components
        self.manifest = manifest
        self.fingerprint = fingerprint
        self._profiled = profiled
        self._under_way: dict[str, Clock] = {}
        """The clock of each task under way, by attempt id."""

    @property
    def progress(self) -> dict[str, int]:
        """Count of the progress of each attempt under way, by attempt id. Any thread may read it."""
        return {attempt_id: clock.progress for attempt_id, clock in [*self._under_way.items()]}

    @property
    def samples_done(self) -> dict[str, int]:
        """Number of samples that each attempt under way has written, by attempt id. Any thread may read it."""
        return {attempt_id: clock.samples_done for attempt_id, clock in [*self._under_way.items()]}

    def note_progress(self, attempt_id: str) -> None:
        """Note progress that was made elsewhere for a task that is under way."""
        self._under_way[attempt_id].note_progress()

    def run(
        self, task: ShardTask, attempt_id: str, existing: Mapping[int, Sample] = MappingProxyType({})
    ) -> tuple[Receipt, dict[str, str]] | None:
        """Generate one shard and stage its files under the output.

        Rows with a verdict or an existing sample are not generated, and the other rows' bytes do not depend on them. A
        trial generates its selected rows in the same way and discards them. It shows whether this process survives.

        Args:
            task: the task.
            attempt_id: a name that no other task under way has; it names the staged files.
            existing: samples that stay, by row number. They are asked for one by one, in order.

        Returns:
            The receipt, not published, and the staged files as :func:`vcf_batch.output.commits.commit` takes them. None
            for a trial.

        Raises:
            UsageError: the manifest or the model cannot be used; trying again does not help.
            OutOfDeviceMemory: a batch does not fit.
            VcfBatchError: storage, network or the machine failed. No row is to blame; the shard may be tried again.
        """
        started, output = datetime.now(UTC), self.components.config.output
        is_profiled = not task.is_trial and task.shard.index == self._profiled
        with contextlib.ExitStack() as profiling:
            clock = profiling.enter_context(Profile(storage.join(output, TRACE))) if is_profiled else Clock()
            with self._generated(task, attempt_id, existing, clock) as files:
                if task.is_trial:
                    return None
                with clock("stage"):
                    staged = commits.stage(files, output, task.shard, attempt_id, clock.note_progress)
        receipt = Receipt(
            shard=task.shard,
            fingerprint=self.fingerprint,
            attempt=task.attempt,
            counts=files.counts,
            files=files.entries,
            device=self.components.device.description,
            timings=clock.seconds
            | {
                "started": started.isoformat(timespec="seconds"),
                "ended": datetime.now(UTC).isoformat(timespec="seconds"),
                "total": round(clock.elapsed(), 3),
                "worker": f"{socket.gethostname()}:{os.getpid()}",
                "model_loads": _model_loads,
                "generated": sum(files.counts.values()) - len(existing),
            },
            means=files.means,
            histograms=files.histograms,
            sampled=files.sampled,
            truncated=files.truncated,
            sampled_at_once=task.sampled_at_once,
        )
        return receipt, staged

    @contextlib.contextmanager
    def _generated(
        self, task: ShardTask, attempt_id: str, existing: Mapping[int, Sample], clock: Clock
    ) -> Iterator[ShardFiles]:
        """Generate the shard's files in a scratch folder, which is deleted when the block is left.

        The task is under way until then.
        """
        components, config = self.components, self.components.config
        components.device.use_threads()
        self._under_way[attempt_id] = clock
        try:
            with scratch.folder() as folder:
                with clock("read_manifest"):
                    read = self.manifest.rows(task.shard.start, task.shard.stop, config.seed)
                    rows = [checked(row, config) for row in read]
                lengths = text_lengths(components.pipeline.tokenizers, rows, config)
                most, way = components.pipeline.max_tokens, config.long_prompts
                told = zip(rows, (found.error(most, way) for found in lengths), strict=True)
                rows = [row if row.error else dataclasses.replace(row, error=error) for row, error in told]
                # A kept sample is asked for only if its row is not decided otherwise.
                known = ChainMap(self._decided(task, rows), cast(dict[int, Sample], existing))
                schema, is_web = schema_of(config, self.manifest), self.manifest.reference_is_web
                with shards.ShardWriter(folder, task.shard, config.image_format, schema, is_web) as writer:

                    def add(sample: Sample) -> None:
                        place = sample.row.number - task.shard.start
                        is_cut = way == "truncate" and lengths[place].excess(most) is not None
                        cut, tokens = None if sample.status == "failed" else is_cut, lengths[place].prompt
                        writer.add(dataclasses.replace(sample, prompt_tokens=tokens, prompt_truncated=cut))

                    Generation(
                        components,
                        ShardRows.of(rows, known, config, [found.windows(most, way) for found in lengths]),
                        add,
                        clock,
                        last_attempt=task.last_attempt or task.is_trial,
                        sampled_at_once=task.sampled_at_once,
                    ).run()
                    with clock("finish_files"):
                        files = writer.finish()
                yield files
        finally:
            del self._under_way[attempt_id]

    def _decided(self, task: ShardTask, rows: Sequence[Row]) -> dict[int, Sample]:
        """Samples of the rows that fail or are rejected without being generated, by row number."""
        config, verdicts, decided = self.components.config, task.not_generated, {}
        for row in rows:
            if error := verdicts.get(row.number) or row.error:
                decided[row.number] = Sample(row, "failed", settings_of(row, config), error_message=error)
            elif config.triplets and not row.references:
                decided[row.number] = Sample(row, "rejected", settings_of(row, config), error_message=NO_REFERENCE)
        return decided
