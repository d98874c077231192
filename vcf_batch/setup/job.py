"""A run as every process sees it: its configuration, manifest and models, and what follows from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from vcf_batch.config.fingerprint import fingerprint
from vcf_batch.config.limits import FUSIONS, ROLES
from vcf_batch.config.run_config import RunConfig
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.output import sample_records
from vcf_batch.output_columns import Extra
from vcf_batch.records import RowMask
from vcf_batch.setup.run_models import Models
from vcf_batch.sharding import ShardPlan

TRACE = "profile/trace.json"
"""Place in an output of the trace that ``--profile`` writes."""


@dataclass(frozen=True)
class Job:
    """A run, with all that a worker needs to know of it. Small, and picklable."""

    config: RunConfig
    """The settled configuration, with absolute paths."""
    manifest: Manifest
    models: Models
    fields: dict[str, Any]
    """The settings and identities that the fingerprint covers."""
    roots: tuple[str, ...] = ()
    """Places of references that the driver sees, besides the manifest's own folder."""
    token: str = ""
    """The token of the driver's lease, which every node has to see."""
    extends: tuple[str, ...] = ()
    """Fingerprints of the run before rows were appended to its manifest. Receipts with them are the run's own."""
    redo: Mapping[int, RowMask] = field(default_factory=dict)
    """Redo rows of each shard that is generated again though it may exist, by the index of the shard."""
    profiled: int | None = None
    """Index of the shard whose first batches are recorded for ``--profile``."""

    @property
    def fingerprint(self) -> str:
        """The name of the run: a hash of :attr:`fields`."""
        return fingerprint(self.fields)

    @property
    def guided(self) -> bool:
        """Whether a row may have prompt-noise optimisation: see :func:`is_guided`."""
        return is_guided(self.config, self.manifest)

    @property
    def shards(self) -> ShardPlan:
        """Every shard of the run, in order."""
        assert self.config.shard_size is not None
        return ShardPlan(self.manifest.num_rows, self.config.shard_size, self.manifest.first_row)


def fusions_of(config: RunConfig, manifest: Manifest) -> set[str]:
    """The fusions that rows of a run ask for, those without references included.

    Raises:
        ManifestError, StorageError: the manifest cannot be read.
    """
    return {own or config.fusion for own in manifest.values("fusion", (*FUSIONS, None))}


def roles_of(config: RunConfig, manifest: Manifest) -> set[str]:
    """The roles that rows of a run may ask for.

    Raises:
        ManifestError, StorageError: the manifest cannot be read.
    """
    return {config.role, *(own for own in manifest.values("reference_roles", ROLES) if own)}


def is_limited(config: RunConfig, manifest: Manifest) -> bool:
    """Whether roles or masks may limit the references of a run."""
    return config.role != "all" or manifest.has_limits


def has_loras(config: RunConfig, manifest: Manifest) -> bool:
    """Whether rows of a run may have LoRAs."""
    return bool(config.lora) or manifest.has_loras


def schema_of(config: RunConfig, manifest: Manifest) -> pa.Schema:
    """The schema of the parquets that a run writes."""
    has: dict[Extra, bool] = {
        "limits": is_limited(config, manifest),
        "lora": has_loras(config, manifest),
        "texture": config.texture,
    }
    extras = [extra for extra, there in has.items() if there]
    return sample_records.schema(manifest.carried_schema, manifest.reference_is_list, extras)


def is_guided(config: RunConfig, manifest: Manifest) -> bool:
    """Whether a row may be brought closer to its reference by prompt-noise optimisation."""
    return (config.pno_steps > 0 or manifest.has_any("pno_steps")) and manifest.has_any("reference")
