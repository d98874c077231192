"""The forecast of a run: what it will take, and what would refuse it. Nothing is written."""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import pyarrow.parquet as pq

from vcf_batch.config.row_settings import checked
from vcf_batch.config.run_config import RunConfig
from vcf_batch.driver.progress import duration, plural
from vcf_batch.errors import ManifestError, RefusedError, UsageError, VcfBatchError, redact
from vcf_batch.manifest.references import LoraReader, ReferenceReader, refusal
from vcf_batch.models.prompt_tokens import read_tokenizers, text_lengths
from vcf_batch.output import lease, progress_file, run_file
from vcf_batch.output.sums import RunSums
from vcf_batch.records import Row
from vcf_batch.setup import absolute_paths, claim, defaults, lora_batches, manifest_check, model_check, run_models
from vcf_batch.setup.job import Job, fusions_of
from vcf_batch.setup.lora_batches import LoraBatches
from vcf_batch.setup.shard_task import ShardTask
from vcf_batch.sharding import ShardPlan
from vcf_batch.storage import scratch
from vcf_batch.worker import in_process

PLANNED_ROWS = 1000
"""Rows at the manifest's start that are checked for whether they would fail."""
_FATES_OF_LONG_PROMPTS = {
    "truncate": "are cut off there",
    "refuse": "fail",
    "chunk": "are encoded in windows of that length",
}
SHOWN_ROWS = 8
CALIBRATION_BATCHES = 2
"""Batches that a calibration generates: the second one is sampled beside the scoring of the first."""


@dataclass(frozen=True)
class Measurement:
    """The speed of a worker and the size of what it writes; measured, never guessed."""

    source: str
    """What was measured, in words."""
    device: str
    seconds_per_row: float
    """Seconds that one worker takes for a row."""
    bytes_per_row: float
    """Bytes of tar and parquet together."""
    load_seconds: float = 0.0
    """Seconds until a worker is ready; 0 where that is not known."""


@dataclass
class Forecast:
    """The forecast of a run."""

    output: str
    problems: list[VcfBatchError] = field(default_factory=list)
    """Reasons to refuse the run, each of them enough."""
    doomed: list[str] = field(default_factory=list)
    """Rows that would fail, with the reason, among the first :data:`PLANNED_ROWS`. The run starts all the same."""
    job: Job | None = None
    """The settled run; None where a problem leaves it open."""
    max_tokens: int = 0
    """Number of tokens that the text encoder takes of a prompt; 0 where that is not known."""
    long_prompts: int = 0
    """Number of rows with a prompt or negative prompt of more tokens, among the first :data:`PLANNED_ROWS`."""
    guessed_shard_size: bool = False
    """Whether the shard size comes from a guess of the device's speed. Nothing else here is guessed."""
    open_batch_size: bool = False
    """Whether the run would measure the batch size; here it is :data:`vcf_batch.worker.in_process.BATCH_SIZE`."""
    rows_done: int = 0
    shards_done: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    """What is read of the manifest and what is not: see :func:`vcf_batch.setup.manifest_check.told`."""
    rows_having: dict[str, int | None] | None = None
    """Rows with a value in each column that is read: see :class:`vcf_batch.manifest.check.Census`. None where the rows
    are not counted, because the run is resumed."""
    lora_batches: tuple[LoraBatches, LoraBatches] | None = None
    """Batches by the column ``lora``, as the rows are and if they were sorted by it; None without such a column."""
    measurement: Measurement | None = None
    """The speed by the receipts that are there, else by a calibration; None where there is neither."""

    def figures(self, price: float | None) -> dict[str, Any]:
        """Rows, shards, and what the rest of them takes, as plain JSON types; None where only a measurement could tell.

        Args:
            price: of an hour of a GPU, or of a worker where workers have none.
        """
        if self.job is None:
            return {}
        config, shards, rows = self.job.config, len(self.job.shards), self.job.manifest.num_rows
        rows_left, shards_left = rows - self.rows_done, shards - self.shards_done
        workers = config.num_workers or 1
        figures = {
            "rows": rows,
            "rows_done": self.rows_done,
            "shards": shards,
            "shards_done": self.shards_done,
            "shard_size": config.shard_size,
            "workers": workers,
            "gpus_per_worker": config.gpus_per_worker,
            **dict.fromkeys(("bytes", "seconds", "device_hours", "cost")),
        }
        if self.measurement:
            busy = min(workers, shards_left)
            load, speed = self.measurement.load_seconds, self.measurement.seconds_per_row
            # A shard is done by one worker; the last ones to finish decide.
            in_a_row = math.ceil(shards_left / workers) * min(self.job.shards.shard_size, rows_left)
            hours = (rows_left * speed + busy * load) / 3600 * (config.gpus_per_worker or 1)
            figures |= {
                "bytes": round(rows * self.measurement.bytes_per_row),
                "seconds": in_a_row * speed + load if rows_left else 0.0,
                "device_hours": hours,
                "cost": None if price is None else hours * price,
            }
        return figures

    def to_dict(self, price: float | None) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "output": redact(self.output),
            "problems": [str(problem) for problem in self.problems],
            "doomed_rows": self.doomed,
            "long_prompts": {"max_tokens": self.max_tokens, "rows": self.long_prompts},
            "columns": self.columns,
            "rows_having": self.rows_having,
            "loras": self.lora_batches and dict(zip(("as_it_is", "sorted"), map(vars, self.lora_batches), strict=True)),
            **self.figures(price),
            "measurement": self.measurement and vars(self.measurement),
        }

    def told(self, price: float | None) -> str:
        """The forecast in lines for people. For ``price`` see :meth:`figures`."""
        lines = [f"{redact(self.output)}: nothing is written yet, this is a plan"]
        lines += [f"  {name:<10}{text}" for name, text in self.columns.items()]
        if figures := self.figures(price):
            lines += [f"  {name:<10}{text}" for name, text in self._lines(figures)]
        lines += [f"  would fail: {row}" for row in self.doomed[:SHOWN_ROWS]]
        if len(self.doomed) > SHOWN_ROWS:
            lines.append(f"  ({len(self.doomed):,} of the first {PLANNED_ROWS:,} rows would fail)")
        lines += [f"  refused: {problem}" for problem in self.problems]
        return "\n".join(lines)

    def _lines(self, figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
        guess = ", sized by a rough guess of the speed (--shard-size sets it)" if self.guessed_shard_size else ""
        part = self.job.config.part if self.job else None
        which = f" (from {part.start:,} to {part.stop - 1:,} of the manifest)" if part else ""
        yield "rows", f"{figures['rows']:,}{which}, {figures['rows_done']:,} of them done"
        if self.long_prompts:
            first = min(PLANNED_ROWS, figures["rows"])
            fate = _FATES_OF_LONG_PROMPTS[self.job.config.long_prompts if self.job else "truncate"]
            told = f"{self.long_prompts:,} of the first {first:,} rows have prompts of more than {self.max_tokens}"
            yield "prompts", f"{told} tokens, which {fate} (--long-prompts)"
        yield (
            "shards",
            f"{figures['shards']:,} of {figures['shard_size']:,} rows{guess}; {figures['shards_done']:,} done",
        )
        if self.open_batch_size:
            yield (
                "batches",
                f"of {in_process.BATCH_SIZE} rows here; the run looks for the fastest, and shards follow",
            )
        if self.lora_batches:
            yield "LoRAs", _told_loras(*self.lora_batches)
        measured, gpus = self.measurement, figures["gpus_per_worker"]
        if measured is None:
            yield "time", "not known before something is measured: --calibrate does so on this machine"
            return
        unit = "GPU-hours" if gpus else "worker-hours"
        yield "measured", f"{measured.source}, on {measured.device}: {measured.seconds_per_row:.3g} s a row and worker"
        yield "bytes", f"{figures['bytes'] / 1e6:,.1f} MB in all"
        yield (
            "time",
            f"{duration(figures['seconds'])} with {plural(figures['workers'], 'worker')}, each with {gpus:g} GPUs",
        )
        cost = "" if figures["cost"] is None else f", {figures['cost']:,.2f} at that price"
        yield "work", f"{figures['device_hours']:.3g} {unit}{cost}"


def look(config: RunConfig, calibrate: bool) -> Forecast:
    """Look at what a run is asked to do, and collect all that would refuse it.

    Args:
        config: as for :func:`vcf_batch.pool.run`.
        calibrate: where no receipt tells how fast it goes, load the model in this process and generate a few rows.

    Raises:
        VcfBatchError: the calibration failed.
    """
    forecast = Forecast(config.output)

    def collect(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except VcfBatchError as error:
            # Rows that break the contract are told once, all of them; a later step stumbles over the first.
            broken = isinstance(error, ManifestError) and any(isinstance(it, ManifestError) for it in forecast.problems)
            if not broken and str(error) not in map(str, forecast.problems):  # run.json is read twice
                forecast.problems.append(error)

    absolute = collect(lambda: absolute_paths.absolute(config))
    if absolute is None:
        return forecast
    config = absolute
    forecast.output = config.output
    record = collect(lambda: run_file.read(config.output))
    config = claim.resume(config, record)
    forecast.guessed_shard_size = config.shard_size is None
    forecast.open_batch_size = config.batch_size is None
    config = in_process.settled(config)
    collect(lambda: _refuse_owner(config.output))
    manifest = collect(lambda: run_file.open_manifest(config, record))
    if manifest is not None:
        found = [collect(check) for check in manifest_check.checks(manifest, config, record)]
        census = manifest_check.census_of(found)
        forecast.columns = dict(manifest_check.told(manifest, found))
        forecast.rows_having = census.having if census else None
    models = collect(lambda: run_models.resolve(config, claim.commits_of(config, record)))
    if manifest is None or models is None:
        return forecast

    def settle() -> Job:
        model_check.check(config, manifest, models, fusions_of(config, manifest))
        return defaults.settle(config, manifest, models)

    job = forecast.job = collect(settle)
    if job is None:
        return forecast
    forecast.lora_batches = collect(lambda: lora_batches.counted(job))
    first = collect(lambda: [*_first_rows(job)]) or []
    if tokenizers := collect(lambda: read_tokenizers(models.pipeline)):
        forecast.max_tokens = int(tokenizers[0].model_max_length)
        lengths = text_lengths(tokenizers, [row for row, _ in first], job.config)
        long = [found.excess(forecast.max_tokens) for found in lengths]
        forecast.long_prompts = sum(reason is not None for reason in long)
        refused = [found.error(forecast.max_tokens, job.config.long_prompts) for found in lengths]
        first = [(row, reason or too_long) for (row, reason), too_long in zip(first, refused, strict=True)]
    forecast.doomed = [f"{row.key}: {reason}" for row, reason in first if reason]
    extends = collect(lambda: claim.claim(job, publish=False))
    totals = RunSums()
    if extends is not None:
        totals = progress_file.look(config.output, {job.fingerprint, *extends}, job.shards).totals
        forecast.rows_done, forecast.shards_done = totals.counts.total(), len(totals.done)
    if totals.generated:
        forecast.measurement = _recorded(totals)
    elif calibrate and not forecast.problems:
        forecast.measurement = _calibrated(job)
    return forecast


def _told_loras(as_it_is: LoraBatches, in_order: LoraBatches) -> str:
    def told(each: LoraBatches) -> str:
        return f"batches: {each.batches:,}, empty places in them: {each.padding:,}, switches: {each.switches:,}"

    words = f"{plural(as_it_is.loras, 'different choice')} of LoRAs; {told(as_it_is)}"
    if lora_batches.is_worth_sorting(as_it_is, in_order):
        words += f". Sorted by the column 'lora' (ORDER BY lora), the manifest would have {told(in_order)}"
    return words


def _refuse_owner(output: str) -> None:
    if (owner := lease.owner(output)) and owner.alive:
        raise RefusedError(
            f"{output} is held by another run, which is alive: process {owner.pid} on {owner.host}, started "
            f"{owner.started}"
        )


def _first_rows(job: Job) -> Iterator[tuple[Row, str | None]]:
    """Yield the manifest's first rows, each with the reason why it would fail; None if the manifest tells of none."""
    config, manifest = job.config, job.manifest
    references = ReferenceReader(manifest.base, config.reference_root, config.max_pixels)
    loras = LoraReader(manifest.base, config.reference_root)
    for row in manifest.first_rows(PLANNED_ROWS, config.seed):
        yield row, checked(row, config).error or refusal(row, references, loras)


def _recorded(totals: RunSums) -> Measurement:
    return Measurement(
        f"by {len(totals.done):,} finished shards",
        ", ".join(totals.devices),
        totals.worker_seconds / totals.generated,
        totals.bytes / totals.counts.total(),
    )


def _calibrated(job: Job) -> Measurement:
    """Load a worker in this process, let it write a small shard into scratch, and time the rows that do not fail."""
    count = min(CALIBRATION_BATCHES * cast(int, job.config.batch_size), job.manifest.num_rows)
    shard = ShardPlan(job.manifest.num_rows, count, job.manifest.first_row)[0]
    with scratch.temporary("a small shard") as folder:
        begin = time.perf_counter()
        loaded = in_process.load(job, folder)
        load_seconds = time.perf_counter() - begin
        from vcf_batch.worker import calibration  # brings torch

        made = loaded.run(ShardTask(shard, last_attempt=True), "calibration")
        assert made  # it is no trial
        receipt, staged = made
        written = pq.read_table(os.path.join(folder, staged["parquet"]), columns=["status", "error_message"])
        rows = [
            row
            for row, status in zip(
                job.manifest.iter_rows(shard.start, shard.stop, job.config.seed), written["status"], strict=True
            )
            if status.as_py() != "failed"
        ]
        if not rows:
            raise UsageError(
                f"there is nothing to time, as each of the first {len(shard)} rows fails; the first: "
                f"{written['error_message'][0]}"
            )
        return Measurement(
            f"by {len(rows)} rows in this process",
            receipt.device["type"],
            calibration.seconds_per_image(loaded.components, rows),
            sum(entry.size for entry in receipt.files.values()) / len(rows),
            load_seconds,
        )
