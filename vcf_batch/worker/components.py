"""What a worker generates with."""

import threading
from dataclasses import dataclass, field

from vcf_batch.config import RunConfig
from vcf_batch.manifest.references import ReferenceReader
from vcf_batch.metrics.scorer import Scorer
from vcf_batch.vcf.guide import Guide
from vcf_batch.vcf.pipeline import VCFPipeline
from vcf_batch.vcf.safety import SafetyChecker
from vcf_batch.worker.device import Device


@dataclass(frozen=True)
class Components:
    """What a shard is generated with, from one shard to the next."""

    config: RunConfig
    """With every default resolved."""
    pipeline: VCFPipeline
    scorer: Scorer
    references: ReferenceReader
    model: str
    """Identity of the model, as images name it."""
    device: Device
    """Of pipeline and scorer."""
    guide: Guide | None = None
    """Of prompt-noise optimisation; None where no row asks for it."""
    safety: SafetyChecker | None = None
    """None without one."""
    sampling: threading.Lock = field(default_factory=threading.Lock)
    """Held by the shard that is sampled."""
