"""A configuration is validated once, and its fingerprint names what it produces."""

import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest

from vcf_batch.config import (
    NOT_CONTENT,
    RunConfig,
    Sampling,
    field_of,
    fingerprint,
    fingerprint_fields,
    load_yaml,
    reference_shares,
)
from vcf_batch.errors import UsageError

IDENTITIES: dict[str, Any] = {
    "manifest": "m",
    "model": "w",
    "judge": "j",
    "lpips": "p",
    "pno_guide": None,
    "safety_checker": None,
    "ip_adapter": None,
}

OTHER: dict[str, Any] = {
    "manifest": "n.parquet", "output": "elsewhere", "model": "org/model", "revision": "v1", "fusion": "naive",
    "strength": 0.5, "steps": 7, "guidance_scale": 3.0, "scheduler": "euler", "height": 64, "width": 72,
    "dtype": "float16", "negative_prompt": "blurry", "batch_size": 9, "shard_size": 10, "reference_root": ("s3://b",),
    "max_pixels": 5, "max_failed": 0.5, "judge": "org/clip", "lpips": "none", "lpips_weights": "folder",
    "long_prompts": "refuse", "image_format": "webp", "seed": 3, "limit": 4, "num_workers": 2, "gpus_per_worker": 0.5,
    "cpus_per_worker": 2,
    "mark": False, "log_format": "json", "verbosity": "quiet", "allow_smaller_batches": True, "profile": True,
    "stall_timeout": 60.0,
    "address": "auto", "fusion_lo": 0.25, "fusion_hi": 0.75, "unconditional": "blank", "image_tokens": "cls",
    "role": "layout", "rows": "2:4", "original_height": 16, "original_width": 16, "crop_top": 8, "crop_left": 8,
    "target_height": 16, "target_width": 16,
    "eta": 0.5, "pno_steps": 10, "pno_guide": "org/guide", "pno_lr_conditioning": 0.002, "pno_lr_noise": 0.002,
    "pno_gamma": 0.3, "min_clip_score": 0.2, "min_clip_reference": 0.2, "max_lpips": 0.7, "best_by": "lpips",
    "attempts": 3, "min_content_alignment": 0.3, "min_style_similarity": 0.5, "triplets": True, "texture": True,
    "safety_checker": "own", "guidance_lo": 0.1, "guidance_hi": 0.9, "compile": True, "one_device_type": True,
    "deep_cache": 2, "default_strengths": {"naive": 0.5, "concat": 0.4, "cross_attention": 0.2, "ip_adapter": 0.7},
    "prompt_column": "caption", "reference_column": "image", "id_column": "uid", "seed_column": "noise",
    "carry": ("Seed",), "ip_adapter": "org/weights:x.safetensors", "image_encoder": "org/clip",
    "calibration": "calibration.json", "lora": ("ink=ink.safetensors:0.5",),
}  # fmt: skip
"""A valid value other than the default, for every setting."""


def config(**values: Any) -> RunConfig:
    return RunConfig(**{"manifest": "m.parquet", "output": "out"} | values)


def name_of(run: RunConfig) -> str:
    return fingerprint(fingerprint_fields(run, **IDENTITIES))


def test_every_setting_has_a_row_in_this_test() -> None:
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
        "from vcf_batch.config import *; c = RunConfig(manifest='x', output='y');"
        "print(fingerprint(fingerprint_fields(c, manifest='m', model='w', judge='j', lpips='p', pno_guide=None,"
        "safety_checker=None, ip_adapter=None)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == fingerprint(fields)


def test_a_column_may_be_named_by_its_own_name() -> None:
    """Names of columns that are those of the contract make no other run."""
    assert config(prompt_column="prompt", id_column="sample_id") == config()
    assert config(id_column="uid", prompt_column="caption").columns == {"prompt": "caption", "sample_id": "uid"}
    with pytest.raises(UsageError, match="'x' is named for 2 meanings"):
        config(prompt_column="x", reference_column="x")


def test_a_number_has_one_spelling() -> None:
    """Rerunning the same command is the resume, whether a file says 5 or the command line 5.0."""
    assert config(guidance_scale=5, strength=1) == config(guidance_scale=5.0, strength=1.0)
    assert name_of(config(guidance_scale=5, strength=1)) == name_of(config(guidance_scale=5.0, strength=1.0))


@pytest.mark.parametrize(
    ("setting", "value", "limit"),
    [
        ("fusion", "blend", "one of naive, concat, cross_attention"),
        ("scheduler", "pndm", "one of ddim"),
        ("image_format", "gif", "one of png"),
        ("dtype", "int8", "one of auto"),
        ("lpips", "squeeze", "one of auto"),
        ("strength", -0.1, "between 0 and 1000"),
        ("strength", math.nan, "between 0 and 1000"),
        ("guidance_scale", math.inf, "between 0 and 1000"),
        ("fusion_lo", -0.1, "between 0 and 1"),
        ("eta", 1.1, "between 0 and 1"),
        ("pno_steps", -1, "between 0 and 1000"),
        ("pno_lr_noise", math.nan, "between 0 and 1"),
        ("pno_gamma", -0.1, "between 0 and 1"),
        ("fusion_hi", math.nan, "between 0.0 and 1"),
        ("unconditional", "ones", "one of zeros, blank, negative"),
        ("image_tokens", "pooled", "one of all, patches, cls"),
        ("steps", 0, "between 1 and 1000"),
        ("batch_size", 0, "between 1 and 4096"),
        ("shard_size", 0, "between 1 and 1000000"),
        ("max_pixels", 0, "between 1 and"),
        ("max_failed", 1.5, "between 0 and 1"),
        ("limit", 0, "at least 1"),
        ("num_workers", 0, "at least 1"),
        ("gpus_per_worker", -1.0, "between 0 and 16"),
        ("cpus_per_worker", 0, "between 1 and 1024"),
        ("seed", -1, "between 0 and"),
        ("seed", 2**63, "between 0 and"),
        ("height", 100, "a multiple of 8"),
        ("width", 8200, "between [0-9]+ and 8192"),
    ],
)
def test_a_value_outside_its_limits_names_value_and_limit(setting: str, value: Any, limit: str) -> None:
    with pytest.raises(UsageError, match=f"{setting} is '?{value}'?; it must be {limit}"):
        config(**{setting: value})


def test_a_reversed_fusion_range_is_refused() -> None:
    with pytest.raises(UsageError, match=r"fusion_hi is 0\.4; it must be between 0\.5 and 1"):
        config(fusion_lo=0.5, fusion_hi=0.4)
    assert config(fusion_lo=0.5, fusion_hi=0.5).fusion_lo == 0.5


@pytest.mark.parametrize(
    ("weights", "count", "shares"),
    [
        (None, 0, ()), (None, 4, (0.25,) * 4), ((), 0, ()), ((3.0,), 1, (1.0,)), ((0.5, 0.5), 2, (0.5, 0.5)),
        ((1, 0), 2, (1.0, 0.0)), ((1000, 3000 / 3), 2, (0.5, 0.5)), ((5e-324, 5e-324), 2, (0.5, 0.5)),
    ],
)  # fmt: skip
def test_reference_shares_sum_to_1(weights: tuple[float, ...] | None, count: int, shares: tuple[float, ...]) -> None:
    assert reference_shares(weights, count) == shares


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0,), "reference_weights has 1 values for 2 references"),
        ((0.0, 0.0), "reference_weights are all 0"),
        ((1.0, -1.0), "number 2 of reference_weights is -1.0; it must be between 0 and 1000"),
        ((math.nan, 1.0), "number 1 of reference_weights is nan; it must be between 0 and 1000"),
        ((math.inf, 1.0), "number 1 of reference_weights is inf"),
    ],
)
def test_weights_that_say_nothing_are_refused(weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        reference_shares(weights, 2)


def test_only_ddim_adds_noise() -> None:
    with pytest.raises(UsageError, match=r"eta is 0\.5; the scheduler 'euler' takes 0 only: use ddim"):
        config(eta=0.5, scheduler="euler")
    assert config(eta=0, scheduler="euler").eta == 0


def test_the_sampling_of_a_run_is_its_fields_of_the_same_names() -> None:
    """Defaults and limits exist once, in Sampling."""
    assert config().sampling == Sampling(scheduler="ddim")
    changed: dict[str, Any] = {"eta": 0.5, "width": 72, "deep_cache": 2}
    assert config(**changed).sampling == Sampling(scheduler="ddim", **changed)
    with pytest.raises(UsageError, match=r"guidance_hi is 0\.1; it must be between 0\.2 and 1"):
        Sampling(guidance_lo=0.2, guidance_hi=0.1)


def test_a_deep_cache_is_not_compiled() -> None:
    with pytest.raises(UsageError, match="deep_cache is 2, which cannot be compiled: leave out --compile or"):
        config(deep_cache=2, compile=True)


@pytest.mark.parametrize("lpips", ["alex", "vgg"])
def test_published_lpips_needs_its_weights(lpips: str) -> None:
    with pytest.raises(UsageError, match="--lpips-weights, or turn the score off with --lpips none"):
        config(lpips=lpips)
    assert config(lpips=lpips, lpips_weights="weights").lpips == lpips


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


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rows": "5"}, "rows is '5'; give the number of the first row, a colon, and the number behind the last row"),
        ({"rows": "5:"}, "rows is '5:'; give the number"),
        ({"rows": "-1:5"}, "rows is '-1:5'; give the number"),
        ({"rows": "5:5"}, "rows is 5:5, which has no row; the second number must be larger than the first"),
        ({"rows": "5:9", "limit": 3}, "rows is 5:9, and limit is 3, which is another part of the manifest: leave one"),
    ],
)
def test_a_part_that_is_none_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"role": "shape"}, "role is 'shape'; it must be one of all, style, palette, layout"),
        ({"role": "style", "fusion": "naive"}, "the fusion naive cannot limit references: use --fusion concat or"),
        (
            {"role": "palette", "fusion": "ip_adapter", "ip_adapter": "w"},
            "with the fusion ip_adapter it must be all, style, layout",
        ),
    ],
)
def test_a_role_that_cannot_be_had_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        config(**settings)


def test_loras_enter_the_fingerprint_by_their_identities_and_only_where_there_are_some() -> None:
    """A run that was begun before there were LoRAs resumes."""
    assert not [name for name in fingerprint_fields(config(), **IDENTITIES) if "lora" in name]
    fields = fingerprint_fields(config(lora=("ink=ink.safetensors",)), **IDENTITIES, lora="ink=hash:1")
    assert fields["lora_id"] == "ink=hash:1" and "lora" not in fields
    assert field_of(fingerprint_fields(config(), **IDENTITIES), "lora_id") is None


def test_a_lora_that_is_no_file_is_refused() -> None:
    with pytest.raises(UsageError, match="convert a pickle"):
        config(lora=("ink=ink.pt",))
