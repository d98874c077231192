"""Quality gates: the limits on a sample's scores, and the outcome of a row after its draws."""

import dataclasses
from collections.abc import Sequence
from typing import cast

from vcf_batch.config.limits import GATES
from vcf_batch.config.run_config import RunConfig
from vcf_batch.records import Draw, Sample, Scores


def outcome(draws: Sequence[Sample], config: RunConfig) -> Sample | None:
    """Outcome of a row: the sample that passes; else, after the last draw, the best one, rejected.

    Args:
        draws: samples of the row's draws so far, one or more in order, not judged yet and without images.
        config: the run, with its gates.

    Returns:
        The sample of the last draw or of the best one; None if the row gets another draw.
    """
    last = draws[-1]
    if not config.is_gated:
        return last
    attempts = tuple(Draw(each.settings["seed"], each.scores, each.nsfw) for each in draws)
    if last.status == "success" and not misses(last, config):
        return dataclasses.replace(last, attempts=attempts)
    if len(draws) < config.attempts:
        return None
    scored = [each for each in draws if each.status == "success"]
    if not scored:
        return dataclasses.replace(last, attempts=attempts)
    best = max(scored, key=lambda each: _quality(each.scores, config.best_by))
    where = f"in the best of {len(draws)} attempts" if len(draws) > 1 else "in 1 attempt"
    reason = f"{' and '.join(misses(best, config))} {where}"
    return dataclasses.replace(best, status="rejected", error_message=reason, attempts=attempts)


def misses(sample: Sample, config: RunConfig) -> list[str]:
    """The gates that a sample misses, in words. A score that does not apply to the sample passes."""
    missed = ["flagged by the safety checker"] if sample.nsfw else []
    for name, limit in config.gates.items():
        value = getattr(sample.scores, GATES[name])
        is_most = name.startswith("max_")
        if value is not None and not (value <= limit if is_most else value >= limit):
            sign = ">" if is_most else "<"
            missed.append(f"{GATES[name]} {value:.4g} {sign} --{name.replace('_', '-')} {limit:g}")
    return missed


def _quality(scores: Scores, best_by: str) -> float:
    """Quality of a sample, higher is better. Without the score ``best_by`` it is the CLIP score."""
    value = getattr(scores, best_by)
    if value is None:
        return cast(float, scores.clip_score)
    return -value if f"max_{best_by}" in GATES else value
