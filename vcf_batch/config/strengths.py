"""How strongly references count: the default strengths of fusions, and the shares of several references."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vcf_batch.config.checks import check_between, is_a
from vcf_batch.config.limits import MAX_STRENGTH, MAX_WEIGHT
from vcf_batch.errors import ModelError, UsageError

DEFAULT_STRENGTHS: Mapping[str, float] = {"naive": 0.3, "concat": 1.0, "cross_attention": 0.3, "ip_adapter": 1.0}
"""Strengths for a model that recommends none (``default_strength`` in its model_index.json): the paper's, and for
``ip_adapter`` diffusers'."""

EVALUATED_STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Strengths of ``concat``, and of an IP-Adapter, that are evaluated, and tried for an aligner; 1 is the paper's."""


def default_strengths(aligner: Mapping[str, Any] | None, model: Mapping[str, Any]) -> dict[str, float]:
    """The strength of each fusion where none is given.

    The aligner's own ``default_strength`` is that of ``concat``, or else the model's.

    Args:
        aligner: configuration of the model's aligner, ``aligner/config.json``; None without an aligner.
        model: configuration of the model, ``model_index.json``.

    Raises:
        ModelError: the recommendation is no number, or out of its limits.
    """
    recommended = (aligner or {}).get("default_strength")
    if recommended is None and (recommended := model.get("default_strength")) is None:
        return dict(DEFAULT_STRENGTHS)
    if not is_a(recommended, float) or not 0 <= recommended <= MAX_STRENGTH:
        raise ModelError(f"default_strength is {recommended!r}; it must be between 0 and {MAX_STRENGTH:g}")
    return {**DEFAULT_STRENGTHS, "concat": float(recommended)}


def reference_shares(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Shares of a sample's references, summing to 1.

    Args:
        weights: one per reference, 0 to :data:`MAX_WEIGHT`, not all 0; only their ratios matter. None is equal ones.
        count: number of references.

    Raises:
        UsageError: the weights break these rules.
    """
    weights = [1.0] * count if weights is None else weights
    if len(weights) != count:
        raise UsageError(f"reference_weights has {len(weights)} values for {count} references; give one for each")
    for number, weight in enumerate(weights, 1):
        check_between(f"number {number} of reference_weights", weight, 0, MAX_WEIGHT)
    total = math.fsum(weights)
    if weights and not total:
        raise UsageError("reference_weights are all 0; give one a weight above 0, or strength 0 for text only")
    return tuple(weight / total for weight in weights)
