"""A worker: one shard in, its staged files and its receipt out. No ray here, so it is tested without a cluster."""

import contextlib
import os
import socket
from collections import ChainMap
from collections.abc import Container, Iterator, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import cast

import torch

from vcf_batch import storage
from vcf_batch.config import RunConfig
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.manifest.references import ReferenceReader
from vcf_batch.metrics.clip_score import ClipJudge
from vcf_batch.metrics.lpips import LPIPS, PerceptualDistance
from vcf_batch.metrics.scorer import Scorer
from vcf_batch.models.cache import fetch
from vcf_batch.models.loading import load_errors
from vcf_batch.output import commits, shards
from vcf_batch.output.shards import ShardFiles
from vcf_batch.records import Receipt, Sample, Shard
from vcf_batch.row_settings import checked, settings_of
from vcf_batch.setup.job import TRACE, is_guided
from vcf_batch.setup.run_models import OWN_JUDGE, OWN_PROBE, OWN_SAFETY, TINY_PERCEPTUAL, Models
from vcf_batch.storage import scratch
from vcf_batch.vcf.guide import Guide
from vcf_batch.vcf.pipeline import VCFPipeline
from vcf_batch.vcf.safety import SafetyChecker
from vcf_batch.worker.clock import Clock, Profile
from vcf_batch.worker.components import Components
from vcf_batch.worker.device import Device
from vcf_batch.worker.generation import Generation

NO_REFERENCE = "the row has no reference, which each triplet shows; give it one, or leave --triplets out"

_model_loads = 0
"""How often this process has loaded models. Receipts show it: once is right."""


def load(*, config: RunConfig, fingerprint: str, manifest: Manifest, models_used: Models) -> "Worker":
    """Fetch and load everything, and build the worker. Takes as long as loading a model does.

    Args:
        config: the run, with every default resolved.
        fingerprint: the run's name.
        manifest: as the driver opened it.
        models_used: as the driver resolved them.

    Raises:
        ModelError: a model is not there, unsafe, incomplete, or this machine cannot run it.
        StorageError: storage or network failed.
    """
    global _model_loads
    scratch.clean()
    device = Device.prepare(config)
    folder = fetch(models_used.pipeline)
    judge = models_used.judge
    judge_folder = os.path.join(folder, OWN_JUDGE) if judge is None else fetch(judge)
    pipeline = _load_pipeline(folder, device, config.compile)
    scorer = Scorer(
        ClipJudge.from_pretrained(judge_folder, device=device.kind),
        _load_perceptual(models_used, folder, device),
    )
    guide = None
    if is_guided(config, manifest):
        guide = _load_guide(models_used, pipeline, device)
        guide.refuse_judge(scorer.judge.model)
    safety = _load_safety(models_used, device)
    references = ReferenceReader(manifest.base, config.reference_root, config.max_pixels)
    _model_loads += 1
    components = Components(config, pipeline, scorer, references, models_used.pipeline.identity, device, guide, safety)
    return Worker(components, manifest, fingerprint)


def _load_pipeline(folder: str, device: Device, compiled: bool) -> VCFPipeline:
    with load_errors(f"the model in {folder}"):
        pipeline = VCFPipeline.from_pretrained(folder, dtype=device.dtype, local_files_only=True)
    return pipeline.set_up(device.kind, compiled)


def _load_guide(models_used: Models, pipeline: VCFPipeline, device: Device) -> Guide:
    if models_used.pno_guide is not None:
        return Guide.from_pretrained(fetch(models_used.pno_guide), device=device.kind)
    statistics = pipeline.feature_extractor
    return Guide(pipeline.image_encoder, statistics.image_mean, statistics.image_std)


def _load_safety(models_used: Models, device: Device) -> SafetyChecker | None:
    if models_used.safety_checker is None:
        return None
    folder = fetch(models_used.safety_checker)
    if models_used.safety_checker == models_used.pipeline:
        folder = os.path.join(folder, OWN_SAFETY)
    return SafetyChecker.from_pretrained(folder, device=device.kind)


def _load_perceptual(models_used: Models, folder: str, device: Device) -> PerceptualDistance | None:
    if models_used.lpips == TINY_PERCEPTUAL:
        from vcf_batch.tiny.probe import Probe  # only a model that brings one needs it

        with load_errors(f"the probe of the model in {folder}"):
            probe = Probe.from_pretrained(os.path.join(folder, OWN_PROBE), dtype=torch.float32)
        return PerceptualDistance(probe.to(device.kind).eval().features, device=device.kind)
    if models_used.lpips_source is None:
        return None
    return LPIPS.from_pretrained(models_used.lpips, models_used.lpips_source, device=device.kind)


class Worker:
    """Generates shards from parts that are given to it.

    Two shards may be under way at once, each in a thread of its own: while one is sampled, the next one's first
    references are read, or the last one's files are finished and staged.

    Args:
        components: what samples, scores and reads references.
        manifest: where rows are read from.
        fingerprint: the run's name, for the receipts.
    """

    def __init__(self, components: Components, manifest: Manifest, fingerprint: str) -> None:
        self.components = components
        self.manifest = manifest
        self.fingerprint = fingerprint
        self._under_way: dict[str, Clock] = {}
        """By the names of the attempts."""

    @property
    def ticks(self) -> dict[str, int]:
        """By attempt, what changes whenever something is done: read from another thread to see whether one hangs."""
        return {attempt_id: clock.ticks for attempt_id, clock in [*self._under_way.items()]}

    @property
    def samples_done(self) -> dict[str, int]:
        """Samples that are written, by attempt: for progress, read from another thread."""
        return {attempt_id: clock.samples_done for attempt_id, clock in [*self._under_way.items()]}

    def tick(self, attempt_id: str) -> None:
        """Something was done elsewhere for a shard that is under way."""
        self._under_way[attempt_id].tick()

    def run(
        self,
        shard: Shard,
        attempt: int,
        attempt_id: str,
        last_attempt: bool = False,
        verdicts: Mapping[int, str] = MappingProxyType({}),
        existing: Mapping[int, Sample] = MappingProxyType({}),
        sampled_at_once: int | None = None,
        profiled: bool = False,
    ) -> tuple[Receipt, dict[str, str]]:
        """Generate one shard and stage its files under the output.

        Rows with a verdict or an existing sample are not touched; the other rows' bytes do not depend on which these
        are.

        Args:
            shard: rows of the manifest.
            attempt: how often the shard was tried, from 1.
            attempt_id: names the staged files; unique to this attempt.
            last_attempt: a reference that storage or network do not deliver fails its rows, not the attempt.
            verdicts: row number to error message: rows that fail without a try.
            existing: row number to sample: rows that are done. Samples are asked for one by one, in order.
            sampled_at_once: rows at most, where memory is too small for a batch; the receipt says so, because samples
                may differ in their last bits.
            profiled: record a trace of the shard's first batches: :data:`vcf_batch.setup.job.TRACE` in the output.

        Returns:
            The receipt, not published, and what :func:`vcf_batch.output.commits.commit` needs to publish it.

        Raises:
            UsageError: the manifest or the model cannot be used; trying again does not help.
            OutOfDeviceMemory: a batch does not fit.
            VcfBatchError: storage, network or the machine failed. No row is to blame; the shard may be tried again.
        """
        started, output = datetime.now(UTC), self.components.config.output
        with contextlib.ExitStack() as profiling:
            clock = profiling.enter_context(Profile(storage.join(output, TRACE))) if profiled else Clock()
            how = (clock, last_attempt, sampled_at_once)
            with self._generated(shard, attempt_id, verdicts, existing, *how) as files, clock("stage"):
                staged = commits.stage(files, output, shard, attempt_id, clock.tick)
        receipt = Receipt(
            shard=shard,
            fingerprint=self.fingerprint,
            attempt=attempt,
            counts=files.counts,
            files=files.entries,
            device=self.components.device.describe(),
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
            sampled_at_once=sampled_at_once,
        )
        return receipt, staged

    def trial(
        self, shard: Shard, attempt_id: str, selected: Container[int], sampled_at_once: int | None = None
    ) -> None:
        """Generate some rows of a shard as :meth:`run` does, and throw them away: what happens to this process?

        Args:
            shard: rows of the manifest.
            attempt_id: names what is under way.
            selected: numbers of the rows that are generated.
            sampled_at_once: as for :meth:`run`.

        Raises:
            VcfBatchError: as :meth:`run`, but a reference that storage or network do not deliver fails its rows.
        """
        left_out = {
            number: "left out of a trial" for number in range(shard.start, shard.stop) if number not in selected
        }
        with self._generated(shard, attempt_id, left_out, {}, Clock(), True, sampled_at_once):
            pass

    @contextlib.contextmanager
    def _generated(
        self,
        shard: Shard,
        attempt_id: str,
        verdicts: Mapping[int, str],
        existing: Mapping[int, Sample],
        clock: Clock,
        last_attempt: bool,
        sampled_at_once: int | None,
    ) -> Iterator[ShardFiles]:
        """The shard's files, in scratch that goes when the block is left."""
        self.components.device.use_threads()
        self._under_way[attempt_id] = clock
        try:
            with scratch.folder() as folder:
                with clock("read_manifest"):
                    read = self.manifest.rows(shard.start, shard.stop, self.components.config.seed)
                    rows = [checked(row, self.components.config) for row in read]
                failed = {
                    row.number: Sample(row, "failed", settings_of(row, self.components.config), error_message=error)
                    for row in rows
                    if (error := verdicts.get(row.number) or row.error)
                }
                rejected = {
                    row.number: Sample(
                        row, "rejected", settings_of(row, self.components.config), error_message=NO_REFERENCE
                    )
                    for row in rows
                    if self.components.config.triplets and not row.references
                }
                known = ChainMap(failed, rejected, cast(dict[int, Sample], existing))
                way = (clock, last_attempt, sampled_at_once)
                layout = (
                    self.components.config.image_format,
                    self.manifest.carried_schema,
                    self.manifest.reference_is_list,
                )
                with shards.ShardWriter(folder, shard, *layout) as writer:
                    Generation(self.components, rows, known, writer.add, *way).run()
                    with clock("finish_files"):
                        files = writer.finish()
                yield files
        finally:
            del self._under_way[attempt_id]
