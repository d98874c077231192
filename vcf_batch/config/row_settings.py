"""The settings of a row: the run's settings, with the row's own in their place."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vcf_batch.config.limits import ADAPTED_ROLES, IP_ADAPTER, ROLED_FUSIONS
from vcf_batch.config.run_config import RunConfig
from vcf_batch.config.strengths import reference_shares
from vcf_batch.output_columns import SETTINGS
from vcf_batch.records import Lora, Row, settled_loras


def settings_of(row: Row, config: RunConfig) -> dict[str, Any]:
    """The settings of one row, by the names of their output columns, and its seed.

    Args:
        row: a row of the manifest; if it has an error, its own settings do not count.
        config: the run, with every default resolved.
    """
    own = {} if row.error else row.overrides
    shares = reference_shares(own.get("reference_weights"), len(row.references))
    pno_steps = int(own.get("pno_steps", config.pno_steps)) if row.references else 0
    fusion = own.get("fusion", config.fusion)
    sampling = dataclasses.replace(config.sampling, deep_cache=1) if pno_steps else config.sampling
    return {
        "seed": row.seed,
        "reference_weights": list(shares) if len(shares) > 1 else None,
        "reference_roles": _roles(own.get("reference_roles"), row, config),
        "negative_prompt": own.get("negative_prompt", config.negative_prompt),
        "fusion": fusion,
        "strength": float(own.get("strength", config.strength_of(fusion))),
        "fusion_lo": float(own.get("fusion_lo", config.fusion_lo)),
        "fusion_hi": float(own.get("fusion_hi", config.fusion_hi)),
        "unconditional": _unconditional(row, config),
        "image_tokens": None if fusion == IP_ADAPTER else config.image_tokens,
        "lora": [lora.shown() for lora in loras_of(row, config)] or None,
        "guidance_scale": float(own.get("guidance_scale", config.guidance_scale)),
        **{name: value for name, value in vars(sampling).items() if name in SETTINGS},
        "pno_steps": pno_steps,
    }


def loras_of(row: Row, config: RunConfig) -> tuple[Lora, ...]:
    """The LoRAs that a row is generated with, each with its scale, sorted."""
    return settled_loras(None if row.error else row.overrides.get("lora"), config.loras)


def _roles(own: Sequence[str | None] | None, row: Row, config: RunConfig) -> list[str] | None:
    """The role of each reference; None if none has a limit."""
    roles = [role or config.role for role in own or [None] * len(row.references)]
    return roles if any(role != "all" for role in roles) else None


def _unconditional(row: Row, config: RunConfig) -> str:
    if row.negative_reference is not None:
        return "negative"
    return "zeros" if config.unconditional == "negative" else config.unconditional


def _limits(row: Row, used: Mapping[str, Any], config: RunConfig) -> Iterator[tuple[str, str]]:
    """What limits the references of a row, and how to have no such limit."""
    if used["reference_roles"] and config.role == "all":
        yield "reference_roles is set", "leave reference_roles out"
    elif used["reference_roles"]:
        yield f"the run's role is {config.role}", "give each reference the role all in reference_roles"
    if any(row.masks):
        yield "reference_masks is set", "leave reference_masks out"


def checked(row: Row, config: RunConfig) -> Row:
    """The row, with an error if its own settings contradict the run's."""
    used, error = settings_of(row, config), None
    if used["fusion_lo"] > used["fusion_hi"]:
        error = (
            f"fusion_lo is {used['fusion_lo']:g}, above fusion_hi, which is {used['fusion_hi']:g}; set both in the "
            "row, the lower one first"
        )
    if used["fusion"] not in ROLED_FUSIONS:
        for set_, remedy in _limits(row, used, config):
            error = (
                f"{set_}, and the fusion {used['fusion']} cannot limit references; use {' or '.join(ROLED_FUSIONS)} in "
                f"the row, or {remedy}"
            )
    for lora in loras_of(row, config):
        if not lora.is_file and lora.source not in config.loras:
            known = f"the run names {', '.join(config.loras)}" if config.loras else "the run names none with --lora"
            error = f"lora is {lora.source!r}, which is no .safetensors file and no LoRA of the run; {known}"
    for role in used["reference_roles"] or ():
        if used["fusion"] == IP_ADAPTER and role not in ADAPTED_ROLES:
            error = f"a role is {role}; with the fusion ip_adapter it must be one of {', '.join(ADAPTED_ROLES)}"
    return dataclasses.replace(row, error=error) if error and not row.error else row
