"""Generate from Python: the manifest is a file, or a table in memory that becomes a file of the output."""

import contextlib
import hashlib
import io
import os
import sys
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from vcf_batch import pool, storage
from vcf_batch.config.run_config import RunConfig
from vcf_batch.config.signature import with_settings_of
from vcf_batch.driver.ledger import Summary
from vcf_batch.errors import ManifestError, RefusedError, UsageError, redact_name
from vcf_batch.manifest import references
from vcf_batch.output import commits, run_file
from vcf_batch.setup.absolute_paths import absolute_output

ManifestLike: TypeAlias = Any
"""What is taken as a manifest: a path or URL, or a table with ``__arrow_c_stream__`` (pandas, pyarrow, polars)."""

TABLES = "__manifest__"
"""Folder of an output that holds the tables its run was called with. ``datasets`` looks into ``_manifest``."""

_ROWS_PER_GROUP = 10_000
_NAME_LENGTH = 16


@with_settings_of(RunConfig)
def run(manifest: ManifestLike, output: str | os.PathLike[str] | None = None, **settings: Any) -> Summary:
    """Generate an image for every row of a manifest into an output, on a Ray cluster.

    The same call again resumes: finished shards are kept. It is ``vcf-batch generate``, and the two resume each other.

    A table is written to the folder ``__manifest__`` of the output, under a name that its contents give, so the same
    rows are the same run, and other rows are another run, which the output refuses. Its relative references start at
    the working directory and may lie there; they become absolute paths. The index of a pandas.DataFrame is left out
    unless it has a name.

    Args:
        manifest: path or URL of a manifest, or a table with its columns: a pandas.DataFrame, a pyarrow.Table, or
            any other with ``__arrow_c_stream__``. A :class:`RunConfig` stands for all arguments.
        output: folder or URL of the output.
        settings: fields of :class:`RunConfig`, such as ``model``, ``steps`` or ``num_workers``.

    Returns:
        The counts of the whole run. Rows that failed raise nothing: see :attr:`Summary.counts`.

    Raises:
        UsageError: a setting, the manifest or a model is wrong, or the nodes do not share the output.
        RefusedError: the output holds another run, or another driver is at work there.
        StorageError: the storage failed, again and again; shards that do not need it are finished.
        VcfBatchError: some shards, or the start of workers, failed again and again; the other shards are finished.
        Interrupted: Ctrl-C or SIGTERM. The same call resumes.
    """
    return pool.run(configured(manifest, output, settings))


def configured(manifest: ManifestLike, output: str | os.PathLike[str] | None, settings: dict[str, Any]) -> RunConfig:
    """The configuration of a call of :func:`run`. A table is written.

    Raises:
        UsageError, RefusedError, StorageError: see :func:`run`.
    """
    if isinstance(manifest, RunConfig):
        if output is not None or settings:
            given = "output" if output is not None else next(iter(settings))
            raise UsageError(f"{given} is given beside a RunConfig, which has it: use RunConfig.replace({given}=...)")
        return manifest
    values = {**settings, "output": "" if output is None else os.fspath(output)}
    if isinstance(manifest, str | os.PathLike):
        return RunConfig.from_mapping({**values, "manifest": os.fspath(manifest)})
    table = _table(manifest)
    # The settings are checked before anything is written.
    config = RunConfig.from_mapping({**values, "manifest": TABLES})
    return _written(table, config)


def _table(given: Any) -> pa.Table:
    """A table of any library as one of pyarrow, without its library's own metadata.

    Raises:
        ManifestError: it is no table, has no rows, or has values that Arrow has no type for.
    """
    pandas = sys.modules.get("pandas")
    try:
        if pandas is not None and isinstance(given, pandas.DataFrame):
            named = [name for name in given.index.names if name is not None]
            frame = given.reset_index(level=named) if named else given
            table = pa.Table.from_pandas(frame, preserve_index=False)
        elif hasattr(given, "__arrow_c_stream__"):
            table = pa.table(given)
        else:
            raise ManifestError(
                f"the manifest is a {type(given).__name__}; give a path, a URL, or a table such as a pandas.DataFrame"
            )
        # Libraries, and their versions, choose among types of text that mean the same. Metadata is left out.
        table = table.cast(pa.schema([pa.field(field.name, _plain(field.type)) for field in table.schema]))
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(
            f"the table cannot be written as a manifest: {' '.join(map(str, error.args))}. A column has values of one "
            "type; references are paths, URLs, or dictionaries of bytes and path"
        ) from error
    if not table.num_rows:
        raise ManifestError("the table has no rows; there is nothing to generate")
    return table


def _plain(kind: pa.DataType) -> pa.DataType:
    """The simplest type with the same values."""
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_plain(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _plain(field.type)) for field in kind])
    return kind


def _written(table: pa.Table, config: RunConfig) -> RunConfig:
    """Write a table into the output, unless its run has it already; the configuration with its place."""
    output = absolute_output(config.output)
    folder = os.getcwd()
    found_relative = False

    def absolute(value: Any) -> Any:
        nonlocal found_relative
        if isinstance(value, list):
            return [absolute(item) for item in value]
        if isinstance(value, dict):
            return value if value.get("bytes") is not None else {**value, "path": absolute(value.get("path"))}
        if not isinstance(value, str) or not value or value[:5].lower() == "data:" or not references.is_relative(value):
            return value
        found_relative = True
        return os.path.join(folder, value)

    for name in (config.reference_column or "reference", "reference_masks", "negative_reference"):
        if name in table.column_names:
            place, column = table.column_names.index(name), table[name]
            values = pa.array([absolute(value) for value in column.to_pylist()], column.type)
            table = table.set_column(place, table.schema.field(place), values)
    if found_relative:
        config = config.replace(reference_root=(*config.reference_root, folder))
    return config.replace(manifest=_published(table, output), output=output)


def _published(table: pa.Table, output: str) -> str:
    """Place of a table in an output, where it is written unless it is there.

    Its name is taken from its bytes, so no other table is ever replaced. Another version of pyarrow may write other
    bytes; the table of the run that is there is then compared by its contents.

    Raises:
        RefusedError: the output holds a run of another manifest that has begun.
        StorageError: the storage failed.
    """
    folder = storage.join(output, TABLES)
    data = _parquet(table)
    url = storage.join(folder, f"{hashlib.sha256(data).hexdigest()[:_NAME_LENGTH]}.parquet")
    record = run_file.read(output)
    if record is not None and commits.any_committed(output) and record.manifest.url != redact_name(url):
        there = storage.join(folder, storage.name(record.manifest.url))
        if record.manifest.url != redact_name(there) or _parquet(_read(there)) != data:
            raise RefusedError(
                f"{output} holds a run of another manifest, {record.manifest.url}: use another output, or rerun with "
                "the rows that are there"
            )
        return there
    with contextlib.suppress(FileExistsError):  # it has these bytes, by its name
        storage.publish_bytes(url, data, create=True)
    return url


def _read(url: str) -> pa.Table:
    """The table of a run that is there.

    Raises:
        RefusedError: it is gone or damaged.
        StorageError: the storage failed.
    """
    try:
        with storage.refusals_as_storage_errors():
            return pq.read_table(io.BytesIO(storage.read_bytes(url)))
    except (FileNotFoundError, pa.ArrowException) as error:
        raise RefusedError(f"{url}, the table of the run that is there, cannot be read: {error}") from error


def _parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=_ROWS_PER_GROUP, compression="zstd")
    return file.getvalue()
