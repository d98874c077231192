"""vcf-batch: a Parquet manifest of prompts and reference images in, a WebDataset of scored images out, on Ray.

The public names load their modules when they are first used: importing the package is cheap (no torch, no ray).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vcf_batch.commands.evaluate import Evaluation, evaluate
    from vcf_batch.commands.generate import run
    from vcf_batch.commands.preview import preview
    from vcf_batch.config.run_config import RunConfig
    from vcf_batch.driver.ledger import Summary
    from vcf_batch.manifest.manifest import Manifest
    from vcf_batch.report.open_output import OpenOutput as Output
    from vcf_batch.report.status import Status
    from vcf_batch.training.ray_training import TrainingSummary, train_aligner
    from vcf_batch.training.training_config import TrainingConfig
    from vcf_batch.vcf.aligner import ImageAligner
    from vcf_batch.vcf.pipeline import VCFPipeline

__version__ = "0.2.0"

_HOMES = {
    "Evaluation": "vcf_batch.commands.evaluate:Evaluation",
    "ImageAligner": "vcf_batch.vcf.aligner:ImageAligner",
    "Manifest": "vcf_batch.manifest.manifest:Manifest",
    "Output": "vcf_batch.report.open_output:OpenOutput",
    "RunConfig": "vcf_batch.config.run_config:RunConfig",
    "Status": "vcf_batch.report.status:Status",
    "Summary": "vcf_batch.driver.ledger:Summary",
    "TrainingConfig": "vcf_batch.training.training_config:TrainingConfig",
    "TrainingSummary": "vcf_batch.training.ray_training:TrainingSummary",
    "VCFPipeline": "vcf_batch.vcf.pipeline:VCFPipeline",
    "evaluate": "vcf_batch.commands.evaluate:evaluate",
    "preview": "vcf_batch.commands.preview:preview",
    "run": "vcf_batch.commands.generate:run",
    "train_aligner": "vcf_batch.training.ray_training:train_aligner",
}
"""Module and name there of each public name."""

__all__ = [
    "Evaluation",
    "ImageAligner",
    "Manifest",
    "Output",
    "RunConfig",
    "Status",
    "Summary",
    "TrainingConfig",
    "TrainingSummary",
    "VCFPipeline",
    "__version__",
    "evaluate",
    "preview",
    "run",
    "train_aligner",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
