"""A configuration is validated once."""

import math
from typing import Any

import pytest

from support.settings import config
from vcf_batch.config.sampling import Sampling
from vcf_batch.errors import UsageError


def test_a_column_may_be_named_by_its_own_name() -> None:
    """Names of columns that are those of the contract make no other run."""
    assert config(prompt_column="prompt", id_column="sample_id") == config()
    assert config(id_column="uid", prompt_column="caption").columns == {"prompt": "caption", "sample_id": "uid"}
    with pytest.raises(UsageError, match="'x' is named for 2 meanings"):
        config(prompt_column="x", reference_column="x")


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


def test_a_lora_that_is_no_file_is_refused() -> None:
    with pytest.raises(UsageError, match="convert a pickle"):
        config(lora=("ink=ink.pt",))
