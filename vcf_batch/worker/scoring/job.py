"""What driver and worker of a scoring share. No torch, as the driver needs none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vcf_batch.config.run_config import RunConfig
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.output.output import Output
from vcf_batch.output.scores.definition import ScoreDefinition
from vcf_batch.output.scores.receipt import ScoreReceipt
from vcf_batch.records import RowMask
from vcf_batch.worker.scoring.resolved_score import ResolvedScore


@dataclass(frozen=True)
class ScoredShard:
    """The scores of a shard by one name, to be committed."""

    definition: ScoreDefinition
    """With its columns."""
    parquet: bytes
    receipt: ScoreReceipt


@dataclass(frozen=True)
class ScoreJob:
    """The scores that are added to an output. Small, and picklable."""

    output: Output
    config: RunConfig
    """The settings of workers: GPUs, CPUs, and where Ray is."""
    scores: tuple[ResolvedScore, ...]
    token: str = ""
    """The token of the driver's lease, which every node has to see."""
    roots: tuple[str, ...] = ()
    """Places of references that the driver sees, besides the manifest's own folder."""
    redo: Mapping[int, RowMask] = field(default_factory=dict)
    """Always empty: rows are scored together."""
    profiled: int | None = None

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of the output; None if no score needs references."""
        return self.output.manifest if needs(self.scores, "reference") else None


def needs(scores: Sequence[ResolvedScore], against: str) -> bool:
    """Whether a score compares pictures with ``prompt``, ``reference`` or ``twin``."""
    return any(column.against == against for score in scores for column in score.definition.columns)
