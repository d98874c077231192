"""Check of rows appended to the manifest of a started run: its existing shards must stay the same."""

from collections.abc import Mapping
from typing import Any

from vcf_batch.manifest.manifest import Manifest
from vcf_batch.sharding import ShardPlan


def obstacle(fields: Mapping[str, Any], manifest: Manifest) -> str | None:
    """The reason why a run cannot continue with its manifest as it is now; None if it can.

    A run can continue if rows are only appended, and if the shards of its rows stay the same.

    Args:
        fields: the values that the run's fingerprint covers.
        manifest: the manifest as it is now.

    Raises:
        ManifestError, StorageError: the manifest cannot be read.
    """
    before = Manifest.open(manifest.url, fields["limit"], until=fields["manifest_id"])
    if before.identity != fields["manifest_id"]:
        return (
            "The existing files have changed, or a new file comes before one of them. Append rows as further files in "
            "the manifest's folder, with names that come after the existing ones."
        )
    if (before.carried_schema, before.reference_is_list) != (manifest.carried_schema, manifest.reference_is_list):
        return (
            "The appended files would change the types of the output's columns. Write them with the same columns and "
            "types as the existing files."
        )
    size = fields["shard_size"]
    last, plan = ShardPlan(before.num_rows, size)[-1], ShardPlan(manifest.num_rows, size)
    if plan[last.index] != last:
        return (
            f"Appended rows would change the last shard, {last.name} with {len(last)} rows. Rows can be appended only "
            f"if that shard is full ({size} rows) and the names of shards need no further digit."
        )
    return None
