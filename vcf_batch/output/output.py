"""An output as its ``run.json`` describes it: what its run was asked to do, and what has to be there."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from vcf_batch import storage
from vcf_batch.config import RunConfig
from vcf_batch.errors import DamageFound, RefusedError, UsageError, VcfBatchError
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.output import run_file
from vcf_batch.sharding import ShardPlan


@dataclass(frozen=True)
class Output:
    """An output, what its run was asked to do, and the manifest if it is still there."""

    url: str
    record: Mapping[str, Any]
    """``run.json``."""
    fingerprints: frozenset[str]
    """Those that receipts may have: the run's, and of what it was before rows were appended to its manifest."""
    config: RunConfig
    plan: ShardPlan
    manifest: Manifest | None
    """None if it cannot be read any more, or has changed."""
    manifest_error: VcfBatchError | None = None
    """Why there is none."""

    def need_manifest(self) -> Manifest:
        """The manifest.

        Raises:
            VcfBatchError: there is none.
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
            changes: settings that are not what they were, such as the place of a manifest that has moved.
            with_manifest: False leaves the manifest alone.

        Raises:
            UsageError: there is nothing at all.
            RefusedError: another version of vcf-batch wrote it.
            DamageFound: ``run.json`` is missing or damaged, so that nothing tells what the shards belong to.
            StorageError: the storage failed.
        """
        url = storage.absolute(url)
        try:
            record = run_file.read(url)
        except run_file.AnotherLayout:
            raise
        except RefusedError as error:
            raise DamageFound(f"{run_file.NAME}: {error}") from error
        if record is None:
            with storage.refusals_as_storage_errors():
                if not storage.list_files(url):
                    raise UsageError(f"{url} holds no run; check the path")
            raise DamageFound(f"{run_file.NAME}: it is missing, so nothing tells what {url} holds")
        try:
            recorded, fields = record["config"], record["fields"]
            # What the fingerprint covers is taken from there: the configuration was published without credentials.
            content = {name: fields[name] for name in recorded.keys() & fields.keys() - {"lpips"}}
            config = RunConfig.from_mapping({**recorded, **content, **changes, "output": url})
            plan = ShardPlan(record["manifest"]["rows"], cast(int, config.shard_size))
            fingerprints = frozenset([record["fingerprint"], *record.get("extends", ())])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamageFound(f"{run_file.NAME}: it is damaged: {error}") from error
        opened, trouble = _open_manifest(config, fields["manifest_id"]) if with_manifest else (None, None)
        if opened and opened.num_rows != plan.num_rows:
            raise DamageFound(f"{run_file.NAME}: it says {plan.num_rows} rows; the manifest has {opened.num_rows}")
        return cls(url, record, fingerprints, config, plan, opened, trouble)


def _open_manifest(config: RunConfig, identity: str) -> tuple[Manifest | None, VcfBatchError | None]:
    """The manifest of a run, or why it is not there."""
    try:
        manifest = Manifest.open(config.manifest, config.limit)
    except VcfBatchError as error:
        return None, error
    if manifest.identity != identity:
        return None, RefusedError(f"{config.manifest} has changed since the run")
    return manifest, None
