"""Gates that name a share of false accepts: the number comes from a calibration, once, before the run."""

import logging

from vcf_batch.config.limits import GATES
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import UsageError, redact
from vcf_batch.output.scores import calibration
from vcf_batch.setup.run_models import Models

_log = logging.getLogger(__name__)


def with_calibrated_gates(config: RunConfig, models: Models) -> RunConfig:
    """Give each gate its number. The calibration is not needed any more then, and is left out.

    Args:
        config: the run.
        models: the models of the run, by which the score has to be calibrated.

    Raises:
        UsageError: the calibration cannot be read, or has no limit for a gate by these models.
        StorageError: the storage failed.
    """
    shares = {name: str(limit) for name, limit in config.gates.items() if isinstance(limit, str)}
    if config.calibration is None:
        return config
    if not shares:
        raise UsageError(
            f"calibration is {redact(config.calibration)}, and no gate names a share of false accepts: give one, such "
            "as --min-clip-reference far=0.05, or leave the calibration out"
        )
    found = calibration.read(config.calibration)
    limits: dict[str, float] = {}
    for name, text in shares.items():
        score, share = GATES[name], text.removeprefix("far=")
        there = found.scores.get(score)
        if there is None:
            raise UsageError(
                f"{name} is {text}, and {redact(config.calibration)} has no {score}; it has {', '.join(found.scores)}"
            )
        if there.model != models.identity_of(score):
            raise UsageError(
                f"{name} is {text}, and {redact(config.calibration)} has {score} by another model, {there.model[:12]}, "
                f"than this run, {models.identity_of(score)[:12]}: calibrate an output of a run with the same models"
            )
        if (limit := there.thresholds.get(share)) is None:
            raise UsageError(
                f"{name} is {text}, which {there.other} pairs are too few for: it takes {1 / float(share):.0f} that do "
                "not share; calibrate a larger output, or name a larger share"
            )
        limits[name] = limit.limit
        _log.warning("%s %s is the limit %.6g, by %s.", name, text, limit.limit, redact(config.calibration))
    return config.replace(**limits, calibration=None)
