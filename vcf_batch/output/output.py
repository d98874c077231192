"""An output, opened: the record of its run, the settings to read it with, and its manifest."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from vcf_batch import storage
from vcf_batch.config import RunConfig
from vcf_batch.errors import DamageFound, RefusedError, UsageError, VcfBatchError
from vcf_batch.manifest import appended
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.output import receipts, run_file
from vcf_batch.output.receipts import Damaged, Receipt
from vcf_batch.output.run_file import AnotherVersion, RunRecord
from vcf_batch.sharding import ShardPlan


@dataclass(frozen=True)
class Output:
    """An output that a run has written, finished or not."""

    url: str
    record: RunRecord
    config: RunConfig
    """Configuration of the record, with the changes that were asked for."""
    plan: ShardPlan
    manifest: Manifest | None
    """The manifest of the run; None if it was not asked for, cannot be read any more, or has changed."""
    manifest_error: VcfBatchError | None = None
    """Reason why the manifest cannot be used; else None."""

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
            if isinstance(found, Receipt) and found.fingerprint not in self.fingerprints:
                found = receipts.of_another_run(found)
            yield found

    def need_manifest(self) -> Manifest:
        """The manifest of the run.

        Raises:
            VcfBatchError: the manifest cannot be read any more, or has changed.
        """
        if self.manifest is None:
            assert self.manifest_error
            raise self.manifest_error
        return self.manifest

    @classmethod
    def open(cls, url: str, changes: Mapping[str, Any] = MappingProxyType({}), with_manifest: bool = True) -> "Output":
        """Read ``run.json`` and open the manifest that it names.

        Args:
            url: folder or URL that a run has written.
            changes: settings that have changed, such as the place of a manifest that has moved.
            with_manifest: whether the manifest is opened.

        Raises:
            UsageError: there is no output.
            AnotherVersion: another version of vcf-batch wrote it.
            DamageFound: ``run.json`` is missing or damaged, so that the run of the shards is unknown.
            StorageError: the storage failed.
        """
        url = storage.absolute(url)
        try:
            record = run_file.read(url)
        except AnotherVersion:
            raise
        except RefusedError as error:
            raise DamageFound(f"{run_file.RUN_FILE_NAME}: {error}") from error
        if record is None:
            with storage.refusals_as_storage_errors():
                if not storage.list_files(url):
                    raise UsageError(f"{url} holds no run; check the path")
            raise DamageFound(f"{run_file.RUN_FILE_NAME}: it is missing, so nothing tells what {url} holds")
        try:
            config = record.run_config(url, changes)
            plan = ShardPlan(record.manifest.rows, cast(int, config.shard_size))
        except (TypeError, ValueError) as error:
            raise DamageFound(f"{run_file.RUN_FILE_NAME}: it is damaged: {error}") from error
        opened, trouble = _open_manifest(config, record) if with_manifest else (None, None)
        if opened and opened.num_rows != plan.num_rows:
            raise DamageFound(
                f"{run_file.RUN_FILE_NAME}: it says {plan.num_rows} rows; the manifest has {opened.num_rows}"
            )
        return cls(url, record, config, plan, opened, trouble)


def _open_manifest(config: RunConfig, record: RunRecord) -> tuple[Manifest | None, VcfBatchError | None]:
    """Open the manifest of a run; None and the reason if it cannot be read, or is not the one of the record."""
    try:
        manifest = Manifest.open(config.manifest, config.limit, known=record.versions_of(config.manifest, config.limit))
    except VcfBatchError as error:
        return None, error
    if manifest.identity != record.fields["manifest_id"]:
        what = appended.difference(record.manifest.files, manifest)
        return None, RefusedError(f"{config.manifest} has changed since the run: {what}")
    return manifest, None
