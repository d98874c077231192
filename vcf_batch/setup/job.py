"""A run as every process sees it: its configuration, manifest and models, and what follows from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vcf_batch.config import RunConfig, fingerprint
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.records import RowMask
from vcf_batch.setup.run_models import Models
from vcf_batch.sharding import ShardPlan

TRACE = "profile/trace.json"
"""Where ``--profile`` leaves its trace in an output."""


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know of a run. Small, and picklable."""

    config: RunConfig
    """The configuration, settled, with absolute paths."""
    manifest: Manifest
    models: Models
    fields: dict[str, Any]
    """What the fingerprint covers."""
    roots: tuple[str, ...] = ()
    """Places of references that the driver sees, besides the manifest's own folder."""
    token: str = ""
    """The token of the driver's lease, which every node has to see."""
    extends: tuple[str, ...] = ()
    """Fingerprints of the run before rows were appended to its manifest. Receipts that have them are its own."""
    redo: Mapping[int, RowMask] = field(default_factory=dict)
    """Shards that are generated anew, in whole or in part, though they may exist; by index."""
    profiled: int | None = None
    """Index of the shard whose first batches are recorded for ``--profile``."""

    @property
    def fingerprint(self) -> str:
        """The name of the run: a hash of :attr:`fields`."""
        return fingerprint(self.fields)

    @property
    def guided(self) -> bool:
        """See :func:`is_guided`."""
        return is_guided(self.config, self.manifest)

    @property
    def shards(self) -> ShardPlan:
        """Every shard of the run, in order."""
        assert self.config.shard_size is not None
        return ShardPlan(self.manifest.num_rows, self.config.shard_size)


def is_guided(config: RunConfig, manifest: Manifest) -> bool:
    """Whether a row may be brought closer to its reference by prompt-noise optimisation."""
    return (config.pno_steps > 0 or manifest.has_any("pno_steps")) and manifest.has_any("reference")


def environment(config: RunConfig) -> dict[str, str]:
    """Environment of a worker: fixed threads, and cuBLAS workspaces that keep its sums in order."""
    return {
        "OMP_NUM_THREADS": str(config.cpus_per_worker),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TOKENIZERS_PARALLELISM": "false",
    }
