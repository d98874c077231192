"""An output, opened: the record of its run, the settings to read it with, and its manifest."""

import functools
import os
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, cast

from vcf_batch import storage
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import DamageFound, RefusedError, UsageError, VcfBatchError
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.output import appended, lease, receipts, run_file
from vcf_batch.output.receipts import Damaged, Receipt
from vcf_batch.output.run_file import AnotherVersion, RunRecord
from vcf_batch.records import Row, Shard
from vcf_batch.sharding import ShardPlan

EXPORT_NAME = "export.json"
"""Name of the file that says what an export is made of. An output has none."""


class AnExport(UsageError):
    """What is there is no output: it was made of outputs by ``vcf-batch export``."""


class ManifestLost(VcfBatchError):
    """The manifest of an output was lost, or has changed, while its rows were read."""


class Output:
    """An output that a run has written, finished or not. The manifest is opened when it is asked for.

    Args:
        url: folder or URL that a run has written.
        changes: settings that have changed, such as the place of a manifest that has moved.

    Raises:
        AnExport: an export is there.
        UsageError: there is no output.
        AnotherVersion: another version of vcf-batch wrote it.
        DamageFound: ``run.json`` is missing or damaged, so that the run of the shards is unknown.
        StorageError: the storage failed.
    """

    def __init__(self, url: str | os.PathLike[str], changes: Mapping[str, Any] = MappingProxyType({})) -> None:
        if not isinstance(url, str | os.PathLike):
            raise UsageError(f"the output is {url!r}, a {type(url).__name__}; give a folder or URL")
        self.url = storage.absolute(os.fspath(url))
        """The output, as an absolute path or a URL."""
        self.record = _record(self.url)
        try:
            self.config = self.record.run_config(self.url, changes)
            """Configuration of the record, with the changes that were asked for."""
            part = self.config.part
            self.plan = ShardPlan(
                self.record.manifest.rows, cast(int, self.config.shard_size), part.start if part else 0
            )
        except (TypeError, ValueError) as error:
            raise DamageFound(f"{run_file.RUN_FILE_NAME}: it is damaged: {error}") from error

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of the run; None if it cannot be read any more, or has changed.

        Raises:
            DamageFound: ``run.json`` has another number of rows.
        """
        return self._opened[0]

    @property
    def manifest_error(self) -> VcfBatchError | None:
        """Reason why the manifest cannot be used; else None."""
        return self._opened[1]

    def manifest_rows(self, start: int, stop: int) -> Iterator[Row]:
        """Rows ``start`` to ``stop`` (excluded) of the manifest, which must be there.

        Raises:
            ManifestLost: the manifest cannot be read any more, or has changed meanwhile. From then on,
                :attr:`manifest` is None.
        """
        try:
            yield from self.need_manifest().iter_rows(start, stop, self.config.seed)
        except VcfBatchError as error:
            self._opened = None, error
            raise ManifestLost(str(error)) from error

    @functools.cached_property
    def _opened(self) -> tuple[Manifest | None, VcfBatchError | None]:
        opened, trouble = _open_manifest(self.config, self.record)
        if opened and opened.num_rows != self.plan.num_rows:
            raise DamageFound(
                f"{run_file.RUN_FILE_NAME}: it says {self.plan.num_rows} rows; the manifest has {opened.num_rows}"
            )
        return opened, trouble

    def tars(self) -> list[str]:
        """URLs of the tars that are committed, in order, for a reader such as ``webdataset.WebDataset``.

        A tar without a receipt of this run is left out, and so is one of another size than its receipt says. A shard
        without a successful sample has none. Contents are not read: ``vcf-batch verify`` does that.

        Raises:
            StorageError: the storage failed.
        """
        return [
            storage.join(self.url, found.shard.name + receipts.FILE_SUFFIXES["tar"])
            for found in self.examine()
            if isinstance(found, Receipt) and found.counts["success"]
        ]

    @property
    def fingerprints(self) -> frozenset[str]:
        """Fingerprints that the receipts of the output may have."""
        return self.record.fingerprints

    def examine(self) -> Iterator[Receipt | Damaged]:
        """Yield the receipts of the run's shards, in order, and in their place the shards that are damaged.

        Shards of which nothing is yielded are not generated yet.

        Raises:
            StorageError: the storage failed.
        """
        with storage.refusals_as_storage_errors():
            sizes = storage.list_files(self.url)
        for found in receipts.examine(self.url, sizes):
            name = found.name if isinstance(found, Damaged) else found.shard.name
            if int(name) >= len(self.plan):
                continue  # a shard of no run that this is; verify reports it
            foreign = receipts.foreign(found, self.fingerprints, self.plan) if isinstance(found, Receipt) else None
            yield foreign or found

    def each_shard(self) -> Iterator[tuple[Shard, Receipt | Damaged | None]]:
        """Yield every shard of the run, in order, with its receipt, or what is wrong with it, or None.

        None stands for a shard that is not generated yet.

        Raises:
            StorageError: the storage failed.
        """
        behind = 0
        for found in self.examine():
            index = int(found.name) if isinstance(found, Damaged) else found.shard.index
            yield from ((self.plan[at], None) for at in range(behind, index))
            yield self.plan[index], found
            behind = index + 1
        yield from ((self.plan[at], None) for at in range(behind, len(self.plan)))

    def need_manifest(self) -> Manifest:
        """The manifest of the run.

        Raises:
            VcfBatchError: the manifest cannot be read any more, or has changed.
        """
        if self.manifest is None:
            assert self.manifest_error
            raise self.manifest_error
        return self.manifest


def _record(url: str) -> RunRecord:
    """The record of the run in an output. For errors see :class:`Output`."""
    if (record := _record_there(url)) is not None:
        return record
    with storage.refusals_as_storage_errors():
        there = storage.list_files(url)
    # A run takes its lease before it writes its record, which is empty for a moment where there are no hard links.
    if run_file.RUN_FILE_NAME in there and (record := _record_there(url)) is not None:
        return record
    if EXPORT_NAME in there:
        raise AnExport(
            f"{url} is an export, a dataset that was made of outputs: 'vcf-batch verify' takes it, and any program "
            "copies it; other commands take the outputs that it was made of"
        )
    if not there:
        raise UsageError(f"{url} holds no run; check the path")
    if there.keys() <= {lease.LEASE_NAME, lease.HEARTBEAT, run_file.RUN_FILE_NAME}:
        raise UsageError(f"{url} holds no run yet: one begins there, or was killed when it began; look again later")
    raise DamageFound(f"{run_file.RUN_FILE_NAME}: it is missing, so nothing tells what {url} holds")


def _record_there(url: str) -> RunRecord | None:
    try:
        return run_file.read(url)
    except AnotherVersion:
        raise
    except RefusedError as error:
        raise DamageFound(f"{run_file.RUN_FILE_NAME}: {error}") from error


def _open_manifest(config: RunConfig, record: RunRecord) -> tuple[Manifest | None, VcfBatchError | None]:
    """Open the manifest of a run; None and the reason if it cannot be read, or is not the one of the record."""
    try:
        manifest = run_file.open_manifest(config, record)
    except VcfBatchError as error:
        return None, error
    if manifest.identity != record.fields["manifest_id"]:
        what = appended.difference(record.manifest.files, manifest)
        return None, RefusedError(f"{config.manifest} has changed since the run: {what}")
    return manifest, None
