"""A calibration as a table, for people."""

from collections.abc import Sequence

from vcf_batch.output.scores.calibration import CalibratedScore, Calibration


def table(found: Calibration) -> list[list[str]]:
    """Heads, then a line for each score: area, interval, pairs, and the limit at each share of false accepts."""
    shares = list(dict.fromkeys(share for each in found.scores.values() for share in each.thresholds))
    heads = ["score", "against", "AUC", "pairs", *(f"{float(share):.0%} false accepts" for share in shares)]
    return [heads, *(_line(name, each, shares) for name, each in found.scores.items())]


def markdown(found: Calibration) -> str:
    """The table in Markdown."""
    heads, *lines = table(found)
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines))


def _line(name: str, each: CalibratedScore, shares: Sequence[str]) -> list[str]:
    interval = "" if each.low is None or each.high is None else f" [{each.low:.3f}, {each.high:.3f}]"
    sign = "at least" if each.higher_is_better else "at most"
    limits = [
        "too few pairs" if limit is None else f"{sign} {limit.limit:.4f}, keeps {limit.accepted:.0%}"
        for limit in map(each.thresholds.get, shares)
    ]
    return [name, each.against, f"{each.auc:.3f}{interval}", f"{each.shared:,} and {each.other:,}", *limits]
