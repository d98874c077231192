"""A worker: one shard in, its staged files and its receipt out. No ray here, so it is tested without a cluster."""

import os
import socket
import tempfile
from datetime import UTC, datetime

import torch

from vcf_batch import models, shards
from vcf_batch.config import RunConfig
from vcf_batch.device import Device
from vcf_batch.generation import Clock, Generation, Tools
from vcf_batch.manifest import Manifest
from vcf_batch.metrics.clip_score import ClipJudge
from vcf_batch.metrics.lpips import LPIPS, PerceptualDistance
from vcf_batch.metrics.scorer import Scorer
from vcf_batch.prepare import OWN_JUDGE, OWN_PROBE, TINY_PERCEPTUAL, Models
from vcf_batch.records import Receipt, Shard
from vcf_batch.references import ReferenceReader
from vcf_batch.vcf.pipeline import VCFPipeline

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
    device = Device.prepare(config)
    folder = models.fetch(models_used.pipeline)
    judge = models_used.judge
    judge_folder = os.path.join(folder, OWN_JUDGE) if judge is None else models.fetch(judge)
    pipeline = _load_pipeline(folder, device)
    scorer = Scorer(
        ClipJudge.from_pretrained(judge_folder, device=device.kind),
        _load_perceptual(models_used, folder, device),
    )
    references = ReferenceReader(manifest.base, config.reference_root, config.max_pixels)
    _model_loads += 1
    return Worker(Tools(config, pipeline, scorer, references, device), manifest, fingerprint)


def _load_pipeline(folder: str, device: Device) -> VCFPipeline:
    with models.load_errors(f"the model in {folder}"):
        pipeline = VCFPipeline.from_pretrained(folder, dtype=device.dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device.kind)


def _load_perceptual(models_used: Models, folder: str, device: Device) -> PerceptualDistance | None:
    if models_used.lpips == TINY_PERCEPTUAL:
        from vcf_batch.tiny.probe import Probe  # only a model that brings one needs it

        with models.load_errors(f"the probe of the model in {folder}"):
            probe = Probe.from_pretrained(os.path.join(folder, OWN_PROBE), dtype=torch.float32)
        return PerceptualDistance(probe.to(device.kind).eval().features, device=device.kind)
    if models_used.lpips_source is None:
        return None
    return LPIPS.from_pretrained(models_used.lpips, models_used.lpips_source, device=device.kind)


class Worker:
    """Generates shards from parts that are given to it.

    Args:
        tools: what samples, scores and reads references.
        manifest: where rows are read from.
        fingerprint: the run's name, for the receipts.
    """

    def __init__(self, tools: Tools, manifest: Manifest, fingerprint: str) -> None:
        self.tools = tools
        self.manifest = manifest
        self.fingerprint = fingerprint
        self._generation: Generation | None = None

    @property
    def samples_done(self) -> int:
        """Samples of the current shard that are written: for progress, read from another thread."""
        generation = self._generation
        return generation.written if generation else 0

    def run(
        self, shard: Shard, attempt: int, attempt_id: str, last_attempt: bool = False
    ) -> tuple[Receipt, dict[str, str]]:
        """Generate one shard and stage its files under the output.

        Args:
            shard: rows of the manifest.
            attempt: how often the shard was tried, from 1.
            attempt_id: names the staged files; unique to this attempt.
            last_attempt: a reference that storage or network do not deliver fails its rows, not the attempt.

        Returns:
            The receipt, not published, and what :func:`vcf_batch.shards.commit` needs to publish it.

        Raises:
            UsageError: the manifest or the model cannot be used; trying again does not help.
            VcfBatchError: storage, network or the machine failed. No row is to blame; the shard may be tried again.
        """
        config, clock, started = self.tools.config, Clock(), datetime.now(UTC)
        self.tools.device.use_threads()
        self.tools.scorer.new_shard()
        try:
            with tempfile.TemporaryDirectory(prefix="vcf-batch-") as scratch:
                with clock("read_manifest"):
                    rows = self.manifest.rows(shard.start, shard.stop, config.seed)
                layout = (config.image_format, self.manifest.carried_schema, self.manifest.reference_is_list)
                with shards.ShardWriter(scratch, shard, *layout) as writer:
                    with Generation(self.tools, rows, writer, clock, last_attempt) as self._generation:
                        self._generation.run()
                    with clock("finish_files"):
                        files = writer.finish()
                with clock("stage"):
                    staged = shards.stage(files, config.output, shard, attempt_id)
        finally:
            self._generation = None  # with the shard's rows: two shards are never in memory
        receipt = Receipt(
            shard=shard,
            fingerprint=self.fingerprint,
            attempt=attempt,
            counts=files.counts,
            files=files.entries,
            device=self.tools.device.describe(),
            timings=clock.seconds
            | {
                "started": started.isoformat(timespec="seconds"),
                "ended": datetime.now(UTC).isoformat(timespec="seconds"),
                "total": round(clock.elapsed(), 3),
                "worker": f"{socket.gethostname()}:{os.getpid()}",
                "model_loads": _model_loads,
            },
            means=files.means,
        )
        return receipt, staged
