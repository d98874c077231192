"""Show a manifest's first rows with several settings side by side before a run, in this process, without a cluster."""

import dataclasses
import io
import itertools
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from PIL import Image

from vcf_batch.commands.generate import ManifestLike, configured
from vcf_batch.config.mapping import checked_values
from vcf_batch.config.row_settings import checked, settings_of
from vcf_batch.config.run_config import RunConfig
from vcf_batch.config.signature import with_settings_of
from vcf_batch.driver.progress import Steps
from vcf_batch.errors import RowError, StorageError, UsageError
from vcf_batch.models.prompt_tokens import windows_of
from vcf_batch.records import Row, Sample
from vcf_batch.report.contact_sheet import Cell, grid, scores_of
from vcf_batch.setup import absolute_paths, defaults, manifest_check, model_check, run_models
from vcf_batch.setup.job import fusions_of
from vcf_batch.storage import scratch
from vcf_batch.vcf import quietly
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
    "role": str,
    "guidance_scale": float,
    "pno_steps": int,
    "seed": int,
}
"""Settings that a sweep may vary, with their types: the settings that a row of a manifest may override."""

MAX_SAMPLES = 4096

Variant = Mapping[str, Any]
"""Settings by name."""
TEXT_ONLY_COLUMN: Variant = {"strength": 0.0, "pno_steps": 0}


@with_settings_of(RunConfig)
def preview(
    manifest: ManifestLike,
    rows: int = 16,
    sweep: Mapping[str, Sequence[Any]] = MappingProxyType({}),
    **settings: Any,
) -> Image.Image:
    """Draw the first rows of a manifest with several settings, side by side in one picture with their scores.

    Its columns are the reference, text only, and each combination of the swept values. A row's images all start from
    the same noise. It needs no cluster, computes in this process, and writes nothing. It is ``vcf-batch preview``.

    Args:
        manifest: as :func:`vcf_batch.run` takes it.
        rows: largest number of rows to draw.
        sweep: values by setting, such as ``{"strength": [0, 0.5, 1]}``. The settings are ``strength``, ``fusion``,
            ``fusion_lo``, ``fusion_hi``, ``role``, ``guidance_scale``, ``pno_steps`` and ``seed``. Without any, one
            column has the settings of the run.
        settings: fields of :class:`RunConfig`, such as ``model``.

    Raises:
        UsageError: a setting, the manifest or the model cannot be used, or there would be too many samples.
        VcfBatchError: the storage or the network failed.
    """
    if rows < 1:
        raise UsageError(f"rows is {rows}; it must be at least 1")
    with scratch.temporary("the manifest") as folder, in_process.restored(), quietly():
        output = None if isinstance(manifest, RunConfig) else os.path.join(folder, "output")
        return draw(configured(manifest, output, settings), rows, sweep)


def parsed(sweeps: Sequence[str]) -> dict[str, list[Any]]:
    """Values by setting, as ``sweep`` of :func:`preview`.

    Args:
        sweeps: each a name and its values, such as ``strength=0,0.5,1``.

    Raises:
        UsageError: a name is unknown or repeated, or a value is of another type.
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
    return values


def variants(sweep: Mapping[str, Sequence[Any]], config: RunConfig) -> list[Variant]:
    """All combinations of the swept values.

    Args:
        sweep: see :func:`preview`.
        config: configuration of the run; it checks the limits of each setting.

    Raises:
        UsageError: a name is unknown, or a value is invalid.
    """
    values: dict[str, list[Any]] = {}
    for name, given in sweep.items():
        if name not in SWEPT or isinstance(given, str):
            raise UsageError(
                f"sweep {name!r}: {given!r}; give one of {', '.join(SWEPT)} and a list of its values, such as "
                "{'strength': [0, 0.5, 1]}"
            )
        values[name] = []
        for value in given:
            checked_values(RunConfig, {"manifest": "m", "output": "o", name: value})
            config.replace(**{name: value})
            values[name].append(SWEPT[name](value))
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def draw(config: RunConfig, rows: int, sweep: Mapping[str, Sequence[Any]]) -> Image.Image:
    """Generate the first rows as text only and in every variant, from the same noise, and draw them side by side.

    Args:
        config: configuration of the run; its ``output`` is ignored.
        rows: largest number of rows to draw.
        sweep: see :func:`preview`.

    Raises:
        UsageError: a sweep, the manifest or the model cannot be used, or there would be too many samples.
        VcfBatchError: the storage or the network failed.
    """
    with scratch.temporary("the pictures") as folder:
        if part := config.part:
            shown_rows: dict[str, Any] = {"rows": f"{part.start}:{min(part.start + rows, part.stop)}"}
        else:
            shown_rows = {"limit": min(rows, config.limit or rows)}
        config = absolute_paths.absolute(config.replace(output=folder, **shown_rows))
        config = in_process.settled(config)
        columns = [TEXT_ONLY_COLUMN, *variants(sweep, config)]
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
        shown = [checked(row, job.config) for row in manifest.first_rows(rows, config.seed)]
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
    overrides = {name: value for name, value in variant.items() if name not in ("seed", "role")}
    if "role" in variant:
        overrides["reference_roles"] = (variant["role"],) * len(row.references)
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
    windows = windows_of(components.pipeline.tokenizers, chosen, components.config)
    whole = ShardRows.of(chosen, failed, components.config, windows)
    with Steps("drawing", len(chosen), "image") as shown:

        def take(sample: Sample) -> None:
            made.append(sample)
            shown.advance()

        Generation(components, whole, take, Clock(), last_attempt=True, sampled_at_once=None).run()
    return [made[number] for number in numbers]


def _label(variant: Variant) -> list[str]:
    def shown(name: str, value: Any) -> str:
        if name in ("fusion", "role"):
            return str(value)
        return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"

    return [shown(name, value) for name, value in variant.items()] or ["as asked"]


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
