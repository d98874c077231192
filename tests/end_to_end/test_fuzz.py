"""Input of any kind: what it may do is fail with an error of this project's own. Never a crash, never a hang.

The normal suite tries a few dozen inputs of each kind, ``make test-all`` thousands.
"""

import contextlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from support import pictures
from vcf_batch import images
from vcf_batch.config.mapping import load_yaml
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import ManifestError, RowError, UsageError
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.output import sample_records, shards
from vcf_batch.records import Sample, Shard

LIMIT = 1_000_000
"""Pixels of a picture."""

EXAMPLES = pytest.mark.parametrize("examples", [40, pytest.param(4000, marks=pytest.mark.slow)])

NAMES = st.sampled_from(
    ["note", "Prompt", "key", "__key__", "a.b", "a/b", "\u202e", "\x1b[2J", "x" * 300, "", "\u00e9", "e\u0301"]
)
LEAVES = st.sampled_from(
    [
        pa.bool_(), pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.string(), pa.large_string(),
        pa.string_view(), pa.binary(), pa.binary(3), pa.date32(), pa.date64(), pa.time32("s"), pa.time64("ns"),
        pa.timestamp("s"), pa.timestamp("ns", "Asia/Tokyo"), pa.timestamp("us", "No/Where"), pa.duration("s"),
        pa.decimal128(9, 2), pa.decimal256(70, 3), pa.null(), pa.dictionary(pa.int8(), pa.string()), pa.uuid(),
        pa.json_(),
    ]
)  # fmt: skip
KINDS = st.recursive(
    LEAVES,
    lambda inner: (
        st.builds(pa.list_, inner)
        | st.builds(pa.list_, inner, st.integers(1, 2))
        | st.builds(pa.large_list, inner)
        | st.builds(pa.map_, st.just(pa.string()), inner)
        | st.builds(lambda *kinds: pa.struct([(str(n % 3), kind) for n, kind in enumerate(kinds)]), inner, inner)
    ),
    max_leaves=4,
)
OURS = {
    "prompt": [pa.string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.binary(), pa.null()],
    "sample_id": [pa.string(), pa.large_string(), pa.int64()],
    "reference": [
        pa.string(),
        pa.list_(pa.string()),
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        pa.null(),
    ],
    "negative_reference": [pa.string()],
    "reference_weights": [pa.list_(pa.float64()), pa.list_(pa.float32(), 2)],
    "seed": [pa.int64(), pa.uint64(), pa.int8(), pa.float64()],
    "strength": [pa.float64(), pa.float16(), pa.int8()],
    "fusion": [pa.string()],
}
TEXTS = (
    st.sampled_from(["", " ", "a", "a b", "\0", "\r\n", "../x", "\u202e", "x" * 200, "concat", "\U0001f408", "id-1"])
    | st.text()
)


@st.composite
def arrays(draw: st.DrawFn, kind: pa.DataType, length: int) -> pa.Array:
    """Values of a type; anything that it can hold, and bytes that are no text."""
    if pa.types.is_dictionary(kind):
        return draw(arrays(kind.value_type, length)).dictionary_encode()
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, draw(arrays(kind.storage_type, length)))
    if pa.types.is_string(kind) and draw(st.integers(0, 3)) == 0:
        raw = pa.array(draw(st.lists(st.binary(max_size=5), min_size=length, max_size=length)), pa.binary())
        return pa.Array.from_buffers(kind, length, raw.buffers())
    values = draw(st.lists(st.none() | value_of(kind), min_size=length, max_size=length))
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return pa.nulls(length, kind)


def value_of(kind: pa.DataType) -> st.SearchStrategy[Any]:
    """Python values that an Arrow type may hold."""
    types = pa.types
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return TEXTS
    if types.is_binary(kind) or types.is_fixed_size_binary(kind):
        width = kind.byte_width if types.is_fixed_size_binary(kind) else None
        return st.binary(min_size=width or 0, max_size=width or 9)
    if types.is_boolean(kind):
        return st.booleans()
    if types.is_floating(kind):
        return st.floats(width=kind.bit_width)
    if types.is_decimal(kind):
        return st.decimals(-999, 999, places=2)
    if types.is_null(kind):
        return st.none()
    if types.is_map(kind):
        return st.lists(st.tuples(TEXTS, value_of(kind.item_type)), max_size=2)
    if types.is_fixed_size_list(kind):
        return st.lists(value_of(kind.value_type), min_size=kind.list_size, max_size=kind.list_size)
    if types.is_list(kind) or types.is_large_list(kind):
        return st.lists(st.none() | value_of(kind.value_type), max_size=3)
    if types.is_struct(kind):
        return st.fixed_dictionaries({each.name: st.none() | value_of(each.type) for each in kind})
    return st.integers(-(2**63), 2**63 - 1) | st.integers(0, 100)


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    length = draw(st.integers(0, 4))
    named = [("prompt", draw(st.sampled_from(OURS["prompt"][:3] * 3 + OURS["prompt"])))]
    named += [(name, draw(st.sampled_from(OURS[name]))) for name in draw(st.sets(st.sampled_from([*OURS][1:])))]
    named += draw(st.lists(st.tuples(NAMES, KINDS), max_size=3))
    return pa.Table.from_arrays([draw(arrays(kind, length)) for _, kind in named], [name for name, _ in named])


def use(manifest: Path, scratch: Path) -> None:
    """Take a manifest all the way through to a shard's files, as failed rows; or refuse it."""
    opened = Manifest.open(str(manifest))
    opened.check()
    rows = opened.rows(0, min(opened.num_rows, 50), 0)
    shard = Shard(0, 0, len(rows), "00000")
    with shards.ShardWriter(
        str(scratch), shard, "png", sample_records.schema(opened.carried_schema, opened.reference_is_list)
    ) as writer:
        for row in rows:
            good = row.error is None
            writer.add(
                Sample(row, "success" if good else "failed", {}, b"image" if good else None, error_message=row.error)
            )
        files = writer.finish()
    assert pq.read_table(files.parquet).num_rows == len(rows)
    # Without a successful sample there is no tar.
    samples = list(shards.read_samples(files.tar)) if Path(files.tar).exists() else []
    assert len(samples) == sum(row.error is None for row in rows)


@EXAMPLES
def test_fuzzed_manifests(tmp_path: Path, examples: int) -> None:
    """A manifest of any columns and values is refused, or each of its rows becomes one of the outputs."""

    @settings(max_examples=examples)
    @given(tables())
    def check(table: pa.Table) -> None:
        try:
            pq.write_table(table, tmp_path / "m.parquet")
        except (pa.ArrowException, ValueError):
            return  # Arrow itself cannot write it
        with contextlib.suppress(ManifestError):
            use(tmp_path / "m.parquet", tmp_path / "scratch")

    check()


def files(image_format: str) -> list[bytes]:
    """Pictures of a format, small ones and odd ones."""
    odd = {
        "JPEG": [pictures.jpeg_scans(3), pictures.to_bytes(Image.new("CMYK", (8, 8)), "JPEG")],
        "PNG": [pictures.png_header(999, 999), pictures.palette(transparency=1)],
        "WEBP": [pictures.webp_header(999, 999, kind) for kind in (b"VP8X", b"VP8L", b"VP8 ")],
        "GIF": [pictures.animation("GIF")],
    }
    return [pictures.file(image_format), *odd.get(image_format, [])]


CUTS = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=8), st.integers(0, 12)), min_size=1, max_size=4)
"""Where in a file, what to put there, and how much to take away."""


def mutated(data: bytes, cuts: list[tuple[float, bytes, int]]) -> bytes:
    for place, put, taken in cuts:
        at = int(place * len(data))
        data = data[:at] + put + data[at + taken :]
    return data


@EXAMPLES
def test_fuzzed_parquet(tmp_path: Path, examples: int) -> None:
    """Whatever happened to a file: it is refused, or read."""
    table = pa.table({"prompt": ["a cat", "a dog"] * 20, "sample_id": [f"{n}" for n in range(40)], "n": [[1, 2]] * 40})
    pq.write_table(table, tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()

    @settings(max_examples=examples)
    @given(CUTS)
    def check(cuts: list[tuple[float, bytes, int]]) -> None:
        (tmp_path / "m.parquet").write_bytes(mutated(whole, cuts))
        with contextlib.suppress(ManifestError):
            use(tmp_path / "m.parquet", tmp_path / "scratch")

    check()


@EXAMPLES
@pytest.mark.parametrize("image_format", images.FORMATS)
@pytest.mark.filterwarnings("ignore")
def test_fuzzed_pictures(image_format: str, examples: int) -> None:
    """Whatever happened to a picture: it decodes within the limit, or fails its row, every time with the same words."""

    def outcome(data: bytes) -> str:
        try:
            image = images.decode(data, LIMIT)
        except RowError as error:
            return str(error)
        assert image.mode == "RGB" and image.width * image.height <= LIMIT
        return str(hash(image.tobytes()))

    @settings(max_examples=examples)
    @given(st.sampled_from(files(image_format)), CUTS)
    def check(data: bytes, cuts: list[tuple[float, bytes, int]]) -> None:
        spoilt = mutated(data, cuts)
        first = outcome(spoilt)
        assert outcome(spoilt) == first
        assert " at 0x" not in first

    check()


@EXAMPLES
def test_fuzzed_settings(tmp_path: Path, examples: int) -> None:
    """Any text in a configuration file is a mistake that is told, or settings."""
    pieces = "seed|steps|: |- |[|]|{|}|&a |*a|!!|!x |\n| |?|1|1e999|2026-02-30|0x|.nan|<<|'|\"|>|%|@|\t|\0|12:99"
    words = st.sampled_from(pieces.split("|")) | st.text(max_size=3)

    @settings(max_examples=examples)
    @given(st.lists(words, max_size=12).map("".join))
    def check(text: str) -> None:
        with contextlib.suppress(UsageError):
            RunConfig.from_mapping(load_yaml(text, "run.yaml") | {"manifest": "m", "output": "out"})

    check()
