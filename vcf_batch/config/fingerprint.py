"""The fingerprint of a run: what changes its content or layout, and how it is named."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from vcf_batch.config.limits import TOLD_SIZES
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import redact_name

NOT_CONTENT = frozenset(
    {
        "output",
        "manifest",
        "model",
        "revision",
        "judge",
        "pno_guide",
        "safety_checker",
        "ip_adapter",
        "image_encoder",
        "lora",
        "lpips_weights",
        "calibration",
        "num_workers",
        "gpus_per_worker",
        "one_device_type",
        "allow_smaller_batches",
        "stall_timeout",
        "profile",
        "address",
        "max_failed",
        "log_format",
        "verbosity",
        "carry",
    }
)
"""Settings that change neither the content of an output nor its layout. Manifest and models count by their
identity, not by their name."""

ADDED_SETTINGS: dict[str, Any] = {
    "texture": False,
    "role": "all",
    "rows": None,
    **{name: 0 if name.startswith("crop") else None for name in TOLD_SIZES},
}
"""Settings added after 0.2.0, each with the value that means the behaviour before it.

A setting stays out of the fingerprint while it has that value, so that a half-done run resumes under the next version.
Fields without the setting are read as if they had that value: :func:`field_of`. A setting is never removed from
this table."""


def fingerprint_fields(
    config: RunConfig,
    *,
    manifest: str,
    model: str,
    judge: str,
    lpips: str,
    pno_guide: str | None,
    safety_checker: str | None,
    ip_adapter: str | None,
    lora: str | None = None,
) -> dict[str, Any]:
    """The settings and identities that change a run's content or layout, as plain JSON types.

    Args:
        config: the run, with every default resolved (no ``auto``, no None where the model decides).
        manifest, model, judge, lpips, pno_guide, safety_checker, ip_adapter: exact identities: hashes or revisions,
            not names. The guide is None where nothing is guided.
        lora: names, identities and scales of the run's LoRAs; None without any, as in every run before there were some.
    """
    fields = {name: value for name, value in config.to_dict().items() if name not in NOT_CONTENT}
    # The roots decide which rows fail, in any order. The fields are published, so credentials are left out.
    fields["reference_root"] = sorted(map(redact_name, config.reference_root))
    ids = {"manifest": manifest, "model": model, "judge": judge, "lpips": lpips, "pno_guide": pno_guide}
    ids |= {"safety_checker": safety_checker, "ip_adapter": ip_adapter}
    ids |= {} if lora is None else {"lora": lora}
    fields |= {f"{name}_id": identity for name, identity in ids.items()}
    as_before = {name for name, value in ADDED_SETTINGS.items() if fields[name] == value}
    return {name: value for name, value in fields.items() if name not in as_before}


def field_of(fields: Mapping[str, Any], name: str) -> Any:
    """Value of one of :func:`fingerprint_fields`; None if neither they nor :data:`ADDED_SETTINGS` have it."""
    return fields.get(name, ADDED_SETTINGS.get(name))


def fingerprint(fields: Mapping[str, Any]) -> str:
    """Hex SHA-256 of :func:`fingerprint_fields`: the name of a run's content."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
