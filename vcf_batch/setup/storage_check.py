"""The check that a node sees the storage of a run."""

import socket
from typing import Protocol

from vcf_batch import storage
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import StorageError, UsageError
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.output import lease


def is_seen(root: str) -> bool:
    """Whether the driver sees a place of references. False also for a web address, or after an error."""
    if root.startswith(("http://", "https://")):
        return False
    try:
        return storage.exists(root)
    except (PermissionError, StorageError):
        return False


class Places(Protocol):
    """What every node has to see, such as that of a :class:`vcf_batch.setup.job.Job`."""

    @property
    def config(self) -> RunConfig:
        """Settings, of which the output counts."""

    @property
    def token(self) -> str:
        """The token of the driver's lease in the output."""

    @property
    def manifest(self) -> Manifest | None:
        """The manifest; None if nothing of it is read."""

    @property
    def roots(self) -> tuple[str, ...]:
        """Places of references."""


def check_storage(job: Places) -> None:
    """Prove that this node sees the run's storage: the driver's lease in the output, the manifest, the reference roots.

    Args:
        job: the run, or what else is computed of its output, with the token of the driver's lease.

    Raises:
        UsageError: this node does not see one of them.
        StorageError: the storage failed, or refuses this node.
    """
    node, output = socket.gethostname(), job.config.output
    roots = [("--reference-root", root) for root in job.roots]
    manifest = [("manifest", job.manifest.url)] if job.manifest else []
    for what, place in [("output", output), *manifest, *roots]:
        try:
            seen = lease.is_seen(output, job.token) if what == "output" else storage.exists(place)
        except PermissionError as error:
            raise StorageError(f"node {node} may not look at the {what}: {error}") from error
        if not seen:
            raise UsageError(
                f"node {node} does not see the {what} {place}; "
                "it must be on storage that every node shares, such as s3://bucket/folder"
            )
