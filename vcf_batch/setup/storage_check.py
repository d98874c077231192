"""The check that a node sees the storage of a run."""

import socket

from vcf_batch import storage
from vcf_batch.errors import StorageError, UsageError
from vcf_batch.output import lease
from vcf_batch.setup.job import Job


def is_seen(root: str) -> bool:
    """Whether the driver sees a place of references. False also for a web address, or after an error."""
    if root.startswith(("http://", "https://")):
        return False
    try:
        return storage.exists(root)
    except (PermissionError, StorageError):
        return False


def check_storage(job: Job) -> None:
    """Prove that this node sees the run's storage: the driver's lease in the output, the manifest, the reference roots.

    Args:
        job: the run, with the token of the driver's lease.

    Raises:
        UsageError: this node does not see one of them.
        StorageError: the storage failed, or refuses this node.
    """
    node, output = socket.gethostname(), job.config.output
    roots = [("--reference-root", root) for root in job.roots]
    for what, place in [("output", output), ("manifest", job.manifest.url), *roots]:
        try:
            seen = lease.is_seen(output, job.token) if what == "output" else storage.exists(place)
        except PermissionError as error:
            raise StorageError(f"node {node} may not look at the {what}: {error}") from error
        if not seen:
            raise UsageError(
                f"node {node} does not see the {what} {place}; "
                "it must be on storage that every node shares, such as s3://bucket/folder"
            )
