"""The components of a worker: its models, and the reader of its references."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from vcf_batch.config.run_config import RunConfig
from vcf_batch.manifest.references import ReferenceReader
from vcf_batch.metrics.scorer import Scorer
from vcf_batch.vcf.guide import Guide
from vcf_batch.vcf.pipeline import VCFPipeline
from vcf_batch.vcf.safety import SafetyChecker
from vcf_batch.worker.device import Device
from vcf_batch.worker.lora.shelf import LoraShelf

ENCODERS = 4
"""Most threads that encode images. At 768 pixels one takes an eighth of a second for a PNG."""


@dataclass(frozen=True)
class Components:
    """Models, settings and tools that a worker generates every shard with."""

    config: RunConfig
    """Configuration of the run, with every default resolved."""
    pipeline: VCFPipeline
    scorer: Scorer
    references: ReferenceReader
    model: str
    """Identity of the model, which marked images name."""
    device: Device
    """Device that pipeline and scorer compute on."""
    guide: Guide | None = None
    """The CLIP that prompt-noise optimisation follows; None where no row asks for it."""
    safety: SafetyChecker | None = None
    """The checker that flags images; None in a run without one."""
    loras: LoraShelf | None = None
    """The LoRAs that the worker holds, and the switch between them; None in a run without any."""
    sampling: threading.Lock = field(default_factory=threading.Lock)
    """The lock that a shard holds while it is sampled."""
    encoders: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(min(ENCODERS, len(os.sched_getaffinity(0))), "encode")
    )
    """Threads that convert and encode the images of a batch. Encoding holds no lock of Python."""
