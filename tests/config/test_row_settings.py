"""The settings of a row, and what of its own contradicts the run's."""

import re
from typing import Any

import pytest

from vcf_batch.config.row_settings import checked
from vcf_batch.config.run_config import RunConfig
from vcf_batch.records import Reference, Row


@pytest.mark.parametrize(
    ("role", "own", "error"),
    [
        ("style", {}, "the run's role is style, and the fusion naive .* give each reference the role all"),
        ("style", {"reference_roles": (None,)}, "the run's role is style, .* give each reference the role all"),
        ("style", {"reference_roles": ("all",)}, None),
        ("all", {"reference_roles": ("layout",)}, "reference_roles is set, .* or leave reference_roles out"),
        ("all", {}, None),
    ],
)
def test_a_row_whose_fusion_cannot_limit_references_is_told_what_limits_them(
    role: str, own: dict[str, Any], error: str | None
) -> None:
    """The remedy is one that helps: a role of the run goes by a role in the row alone."""
    config = RunConfig(manifest="m", output="o", strength=1.0, guidance_scale=5.0, role=role)
    row = checked(Row(0, "a", "a star", references=(Reference("a.png"),), overrides={"fusion": "naive", **own}), config)
    assert row.error is None if error is None else re.search(error, row.error or "")
