"""Show a manifest's first rows with several settings side by side before a run, in this process, without a cluster."""

import dataclasses
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from vcf_batch.config import RunConfig
from vcf_batch.errors import RowError, StorageError, UsageError
from vcf_batch.records import Row, Sample
from vcf_batch.report.contact_sheet import Cell, grid, scores_of
from vcf_batch.row_settings import checked, settings_of
from vcf_batch.setup import absolute_paths, defaults, manifest_check, model_check, run_models
from vcf_batch.setup.job import fusions_of
from vcf_batch.storage import scratch
from vcf_batch.worker import in_process
from vcf_batch.worker.clock import Clock
from vcf_batch.worker.components import Components
from vcf_batch.worker.generation import Generation
from vcf_batch.worker.shard_rows import ShardRows

SWEPT = {
    "strength": float,
    "fusion": str,
    "fusion_lo": float,
    "fusion_hi": float,
    "guidance_scale": float,
    "pno_steps": int,
    "seed": int,
}
"""Settings that a sweep may vary, with their types: the settings that a row of a manifest may override."""

MAX_SAMPLES = 4096

Variant = Mapping[str, Any]
"""Settings by name."""
TEXT_ONLY_COLUMN: Variant = {"strength": 0.0, "pno_steps": 0}


def variants(sweeps: Sequence[str], config: RunConfig) -> list[Variant]:
    """All combinations of the swept values.

    Args:
        sweeps: each a name and its values, such as ``strength=0,0.5,1``.
        config: configuration of the run; it checks the limits of each setting.

    Raises:
        UsageError: a name is unknown or repeated, or a value is invalid.
    """
    values: dict[str, list[Any]] = {}
    for sweep in sweeps:
        name, equals, listed = sweep.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in SWEPT or name in values:
            raise UsageError(
                f"--sweep {sweep!r}: give one of {', '.join(SWEPT)} and its values, each name once, such as "
                "--sweep strength=0,0.5,1"
            )
        try:
            values[name] = [SWEPT[name](value.strip()) for value in listed.split(",")]
        except ValueError as error:
            raise UsageError(f"--sweep {sweep!r}: {error}") from error
        for value in values[name]:
            config.replace(**{name: value})
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def draw(config: RunConfig, rows: int, sweeps: Sequence[str]) -> Image.Image:
    """Generate the first rows as text only and in every variant, from the same noise, and draw them side by side.

    Args:
        config: configuration of the run; its ``output`` is ignored.
        rows: largest number of rows to draw.
        sweeps: see :func:`variants`.

    Raises:
        UsageError: a sweep, the manifest or the model cannot be used, or there would be too many samples.
        VcfBatchError: the storage or the network failed.
    """
    with scratch.temporary("the pictures") as folder:
        config = absolute_paths.absolute(config.replace(output=folder, limit=min(rows, config.limit or rows)))
        config = in_process.settled(config)
        columns = [TEXT_ONLY_COLUMN, *variants(sweeps, config)]
        manifest = manifest_check.open_checked(config, None)
        if manifest.num_rows * len(columns) > MAX_SAMPLES:
            raise UsageError(
                f"{manifest.num_rows} rows in {len(columns)} columns are more than {MAX_SAMPLES:,} samples; sweep "
                "less, or show fewer --rows"
            )
        models = run_models.resolve(config)
        swept = {str(column["fusion"]) for column in columns if "fusion" in column}
        model_check.check(config, manifest, models, fusions_of(config, manifest) | swept)
        job = defaults.settle(config, manifest, models)
        components = in_process.load(job, folder).components
        shown = [checked(row, job.config) for row in manifest.rows(0, manifest.num_rows, config.seed)]
        samples = _generated(components, [_changed(row, column) for row in shown for column in columns])
    heads = [["reference"], ["text only"], *(_label(column) for column in columns[1:])]
    cells = [_cell(sample) for sample in samples]
    return grid(
        heads,
        [
            (row.prompt, [_reference(row, components), *cells[place * len(columns) : (place + 1) * len(columns)]])
            for place, row in enumerate(shown)
        ],
    )


def _changed(row: Row, variant: Variant) -> Row:
    overrides = {name: value for name, value in variant.items() if name != "seed"}
    return dataclasses.replace(row, seed=variant.get("seed", row.seed), overrides={**row.overrides, **overrides})


def _generated(components: Components, rows: Sequence[Row]) -> list[Sample]:
    """One sample for each row. Rows that give the same image share one sample, which is generated once."""
    distinct: dict[Any, int] = {}
    numbers = []
    for row in rows:
        used = settings_of(row, components.config)
        if not used["strength"]:  # Without strength, the fusion settings do not change the image.
            used |= dict.fromkeys(("fusion", "fusion_lo", "fusion_hi"))
        numbers.append(distinct.setdefault((row.key, repr(used)), len(distinct)))
    first = dict(zip(reversed(numbers), reversed(rows), strict=True))
    chosen = [dataclasses.replace(first[number], number=number) for number in range(len(distinct))]
    failed = {
        row.number: Sample(row, "failed", settings_of(row, components.config), error_message=row.error)
        for row in chosen
        if row.error
    }
    made: list[Sample] = []
    components.device.use_threads()
    whole = ShardRows.of(chosen, failed, components.config)
    Generation(components, whole, made.append, Clock(), last_attempt=True, sampled_at_once=None).run()
    return [made[number] for number in numbers]


def _label(variant: Variant) -> list[str]:
    return [str(value) if name == "fusion" else f"{name} {value:g}" for name, value in variant.items()] or ["as asked"]


def _cell(sample: Sample) -> Cell:
    if sample.image is None:
        return Cell(None, sample.status, [sample.error_message or ""])
    picture = Image.open(io.BytesIO(sample.image)).convert("RGB")
    return Cell(picture, "", scores_of(dataclasses.asdict(sample.scores)))


def _reference(row: Row, components: Components) -> Cell:
    if not row.references:
        return Cell(None, "none")
    try:
        return Cell(components.references.read(row.references[0]), "")
    except (RowError, StorageError):
        return Cell(None, "cannot be read")
