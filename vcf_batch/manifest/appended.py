"""Rows appended to the manifest of a run that has begun: fine where every shard that is there stays as it is."""

from collections.abc import Mapping
from typing import Any

from vcf_batch.manifest.manifest import Manifest
from vcf_batch.sharding import ShardPlan


def obstacle(fields: Mapping[str, Any], manifest: Manifest) -> str | None:
    """Why a manifest is not one that goes on after the rows of a run, and leaves its shards alone.

    Args:
        fields: what the fingerprint of the run covers.
        manifest: as it is now.

    Returns:
        The reason; None if there is none.

    Raises:
        ManifestError, StorageError: the manifest cannot be read.
    """
    before = Manifest.open(manifest.url, fields["limit"], until=fields["manifest_id"])
    if before.identity != fields["manifest_id"]:
        return (
            "Rows can be appended as further files in the manifest's folder, named so that they come after those that "
            "are there; these have changed, or other files come between them."
        )
    if (before.carried_schema, before.reference_is_list) != (manifest.carried_schema, manifest.reference_is_list):
        return "The appended files would change the types of the output's columns."
    size = fields["shard_size"]
    last, plan = ShardPlan(before.num_rows, size)[-1], ShardPlan(manifest.num_rows, size)
    if plan[last.index] != last:
        return (
            f"Appended rows would change the last shard, {last.name} with {len(last)} rows: rows can be appended while "
            f"it is full ({size} rows), and as long as the names of shards need no further digit."
        )
    return None
