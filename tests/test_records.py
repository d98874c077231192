"""Names and scales of LoRAs, as options and rows give them."""

import pytest

from vcf_batch.errors import UsageError
from vcf_batch.records import MAX_LORAS, Lora, named_loras, parse_lora, settled_loras


@pytest.mark.parametrize(
    ("text", "source", "scale"),
    [
        ("ink.safetensors", "ink.safetensors", None),
        ("ink.safetensors:0.5", "ink.safetensors", 0.5),
        ("ink", "ink", None),
        ("ink:-2", "ink", -2.0),
        ("s3://bucket/a b/ink.safetensors:1e-1", "s3://bucket/a b/ink.safetensors", 0.1),
        ("http://host:8080/ink.safetensors", "http://host:8080/ink.safetensors", None),
        ("http://host:8080/ink.safetensors?sig=a%3A1:0.25", "http://host:8080/ink.safetensors?sig=a%3A1", 0.25),
        ("https://host/ink.safetensors?at=12:30:00Z", "https://host/ink.safetensors?at=12:30:00Z", None),
        ("org/model:folder/ink.safetensors:3", "org/model:folder/ink.safetensors", 3.0),
    ],
)
def test_a_scale_follows_the_last_colon(text: str, source: str, scale: float | None) -> None:
    assert parse_lora(text) == Lora(source, scale)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ink.pt", r"'ink\.pt', which is no \.safetensors file: .* convert a pickle"),
        ("ink.bin:0.5", "which is no .safetensors file"),
        ("folder/ink", "which is no .safetensors file"),
        (".safetensors", "which is no .safetensors file"),
        ("", "which is no .safetensors file"),
        ("ink.safetensors:much", "the scale of lora 'ink.safetensors:much' is 'much'; it must be a number between -10"),
        ("ink.safetensors:10.5", "is '10.5'; it must be a number between -10 and 10"),
        ("ink.safetensors:nan", "is 'nan'; it must be a number between -10 and 10"),
        ("s3://user:secret@bucket/ink.pt", "lora is 's3://bucket/ink.pt'"),
    ],
)
def test_what_is_no_lora_is_told_with_value_limit_and_remedy(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_lora(text)


def test_the_loras_of_a_run_have_names_and_scales() -> None:
    found = named_loras(("wood=b.safetensors:0.5", "ink=a.safetensors"))
    assert [*found.items()] == [("ink", Lora("a.safetensors", 1.0)), ("wood", Lora("b.safetensors", 0.5))]


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (("ink.safetensors",), "it must be NAME=URL"),
        (("a/b=ink.safetensors",), "it must be NAME=URL"),
        (("ink=wood",), "lora ink is 'wood', which is no .safetensors file"),
        (("ink=a.safetensors", "ink=b.safetensors"), "lora ink is named twice"),
        (tuple(f"n{number}=a.safetensors" for number in range(MAX_LORAS + 1)), "lora has 9 values; the limit is 8"),
    ],
)
def test_an_option_that_names_no_lora_is_refused(texts: tuple[str, ...], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        named_loras(texts)


def test_a_row_without_loras_has_those_of_the_run_and_an_empty_one_has_none() -> None:
    run = named_loras(("wood=b.safetensors:0.5", "ink=a.safetensors:2"))
    assert settled_loras(None, run) == (Lora("ink", 2.0), Lora("wood", 0.5))
    assert settled_loras((), run) == ()
    assert settled_loras((Lora("wood", None), Lora("c.safetensors", None), Lora("ink", 3.0)), run) == (
        Lora("c.safetensors", 1.0),
        Lora("ink", 3.0),
        Lora("wood", 0.5),
    )


def test_outputs_show_no_secret_of_an_address() -> None:
    assert Lora("https://user:secret@host/a.safetensors?sig=1", 0.5).shown() == "https://host/a.safetensors?...:0.5"
