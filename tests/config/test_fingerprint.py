"""The fingerprint of a run names what it produces."""

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from support.settings import OTHER, config
from vcf_batch.config.fingerprint import NOT_CONTENT, field_of, fingerprint, fingerprint_fields
from vcf_batch.config.run_config import RunConfig

IDENTITIES: dict[str, Any] = {
    "manifest": "m",
    "model": "w",
    "judge": "j",
    "lpips": "p",
    "pno_guide": None,
    "safety_checker": None,
    "ip_adapter": None,
}


def name_of(run: RunConfig) -> str:
    return fingerprint(fingerprint_fields(run, **IDENTITIES))


def test_every_setting_has_another_value_to_be_tried() -> None:
    assert set(OTHER) == {field.name for field in dataclasses.fields(RunConfig)}
    assert all(getattr(config(), name) != value for name, value in OTHER.items())


@pytest.mark.parametrize("setting", sorted(OTHER))
def test_fingerprint_covers_what_changes_content_or_layout(setting: str) -> None:
    """The fingerprint covers what changes content or layout, not workers, address or progress."""
    needed: dict[str, dict[str, Any]] = {
        "attempts": {"min_clip_score": 0.1},
        "best_by": {"min_clip_score": 0.1},
        "min_content_alignment": {"triplets": True},
        "default_strengths": {"strength": 0.4},
        "image_encoder": {"ip_adapter": "w"},
    }
    plain = config(**needed.get(setting, {}))
    changed = plain.replace(**{setting: OTHER[setting]})
    assert (name_of(changed) == name_of(plain)) == (setting in NOT_CONTENT)


@pytest.mark.parametrize("identity", sorted(IDENTITIES))
def test_fingerprint_covers_the_identities(identity: str) -> None:
    fields = fingerprint_fields(config(), **IDENTITIES | {identity: "other"})
    assert fingerprint(fields) != name_of(config())


def test_fingerprint_is_the_same_everywhere() -> None:
    """The fingerprint names the run: another process and another order of the settings give the same one."""
    fields = fingerprint_fields(config(), **IDENTITIES)
    assert fingerprint(dict(reversed(fields.items()))) == fingerprint(fields)
    code = (
        "from vcf_batch.config.fingerprint import fingerprint, fingerprint_fields;"
        "from vcf_batch.config.run_config import RunConfig; c = RunConfig(manifest='x', output='y');"
        "print(fingerprint(fingerprint_fields(c, manifest='m', model='w', judge='j', lpips='p', pno_guide=None,"
        "safety_checker=None, ip_adapter=None)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == fingerprint(fields)


def test_a_number_has_one_spelling() -> None:
    """Rerunning the same command is the resume, whether a file says 5 or the command line 5.0."""
    assert config(guidance_scale=5, strength=1) == config(guidance_scale=5.0, strength=1.0)
    assert name_of(config(guidance_scale=5, strength=1)) == name_of(config(guidance_scale=5.0, strength=1.0))


def test_a_run_without_roles_has_the_fingerprint_of_before() -> None:
    """The setting came later, and stays out of the fingerprint while references decide on everything."""
    assert "role" not in fingerprint_fields(config(), **IDENTITIES)
    assert fingerprint_fields(config(role="layout"), **IDENTITIES)["role"] == "layout"
    assert field_of({}, "role") == "all"


def test_a_part_of_the_rows_has_one_spelling() -> None:
    """And a part from the first row on is a limit. Without a part, the fingerprint is that of before."""
    assert "rows" not in fingerprint_fields(config(limit=4), **IDENTITIES)
    assert config(rows="007:20") == config(rows="7:20") and config(rows="7:20").part == range(7, 20)
    assert config(rows="0:20") == config(limit=20)
    assert name_of(config(rows="7:20")) != name_of(config(rows="7:21"))


def test_loras_enter_the_fingerprint_by_their_identities_and_only_where_there_are_some() -> None:
    """A run that was begun before there were LoRAs resumes."""
    assert not [name for name in fingerprint_fields(config(), **IDENTITIES) if "lora" in name]
    fields = fingerprint_fields(config(lora=("ink=ink.safetensors",)), **IDENTITIES, lora="ink=hash:1")
    assert fields["lora_id"] == "ink=hash:1" and "lora" not in fields
    assert field_of(fingerprint_fields(config(), **IDENTITIES), "lora_id") is None
