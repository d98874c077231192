"""Check of rows appended to the manifest of a started run: its existing shards must stay the same."""

from collections.abc import Mapping
from typing import Any

from vcf_batch.config.fingerprint import field_of
from vcf_batch.config.run_config import part_of
from vcf_batch.manifest.manifest import FileVersion, Manifest
from vcf_batch.sharding import ShardPlan


def obstacle(
    fields: Mapping[str, Any], manifest: Manifest, files: Mapping[str, FileVersion], limit: int | None
) -> str | None:
    """The reason why a run cannot continue with its manifest as it is now; None if it can.

    A run can continue if rows are only appended, and if the shards of its rows stay the same. Its limit may differ if
    the run used all rows that there were.

    Args:
        fields: the values that the run's fingerprint covers.
        manifest: the manifest as it is now.
        files: the files of the run's manifest, by name.
        limit: the limit now.

    Raises:
        ManifestError, StorageError: the manifest cannot be read.
    """
    before = Manifest.open(
        manifest.url,
        fields["limit"],
        until=fields["manifest_id"],
        known=manifest.versions,
        mapped=manifest.mapped,
        carry=manifest.carry,
        part=None if (rows := field_of(fields, "rows")) is None else part_of(rows),
    )
    if fields["limit"] != limit and not before.is_whole:
        return "The run that is there used only the first rows of its manifest, so it keeps its limit."
    if manifest.num_rows < before.num_rows:
        return f"The run that is there has {before.num_rows} rows, and this one {manifest.num_rows}."
    if before.identity != fields["manifest_id"]:
        return (
            "The existing files have changed, or a new file comes before one of them: "
            f"{difference(files, manifest)}. Append rows as further files in the manifest's folder, with names that "
            "come after the existing ones."
        )
    if (before.carried_schema, before.reference_is_list) != (manifest.carried_schema, manifest.reference_is_list):
        return (
            "The appended files would change the types of the output's columns. Write them with the same columns and "
            "types as the existing files."
        )
    size = fields["shard_size"]
    last = ShardPlan(before.num_rows, size, before.first_row)[-1]
    plan = ShardPlan(manifest.num_rows, size, manifest.first_row)
    if plan[last.index] != last:
        return (
            f"Appended rows would change the last shard, {last.name} with {len(last)} rows. Rows can be appended only "
            f"if that shard is full ({size} rows) and the names of shards need no further digit."
        )
    return None


def difference(files: Mapping[str, FileVersion], manifest: Manifest) -> str:
    """The first file in which a manifest differs from what it was, in words.

    Args:
        files: the files of the manifest before, by name.
        manifest: the manifest as it is now.
    """
    now = manifest.versions
    for name in sorted(files.keys() | now.keys()):
        if name not in now:
            return f"{name} is gone"
        if name not in files:
            return f"{name} is new"
        was, here = files[name], now[name]
        if was.size != here.size:
            return f"{name} has changed: it had {was.size} bytes, and has {here.size} now"
        if was.sha256 != here.sha256:
            return f"{name} has changed: its contents had the hash {was.sha256[:12]}, and have {here.sha256[:12]} now"
    return "a file has another name"
