"""vcf-batch: a Parquet manifest of prompts and reference images in, a WebDataset of scored images out, on Ray.

The public names load their modules when they are first used: importing the package is cheap (no torch, no ray).
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "ImageAligner": "vcf_batch.vcf.aligner",
    "Manifest": "vcf_batch.manifest.manifest",
    "Output": "vcf_batch.output.output",
    "RunConfig": "vcf_batch.config",
    "Summary": "vcf_batch.driver.ledger",
    "VCFPipeline": "vcf_batch.vcf.pipeline",
    "run": "vcf_batch.pool",
}

__all__ = ["ImageAligner", "Manifest", "Output", "RunConfig", "Summary", "VCFPipeline", "__version__", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
