"""Settings as a mapping are checked before a configuration is made of them."""

from typing import Any

import pytest

from support.settings import OTHER, config
from vcf_batch.config.mapping import load_yaml
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import UsageError


def test_mapping_round_trip() -> None:
    # No other scheduler takes an eta, what is compiled no deep cache, and the fusion naive no role.
    run = config(**OTHER | {"scheduler": "ddim", "compile": False, "role": "all", "rows": None})
    assert RunConfig.from_mapping(run.to_dict()) == run
    assert run.replace(steps=9).steps == 9
    with pytest.raises(UsageError, match="steps is 0"):
        run.replace(steps=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 1}, "unknown setting 'stepz'; did you mean steps?"),
        ({"nothing_like_it": 1}, "unknown setting 'nothing_like_it'; known are: manifest, output"),
        ({"output": None}, "output is missing"),
        ({"manifest": ""}, "manifest is missing"),
        ({"steps": 2.5}, "steps is 2.5; it must be a whole number or null"),
        ({"steps": "20"}, "steps is '20'; it must be a whole number or null"),
        ({"seed": True}, "seed is True; it must be a whole number"),
        ({"strength": "high"}, "strength is 'high'; it must be a number or null"),
        ({"model": 7}, "model is 7; it must be a text"),
        ({"fusion": None}, "fusion is None; it must be a text"),
        ({"reference_root": "s3://b"}, "reference_root is 's3://b'; it must be a list of texts"),
        ({"reference_root": ["s3://b", 7]}, r"reference_root is \['s3://b', 7\]; it must be a list of texts"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RunConfig.from_mapping({"manifest": "m.parquet", "output": "out"} | values)


def test_yaml_with_either_spelling_of_a_name() -> None:
    values = load_yaml("manifest: m.parquet\noutput: out\nguidance-scale: 5\nimage_format: webp\n", "run.yaml")
    assert RunConfig.from_mapping(values) == config(guidance_scale=5.0, image_format="webp")
    assert load_yaml("", "run.yaml") == {}
