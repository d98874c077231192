"""The manifest's columns: accepted and refused types, and what each row becomes."""

import datetime
import decimal
import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcf_batch.errors import ManifestError, RowError
from vcf_batch.manifest import contract
from vcf_batch.manifest.carried import carried_schema
from vcf_batch.output_columns import COLUMNS
from vcf_batch.records import Lora, Reference, Row
from vcf_batch.sharding import derive_seed

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def check(**columns: pa.DataType) -> None:
    schema = pa.schema({"prompt": pa.string()} | columns)
    contract.check_schema("m.parquet", schema, "m.parquet", schema)


def rows(**columns: Any) -> list[Row]:
    table = pa.table(
        {name: column if isinstance(column, pa.Array) else pa.array(column) for name, column in columns.items()}
    )
    carried = carried_schema({"m.parquet": table.schema})
    used = [name for name in table.column_names if name in contract.MANIFEST_COLUMNS or name in carried.names]
    return contract.parse_rows(table.select(used).to_batches()[0], 0, 7, carried)


def row(**values: Any) -> Row:
    return rows(**{name: [value] for name, value in ({"prompt": "a cat"} | values).items()})[0]


def invalid_utf8(*values: bytes) -> pa.Array:
    array = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(array), array.buffers())


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.null(),
        pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.list_(pa.string(), 2), pa.list_(pa.null()),
        IMAGE, pa.struct([("path", pa.string())]), pa.struct([("bytes", pa.large_binary())]), pa.list_(IMAGE),
        pa.struct([("bytes", pa.null()), ("path", pa.string())]),
    ],
    ids=str,
)  # fmt: skip
def test_reference_types_accepted(kind: pa.DataType) -> None:
    check(reference=kind)


@pytest.mark.parametrize(
    "kind",
    [pa.int64(), pa.binary(), pa.struct([("url", pa.string())]), pa.list_(pa.int32()), pa.list_(pa.list_(pa.string())),
     pa.struct([("bytes", pa.string()), ("path", pa.string())]), pa.struct([("path", pa.string()), ("w", pa.int8())])],
    ids=str,
)  # fmt: skip
def test_reference_types_refused(kind: pa.DataType) -> None:
    with pytest.raises(ManifestError, match=r"column 'reference' is .*; it must be string, struct<bytes"):
        check(reference=kind)


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("prompt", pa.int64(), "string"),
        ("sample_id", pa.int64(), "string"),
        ("seed", pa.float64(), "Int64"),
        ("negative_prompt", pa.binary(), "string"),
        ("guidance_scale", pa.string(), "number"),
        ("strength", pa.bool_(), "number"),
        ("fusion", pa.int8(), "string"),
        ("fusion_lo", pa.string(), "number"),
        ("pno_steps", pa.float32(), "int64"),
        ("fusion_hi", pa.bool_(), "number"),
        ("negative_reference", pa.list_(pa.string()), "string"),
        ("reference_weights", pa.float64(), "list of numbers"),
        ("reference_weights", pa.list_(pa.string()), "list of numbers"),
    ],
)
def test_wrong_type_names_file_column_and_remedy(name: str, kind: pa.DataType, expected: str) -> None:
    with pytest.raises(ManifestError, match=rf"(?s)m\.parquet.*column '{name}' is {kind}; it must be .*{expected}"):
        check(**{name: kind})


def test_missing_prompt_says_what_is_there() -> None:
    schema = pa.schema({"caption": pa.string(), "url": pa.string()})
    with pytest.raises(ManifestError, match="'prompt' is missing; the file has: caption, url"):
        contract.check_schema("m.parquet", schema, "m.parquet", schema)
    schema = pa.schema({"Prompt": pa.string()})
    with pytest.raises(ManifestError, match="rename 'Prompt'"):
        contract.check_schema("m.parquet", schema, "m.parquet", schema)


def test_a_column_twice_is_refused() -> None:
    schema = pa.schema([("prompt", pa.string()), ("prompt", pa.string())])
    with pytest.raises(ManifestError, match="column 'prompt' occurs 2 times"):
        contract.check_schema("m.parquet", schema, "m.parquet", schema)


@pytest.mark.parametrize("name", sorted(set(COLUMNS) - set(contract.MANIFEST_COLUMNS)))
def test_carried_column_that_collides_with_an_output_is_refused(name: str) -> None:
    with pytest.raises(ManifestError, match=f"'{name}' would collide"):
        check(**{name: pa.string()})


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(ManifestError) as refused:
        check(seed=pa.float64(), status=pa.string(), pno_steps=pa.float64())
    assert all(name in str(refused.value) for name in ("seed", "status", "pno_steps"))


def test_files_must_agree() -> None:
    first = pa.schema({"prompt": pa.string(), "note": pa.int32(), "reference": pa.string()})
    with pytest.raises(ManifestError, match=r"'note' is in a\.parquet but not in b\.parquet"):
        contract.check_schema(
            "b.parquet", pa.schema({"prompt": pa.string(), "reference": pa.string()}), "a.parquet", first
        )
    lists = first.set(2, pa.field("reference", pa.list_(pa.string())))
    with pytest.raises(ManifestError, match=r"'reference' is a list, but in a\.parquet a single reference"):
        contract.check_schema("b.parquet", lists, "a.parquet", first)
    assert carried_schema(
        {"a": first, "b": first.set(1, pa.field("note", pa.int64())), "c": first.set(1, pa.field("note", pa.null()))}
    ) == pa.schema({"note": pa.int64()})
    with pytest.raises(ManifestError, match=r"b\.parquet has columns of other types"):
        carried_schema({"a.parquet": first, "b.parquet": first.set(1, pa.field("note", pa.string()))})


def test_image_bytes_are_not_carried() -> None:
    schema = pa.schema(
        {
            "prompt": pa.string(), "hash": pa.binary(8), "photo": IMAGE, "photos": pa.list_(IMAGE),
            "note": pa.dictionary(pa.int8(), pa.string()), "at": pa.timestamp("ns", "UTC"),
            "box": pa.list_(pa.float32()),
        },
        metadata={"huggingface": "{}"},
    )  # fmt: skip
    assert carried_schema({"m": schema}).equals(
        pa.schema({"note": pa.string(), "at": pa.timestamp("us", "UTC"), "box": pa.list_(pa.float32())}),
        check_metadata=True,
    )


def test_what_is_carried_is_plain_within_lists_and_structs_too() -> None:
    """Arrow writes neither views nor extension types wherever they may stand; readers want neither."""
    words = pa.dictionary(pa.int8(), pa.string())
    nested = {
        "pairs": (pa.list_(pa.string_view(), 2), [["a", "b"], None]),
        "views": (pa.list_view(pa.string_view()), [["a"], []]),
        "boxes": (pa.list_(pa.struct([("x", words), ("at", pa.timestamp("ns"))])), [[{"x": "a", "at": 1000}], None]),
        "map": (pa.map_(pa.string(), pa.list_(pa.duration("ns"))), [[("a", [1000])], None]),
    }
    schema = pa.schema({"prompt": pa.string()} | {name: kind for name, (kind, _) in nested.items()})
    carried = carried_schema({"m": schema})
    assert [str(kind) for kind in carried.types] == [
        "fixed_size_list<item: string>[2]",
        "list<item: string>",
        "list<item: struct<x: string, at: timestamp[us]>>",
        "map<string, list<item: duration[us]>>",
    ]
    values = {name: pa.array(value, kind) for name, (kind, value) in nested.items()}
    first, second = rows(prompt=["a", "b"], **values)
    assert (first.error, second.error) == (None, None)
    for row, expected in ((first, [["a", "b"], ["a"]]), (second, [None, []])):
        assert [row.carried[name] for name in ("pairs", "views")] == expected
    at = datetime.datetime(1970, 1, 1, 0, 0, 0, 1)
    assert first.carried["boxes"] == [{"x": "a", "at": at}]
    assert first.carried["map"] == [("a", [at - datetime.datetime(1970, 1, 1)])]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (pa.timestamp("us", "Nowhere/City"), "is in the unknown time zone 'Nowhere/City'"),
        (pa.list_(pa.struct([("a", pa.int8()), ("a", pa.int8())])), "has a struct with two fields of one name"),
    ],
    ids=str,
)
def test_what_python_has_no_values_for_is_not_carried(kind: pa.DataType, message: str) -> None:
    with pytest.raises(ManifestError, match=f"column 'note' {message}, which cannot be carried through"):
        check(note=kind)


def test_key_and_seed_come_from_row_number_or_from_the_manifest() -> None:
    """``sample_id`` is the ``key`` everywhere, else the row number zero-padded to 9 digits; it seeds the row."""
    assert [each.key for each in rows(prompt=["a", "b"])] == ["000000000", "000000001"]
    assert row(sample_id="cat-1").key == "cat-1"
    assert row(sample_id="cat-1").seed == derive_seed(7, "cat-1")
    assert [each.seed for each in rows(prompt=["a", "b"], seed=[5, None])] == [5, derive_seed(7, "000000001")]
    assert row(seed=2**63 - 1).seed == 2**63 - 1


@pytest.mark.parametrize("key", ["../x", "a/b", "", "a\n", "é", "x" * 129, None])
def test_keys_cannot_escape_a_tar(key: str | None) -> None:
    """Keys that cannot escape a tar: an unsafe id never becomes a row."""
    with pytest.raises(ManifestError, match="not a safe id"):
        rows(prompt=["a cat"], sample_id=pa.array([key], pa.string()))


def test_overrides_are_the_row_s_own_and_nulls_are_left_out() -> None:
    assert row(guidance_scale=3, strength=0.5, fusion="naive", negative_prompt="blurry").overrides == {
        "negative_prompt": "blurry", "guidance_scale": 3.0, "strength": 0.5, "fusion": "naive",
    }  # fmt: skip
    absent = pa.nulls(1, pa.float64())
    assert rows(prompt=["a cat"], strength=absent, fusion=pa.nulls(1), guidance_scale=absent)[0].overrides == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guidance_scale": 1001}, "guidance_scale is 1001; it must be between 0 and 1000"),
        ({"prompt": "é" * 60_000}, "prompt has 120000 bytes; the limit is 100000"),
        ({"prompt": "\u3000"}, "prompt is empty"),
        ({"fusion_lo": -0.5}, "fusion_lo is -0.5; it must be between 0 and 1"),
        ({"pno_steps": -1}, "pno_steps is -1; it must be between 0 and 1000"),
        ({"fusion_hi": math.nan}, "fusion_hi is nan; it must be between 0 and 1"),
        ({"reference_weights": [1.0]}, "reference_weights has 1 values for 0 references; give one for each"),
        ({"reference": ["a.png", None]}, "reference 2 of 2 is null; leave it out of the list"),
        ({"reference": ["a.png"] * 17}, "reference has 17 images; the limit is 16"),
    ],
)
def test_a_bad_value_fails_its_row_alone(values: dict[str, Any], message: str) -> None:
    """One bad row never costs another one."""
    good: dict[str, Any] = {"prompt": "fine"}
    columns = {name: [good.get(name), value, good.get(name)] for name, value in ({"prompt": "a cat"} | values).items()}
    before, bad, after = rows(**columns)
    assert bad.error == message
    assert before.error is None
    assert after.error is None
    assert (bad.references, bad.overrides) == ((), {})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "reference_weights has 1 values for 2 references; give one for each"),
        ([1.0, None], "number 2 of reference_weights is nan; it must be between 0 and 1000.0"),
        ([-1.0, 2.0], "number 1 of reference_weights is -1.0; it must be between 0 and 1000.0"),
        ([0.0, 0.0], "reference_weights are all 0; give one a weight above 0, or strength 0 for text only"),
    ],
)
def test_bad_weights_fail_their_row_alone(weights: list[float | None], message: str) -> None:
    parsed = rows(
        prompt=["a cat"] * 3,
        reference=[["a.png", "b.png"], ["a.png", "b.png"], ["a.png"]],
        reference_weights=[[3, 1], weights, None],
    )
    assert [each.error for each in parsed] == [None, message, None]
    assert [dict(each.overrides) for each in parsed] == [{"reference_weights": (3.0, 1.0)}, {}, {}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reference_roles": ["shape", None]}, "a role in reference_roles is 'shape'; it must be one of all, style"),
        ({"reference_roles": ["style"]}, "reference_roles has 1 values for 2 references; give each one role, or null"),
        ({"reference_masks": ["a.png"]}, "reference_masks has 1 values for 2 references; give each one mask, or null"),
        ({"reference_masks": ["", None]}, "reference_masks is an empty text; use null for none"),
    ],
)
def test_bad_limits_fail_their_row_alone(values: dict[str, Any], message: str) -> None:
    columns = {name: [None, value, None] for name, value in values.items()}
    parsed = rows(prompt=["a cat"] * 3, reference=[["a.png", "b.png"]] * 3, **columns)
    assert parsed[1].error is not None and parsed[1].error.startswith(message)
    assert (parsed[0].error, parsed[2].error) == (None, None)


def test_roles_and_masks_belong_to_their_references() -> None:
    """One value each, or null; one text for one reference. Masks count as images of the row, after its others."""
    parsed = row(
        reference=["a.png", "b.png"],
        negative_reference="c.png",
        reference_roles=["style", None],
        reference_masks=[None, "m.png"],
    )
    assert parsed.error is None and parsed.overrides == {"reference_roles": ("style", None)}
    assert parsed.masks == (None, Reference("m.png"))
    assert parsed.encoded == (Reference("a.png"), Reference("b.png"), Reference("c.png"))
    assert parsed.images == (*parsed.encoded, Reference("m.png"))
    single = row(reference="a.png", reference_roles="layout", reference_masks={"bytes": b"x", "path": None})
    assert (single.overrides, single.masks) == ({"reference_roles": ("layout",)}, (Reference(data=b"x"),))
    without = row(reference=["a.png"] * 2, reference_roles=[None, None], reference_masks=[None])
    assert (without.error, without.masks) == (None, ())
    for name in ("reference_roles", "reference_masks"):
        with pytest.raises(ManifestError, match=f"column '{name}' is int64; it must be string"):
            check(**{name: pa.int64()})


def test_loras_are_texts_with_a_scale_or_lists_of_them() -> None:
    """An empty text, or an empty list, is none; null is the run's."""
    one, other = Lora("a.safetensors", 0.5), Lora("ink", None)
    for value, expected in (
        ("a.safetensors:0.5", (one,)),
        (["a.safetensors:0.5", "ink"], (one, other)),
        ("", ()),
        ([], ()),
        ([""], ()),
    ):
        parsed = row(lora=value)
        assert (parsed.error, parsed.overrides) == (None, {"lora": expected})
    assert row(lora=None).overrides == {}
    check(lora=pa.string())
    check(lora=pa.list_(pa.large_string()))
    with pytest.raises(ManifestError, match="column 'lora' is double; it must be string, or list<string>"):
        check(lora=pa.float64())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["a.pt"], "lora is 'a.pt', which is no .safetensors file"),
        (["a.safetensors:x"], "the scale of lora 'a.safetensors:x' is 'x'; it must be a number between -10 and 10"),
        (["a.safetensors", None], "lora has a null in its list; leave it out of the list"),
        (["a.safetensors", "a.safetensors:2"], "lora names 'a.safetensors' twice; give it once, with one scale"),
        ([f"{number}.safetensors" for number in range(9)], "lora has 9 values; the limit is 8"),
        (["a\0.safetensors"], "lora has a NUL character at position 1; remove it"),
    ],
)
def test_a_bad_lora_fails_its_row_alone(value: list[str | None], message: str) -> None:
    parsed = rows(prompt=["a cat"] * 3, lora=[None, value, None])
    assert parsed[1].error is not None and parsed[1].error.startswith(message)
    assert (parsed[0].error, parsed[2].error) == (None, None)


def test_a_negative_reference_is_an_image_of_the_row() -> None:
    parsed = row(reference="a.png", negative_reference="b.png", fusion_lo=0.25)
    assert parsed.images == (Reference("a.png"), Reference("b.png"))
    assert parsed.references == (Reference("a.png"),)
    assert parsed.overrides == {"fusion_lo": 0.25}
    assert row(negative_reference="").error == "negative_reference is an empty text; use null for none"
    assert row(negative_reference="b\0").error == "negative_reference has a NUL character at position 1; remove it"


def test_text_that_is_not_utf8_fails_its_row_alone() -> None:
    """One bad row never costs another one, though Arrow refuses the whole column."""
    prompts, notes = invalid_utf8(b"fine", b"\xff", b"fine"), invalid_utf8(b"ok", b"ok", b"\xff")
    good, bad_prompt, bad_note = rows(prompt=prompts, note=notes)
    assert good.error is None
    assert good.carried == {"note": "ok"}
    assert bad_prompt.error is not None
    assert bad_prompt.error.startswith("prompt cannot be read: 'utf-8'")
    assert bad_note.error is not None
    assert bad_note.error.startswith("note cannot be read")
    assert bad_note.prompt == "fine"
    assert bad_note.carried == {"note": None}


def test_references_in_every_form() -> None:
    both = {"bytes": b"png", "path": "a.png"}
    assert contract.parse_references(None) == ()
    assert contract.parse_references("a.png") == (Reference("a.png"),)
    assert contract.parse_references(both) == (Reference("a.png", b"png"),)
    assert contract.parse_references({"bytes": b"png", "path": None}) == (Reference(None, b"png"),)
    assert contract.parse_references({"bytes": b"png", "path": ""}) == (Reference(None, b"png"),)
    assert contract.parse_references({"bytes": None, "path": None}) == ()
    assert contract.parse_references([]) == ()
    assert contract.parse_references(["a.png", "b.png"]) == (Reference("a.png"), Reference("b.png"))
    assert contract.parse_references([both, both]) == (Reference("a.png", b"png"),) * 2
    with pytest.raises(RowError, match="reference 1 of 2 is null"):
        contract.parse_references([{"bytes": None, "path": None}, both])


def test_carried_values_keep_their_types() -> None:
    at = datetime.datetime(2020, 1, 2, 3, 4, 5, 678901)
    values = {"n": 3, "price": decimal.Decimal("1.50"), "at": at, "tags": ["a", None], "box": {"x": 1.5}, "kind": "big"}
    parsed = rows(
        prompt=["a cat"],
        kind=pa.array(["big"]).dictionary_encode(),
        at=pa.array([at], pa.timestamp("ns")),
        **{name: [values[name]] for name in ("n", "price", "tags", "box")},
    )[0]
    assert dict(parsed.carried) == values
    assert parsed.error is None


def test_a_date_beyond_python_s_fails_its_row_alone() -> None:
    far = pa.array([0, 2**62], pa.int64()).cast(pa.timestamp("s"))
    good, bad = rows(prompt=["a", "b"], at=far)
    assert good.error is None
    assert bad.error is not None
    assert bad.error.startswith("at cannot be read")


texts = st.text(max_size=20)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(texts, st.none() | texts, st.none() | st.floats() | st.integers(-5, 2000)), min_size=1, max_size=9
    )
)
def test_no_row_disappears_whatever_it_holds(values: list[tuple[str, str | None, float | None]]) -> None:
    """A row never disappears: each becomes a Row, in order, usable or with its error."""
    prompts, references, strengths = zip(*values, strict=True)
    numbers = pa.array([None if value is None else float(value) for value in strengths], pa.float64())
    parsed = rows(prompt=list(prompts), reference=pa.array(references, pa.string()), strength=numbers)
    assert [each.number for each in parsed] == list(range(len(values)))
    for each, (prompt, reference, strength) in zip(parsed, values, strict=True):
        wrong_strength = strength is not None and not 0 <= strength <= 1000
        wrong = wrong_strength or not prompt.strip() or "\0" in prompt or reference == "" or "\0" in (reference or "")
        assert (each.error is not None) == wrong
        assert each.prompt == prompt


HASHES = ["A" * 64, "b" * 64]


def test_hashes_belong_to_their_references() -> None:
    """``reference_sha256`` gives the hash of each reference's bytes, null where any will do, and is carried."""
    negative = {"negative_reference": "n", "negative_reference_sha256": "c" * 64}
    one = row(reference="a.png", reference_sha256=HASHES[0], **negative)
    assert one.references == (Reference("a.png", sha256="a" * 64),)
    assert one.negative_reference == Reference("n", sha256="c" * 64)
    assert one.carried == {"reference_sha256": HASHES[0], "negative_reference_sha256": "c" * 64}
    two = row(reference=["a.png", "b.png"], reference_sha256=[HASHES[0], None])
    assert two.references == (Reference("a.png", sha256="a" * 64), Reference("b.png"))
    embedded = row(reference={"bytes": b"x", "path": None}, reference_sha256=HASHES[1])
    assert embedded.references == (Reference(data=b"x", sha256="b" * 64),)
    assert row(reference="a.png", reference_sha256=None).references == (Reference("a.png"),)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"reference": ["a", "b"], "reference_sha256": HASHES[:1]}, "has 1 hashes for 2 images"),
        ({"reference": None, "reference_sha256": HASHES[0]}, "has 1 hashes for 0"),
        ({"reference": "a", "reference_sha256": "md5"}, "is 'md5'; it must be a SHA-256 in 64 hexadecimal digits"),
        ({"negative_reference": "a", "negative_reference_sha256": ""}, "negative_reference_sha256 is ''; it must be"),
    ],
)
def test_a_hash_that_cannot_be_meant_fails_its_row(values: dict[str, Any], reason: str) -> None:
    assert reason in (row(**values).error or "")


def test_hashes_have_the_form_of_the_references() -> None:
    check(reference=pa.list_(IMAGE), reference_sha256=pa.list_(pa.string()))
    check(reference=pa.null(), reference_sha256=pa.string())
    with pytest.raises(ManifestError, match="'reference_sha256' is a single reference, but 'reference' a list"):
        check(reference=pa.list_(pa.string()), reference_sha256=pa.string())
    with pytest.raises(ManifestError, match=r"reference_sha256' is binary; it must be string, or list<string>"):
        check(reference=pa.string(), reference_sha256=pa.binary())
