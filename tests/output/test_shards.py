"""Shards: bytes that depend on the samples alone, rows that never disappear, commits that are whole or absent."""

import base64
import dataclasses
import datetime
import decimal
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import uuid
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vcf_batch import storage
from vcf_batch.errors import StorageError, printable, redact_name
from vcf_batch.output import row_json, sample_records, shards
from vcf_batch.output_columns import COLUMNS, Extra, columns_of
from vcf_batch.records import Draw, Reference, Row, Sample, Scores, Shard, Status

NO_COLUMNS = pa.schema([])
SHARD = Shard(0, 0, 2, "00000")
SETTINGS = {
    "negative_prompt": "",
    "fusion": "concat",
    "strength": 1.0,
    "guidance_scale": 5.0,
    "steps": 20,
    "scheduler": "ddim",
}


def success(number: int, key: str | None = None, **changes: Any) -> Sample:
    row = Row(number, key or f"{number:09d}", f"a red circle, number {number}", (Reference("reds/1.png"),), seed=number)
    image = f"image {number}".encode()
    sample = Sample(row, "success", SETTINGS | {"seed": number}, image, 64, 64, Scores(0.25, 0.5, 0.75))
    return dataclasses.replace(sample, **changes)


def failed(number: int, message: str = "reference x.png: no such file") -> Sample:
    return dataclasses.replace(
        success(number), status="failed", image=None, width=None, height=None, scores=Scores(), error_message=message
    )


def write(
    folder: str | Path,
    samples: list[Sample],
    carried: pa.Schema = NO_COLUMNS,
    image_format: str = "png",
    reference_is_list: bool = False,
) -> shards.ShardFiles:
    shard = Shard(0, 0, len(samples), "00000")
    with shards.ShardWriter(
        str(folder), shard, image_format, sample_records.schema(carried, reference_is_list)
    ) as writer:
        for sample in samples:
            writer.add(sample)
        return writer.finish()


def contents(files: shards.ShardFiles) -> list[bytes]:
    paths = {"tar": files.tar, "parquet": files.parquet}
    return [Path(paths[kind]).read_bytes() for kind in files.entries]


# Round trips

_finite = st.floats(allow_nan=False, allow_infinity=False)
_words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_PLAIN: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    (pa.bool_(), st.booleans()),
    (pa.int8(), st.integers(-(2**7), 2**7 - 1)),
    (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    (pa.uint64(), st.integers(0, 2**64 - 1)),
    (pa.float16(), st.floats(width=16, allow_nan=False)),
    (pa.float32(), st.floats(width=32, allow_nan=False)),
    (pa.float64(), st.floats(allow_nan=False)),
    (pa.string(), _words),
    (pa.large_string(), _words),
    (pa.binary(), st.binary(max_size=8)),
    (pa.binary(3), st.binary(min_size=3, max_size=3)),
    (pa.dictionary(pa.int32(), pa.string()), _words),
    (pa.decimal128(9, 3), st.decimals(-999999, 999999, places=3)),
    (pa.date32(), st.dates()),
    (pa.time64("us"), st.times()),
    (pa.timestamp("ms"), st.integers(-(2**40), 2**40)),
    (pa.timestamp("us", "Europe/Berlin"), st.integers(-(2**50), 2**50)),
    (pa.timestamp("ns"), st.integers(-(2**62), 2**62)),
    (pa.duration("us"), st.timedeltas(datetime.timedelta(-999), datetime.timedelta(999))),
    (pa.null(), st.none()),
]


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Strategies of ``(type, strategy of its values)`` one level deeper."""
    name = st.sampled_from(["a", "b", "ü"])
    structs = st.dictionaries(name, inner, min_size=1, max_size=2).map(
        lambda fields: (
            pa.struct([(field, kind) for field, (kind, _) in fields.items()]),
            st.fixed_dictionaries({field: st.none() | values for field, (_, values) in fields.items()}),
        )
    )
    lists = inner.map(lambda one: (pa.list_(one[0]), st.lists(st.none() | one[1], max_size=3)))
    pairs = inner.map(lambda one: (pa.list_(one[0], 2), st.lists(one[1], min_size=2, max_size=2)))
    maps = inner.map(
        lambda one: (
            pa.map_(pa.string(), one[0]),
            st.dictionaries(_words, st.none() | one[1], max_size=2).map(lambda found: list(found.items())),
        )
    )
    return structs | lists | pairs | maps


_columns = st.recursive(st.sampled_from(_PLAIN), _nested, max_leaves=4)


@st.composite
def shard_contents(draw: st.DrawFn) -> tuple[list[Sample], pa.Schema, bool]:
    columns = draw(st.lists(_columns, max_size=3))
    carried = pa.schema([(f"extra {number}", kind) for number, (kind, _) in enumerate(columns)])
    is_list = draw(st.booleans())
    reference = st.builds(Reference, _words, st.none() | st.just(b"jpeg")) | st.just(Reference(data=b"jpeg"))
    scores = st.none() | st.floats(-1, 1) | st.just(float("nan"))
    samples = []
    for number in range(draw(st.integers(1, 6))):
        row = Row(
            number,
            f"{number}{draw(st.text('azAZ09_-', max_size=120))}",
            draw(_words),
            tuple(draw(st.lists(reference, max_size=3 if is_list else 1))),
            draw(st.integers(0, 2**63 - 1)),
            draw(st.none() | st.just(Reference("s3://user:secret@bucket/n.png"))),
            carried={name: draw(st.none() | values) for name, (_, values) in zip(carried.names, columns, strict=True)},
        )
        status: Status = draw(st.sampled_from(["success", "success", "rejected", "failed"]))
        samples.append(
            Sample(
                row,
                status,
                SETTINGS | {"seed": row.seed, "strength": draw(_finite), "negative_prompt": draw(_words)},
                draw(st.binary(max_size=2000)) if status == "success" else None,
                draw(st.none() | st.integers(8, 8192)),
                draw(st.none() | st.integers(8, 8192)),
                Scores(draw(scores), draw(scores), draw(scores)),
                draw(st.none() | _words) if status == "success" else "why: " + draw(_words),
                attempts=tuple(Draw(seed, Scores(draw(scores), 0.5)) for seed in range(draw(st.integers(0, 2)))),
            )
        )
    return samples, carried, is_list


def _json_types(value: Any) -> Any:
    """The shape of a JSON value: its type, an object's fields, the types within an array; None fits every shape."""
    if isinstance(value, dict):
        return {key: _json_types(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_json_types(member) for member in value]
    return None if value is None else type(value)


def _fits(shape: Any, other: Any) -> bool:
    if shape is None or other is None:
        return True
    if isinstance(shape, dict) and isinstance(other, dict):
        return all(_fits(shape[key], other[key]) for key in shape.keys() & other.keys())
    if isinstance(shape, list) and isinstance(other, list):
        return all(_fits(one, two) for one in shape for two in other)
    return shape is other


def dense(value: Any) -> Any:
    """The value without the nulls of its objects, at any depth."""
    if isinstance(value, dict):
        return {key: dense(member) for key, member in value.items() if member is not None}
    return [dense(member) for member in value] if isinstance(value, list) else value


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(made=shard_contents(), image_format=st.sampled_from(["png", "webp", "jpg"]))
def test_what_goes_in_is_read_back_by_webdataset_and_pyarrow(
    made: tuple[list[Sample], pa.Schema, bool], image_format: str
) -> None:
    """The output is a function of (fingerprint, device type): the same samples give byte-identical tars and parquets.

    Each manifest row ends as success, rejected or failed; only success rows are in the tar. Without any there is none.
    """
    import webdataset

    samples, carried, is_list = made
    with tempfile.TemporaryDirectory() as folder:
        files = write(f"{folder}/1", samples, carried, image_format, is_list)
        again = write(f"{folder}/2", samples, carried, image_format, is_list)
        assert contents(files) == contents(again)
        table = pq.read_table(files.parquet)
        assert ("tar" in files.entries) == os.path.exists(files.tar) == any(s.status == "success" for s in samples)
        tars = [files.tar] if "tar" in files.entries else []
        in_tar = list(webdataset.WebDataset(tars, shardshuffle=False)) if tars else []
        assert [sample for tar in tars for sample in shards.read_samples(tar)] == [
            {
                "__key__": one["__key__"],
                image_format: one[image_format],
                "txt": one["txt"].decode(),
                "json": json.loads(one["json"]),
            }
            for one in in_tar
        ]

    assert table.schema.names == [*columns_of(), *carried.names]
    for name in carried.names:
        kind = carried.field(name).type
        assert table.schema.field(name).type == kind
        assert table[name].combine_chunks().equals(pa.array([s.row.carried[name] for s in samples], kind))
    assert table["key"].to_pylist() == [s.row.key for s in samples]
    assert table["status"].to_pylist() == [s.status for s in samples]
    assert table["error_message"].to_pylist() == [s.error_message and printable(s.error_message) for s in samples]
    assert table["prompt"].to_pylist() == [s.row.prompt for s in samples]
    assert table["seed"].to_pylist() == [s.row.seed for s in samples]
    assert table["strength"].to_pylist() == [s.settings["strength"] for s in samples]
    names = [[redact_name(one.name) for one in s.row.references] for s in samples]
    assert table["reference"].to_pylist() == [(some or None) if is_list else next(iter(some), None) for some in names]
    negatives = [s.row.negative_reference for s in samples]
    assert table["negative_reference"].to_pylist() == [one and redact_name(one.name) for one in negatives]

    successes = [s for s in samples if s.status == "success"]
    assert [one["__key__"] for one in in_tar] == [s.row.key for s in successes]
    assert [one[image_format] for one in in_tar] == [s.image for s in successes]
    assert [one["txt"].decode() for one in in_tar] == [s.row.prompt for s in successes]
    rows = {row["key"]: row for row in table.drop_columns(carried.names).to_pylist()}
    records = [json.loads(one["json"]) for one in in_tar]
    for record in records:
        assert list(record) == [name for name in table.schema.names if name in record]
        row = rows[record["key"]]
        assert {name: record[name] for name in COLUMNS if name in record} == dense(row)
        assert record.keys() - COLUMNS.keys() <= {*carried.names}
        assert dense(record) == record
    assert all(_fits(_json_types(one), _json_types(two)) for one in records for two in records)
    assert files.counts == {status: sum(s.status == status for s in samples) for status in files.counts}


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (pa.bool_(), True, True),
        (pa.int64(), 2**62, 2**62),
        (pa.float64(), 3, 3.0),
        (pa.float64(), float("nan"), None),
        (pa.float32(), float("-inf"), None),
        (pa.string(), "ü", "ü"),
        (pa.binary(), b"\xff\x00", base64.b64encode(b"\xff\x00").decode()),
        (pa.decimal128(9, 3), decimal.Decimal("1.5"), "1.500"),
        (pa.date32(), datetime.date(2024, 2, 29), "2024-02-29"),
        (pa.time64("us"), datetime.time(23, 59, 0, 1), "23:59:00.000001"),
        (pa.timestamp("ms"), datetime.datetime(2024, 2, 29, 23, 59), "2024-02-29T23:59:00.000"),
        (pa.timestamp("us", "Europe/Berlin"), 0, "1970-01-01T00:00:00.000000Z"),
        (pa.timestamp("ns"), 1, "1970-01-01T00:00:00.000000001"),
        (pa.duration("ms"), datetime.timedelta(seconds=1), 1000),
        (pa.dictionary(pa.int8(), pa.string()), "blue", "blue"),
        (pa.map_(pa.string(), pa.int64()), [("a", 1)], [{"key": "a", "value": 1}]),
        (
            pa.struct([("a", pa.list_(pa.float64())), ("b", pa.date32())]),
            {"a": [1, None]},
            {"a": [1.0, None]},
        ),
        (pa.uuid(), uuid.UUID(int=1), base64.b64encode(uuid.UUID(int=1).bytes).decode()),
        (pa.null(), None, None),
    ],
    ids=str,
)
def test_the_documented_json_encoding(tmp_path: Path, kind: pa.DataType, value: Any, expected: Any) -> None:
    """For every sample the same JSON types, those of ``json_type``; what is null is left out."""
    sample = success(0)
    sample = dataclasses.replace(sample, row=dataclasses.replace(sample.row, carried={"extra": value}))
    files = write(tmp_path, [sample], pa.schema([("extra", kind)]))
    (read,) = shards.read_samples(files.tar)
    found = read["json"].get("extra")
    assert found == expected
    assert type(found) is type(expected)
    assert ("extra" in read["json"]) == (expected is not None), "a null is left out"
    assert dense(pa.array([found], row_json.json_type(kind)).to_pylist()) == [expected]


def test_carried_values_may_be_arrow_scalars_with_bytes_that_are_not_text(tmp_path: Path) -> None:
    """One bad row never costs another one."""
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"a\xff"]).buffers())[0]
    sample = success(0)
    row = dataclasses.replace(sample.row, carried={"text": broken, "time": pa.scalar(1, pa.timestamp("ns"))})
    carried = pa.schema([("text", pa.string()), ("time", pa.timestamp("ns"))])
    files = write(tmp_path, [dataclasses.replace(sample, row=row)], carried)
    (read,) = shards.read_samples(files.tar)
    assert read["json"]["text"] == "a\ufffd"
    assert read["json"]["time"].endswith(".000000001")


def test_dictionaries_within_lists_and_structs_are_handed_through(tmp_path: Path) -> None:
    """What pyarrow joins wrongly, out of one batch for each row, is whole in the parquet."""
    kind = pa.list_(pa.struct([("style", pa.dictionary(pa.int32(), pa.string())), ("none", pa.null())]))
    values = [None, [], [{"style": "mosaic", "none": None}, {"style": "oil", "none": None}], [None]]
    samples = [
        dataclasses.replace(one, row=dataclasses.replace(one.row, carried={"styles": value}))
        for one, value in zip(map(success, range(len(values))), values, strict=True)
    ]
    table = pq.read_table(write(tmp_path, samples, pa.schema([("styles", kind)])).parquet)
    table["styles"].validate(full=True)
    assert table["styles"].to_pylist() == values


def test_messages_show_what_cannot_be_printed(tmp_path: Path) -> None:
    files = write(tmp_path, [failed(0, "no such file: \udcff.png")])
    assert pq.read_table(files.parquet)["error_message"].to_pylist() == ["no such file: \\udcff.png"]


def test_carried_metadata_and_missing_values(tmp_path: Path) -> None:
    carried = pa.schema([pa.field("extra", pa.int64(), nullable=False, metadata={"a": "b"})], metadata={"pandas": "{}"})
    files = write(tmp_path, [success(0)], carried)
    table = pq.read_table(files.parquet)
    assert table["extra"].to_pylist() == [None]
    assert table.schema.metadata is None
    assert table.schema.field("extra").metadata is None


def test_a_carried_column_may_not_take_an_output_columns_name() -> None:
    with pytest.raises(ValueError, match="lpips"):
        sample_records.schema(pa.schema([("lpips", pa.float64())]), False)


def test_columns_and_types() -> None:
    found = sample_records.schema(pa.schema([("extra", pa.int8())]), reference_is_list=True)
    assert tuple(found.names) == (*columns_of(), "extra")
    asked = sample_records.schema(pa.schema([("extra", pa.int8())]), False, get_args(Extra))
    assert tuple(asked.names) == (*COLUMNS, "extra")
    assert found.field("reference").type == pa.list_(pa.string())
    assert sample_records.schema(NO_COLUMNS, False).field("reference").type == pa.string()
    assert {found.field(name).type for name in ("strength", "guidance_scale", "clip_score", "lpips")} == {pa.float64()}


# Bytes


def test_tar_members_have_no_times_owners_or_other_traces(tmp_path: Path) -> None:
    """Tars have fixed mtime, uid, order; timings, host names and dates live only in the receipt."""
    files = write(tmp_path, [success(0), failed(1), success(2, key="k" * 128)], image_format="webp")
    with tarfile.open(files.tar) as tar:
        members = tar.getmembers()
    keys = ["000000000", "k" * 128]
    assert [member.name for member in members] == [f"{key}.{end}" for key in keys for end in ("webp", "txt", "json")]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members} == {
        (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)
    }


def test_bytes_do_not_depend_on_process_or_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is not a function of worker count, arrival order, retries, resumes or node loss."""
    samples = [success(number) for number in range(5)]
    before = contents(write(tmp_path / "1", samples))
    monkeypatch.setattr("time.time", lambda: 4_000_000_000.0)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert contents(write(tmp_path / "2", samples)) == before


def test_large_shards_are_written_in_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the manifest: rows stream."""
    monkeypatch.setattr(shards, "ROWS_PER_GROUP", 4)
    files = write(tmp_path, [success(number) for number in range(10)])
    file = pq.ParquetFile(files.parquet)
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [4, 4, 2]
    assert file.read()["seed"].to_pylist() == list(range(10))


def test_finish_tells_what_the_receipt_says(tmp_path: Path) -> None:
    odd = success(1, scores=Scores(0.75, float("nan"), None))
    unsampled = dataclasses.replace(failed(2), status="rejected")
    gated = dataclasses.replace(unsampled, row=failed(3).row, attempts=(Draw(1, Scores()),))
    files = write(tmp_path, [success(0), odd, unsampled, gated, failed(4)])
    assert files.counts == {"success": 2, "rejected": 2, "failed": 1}
    assert files.sampled == 3
    absent = {"content_alignment": None, "style_similarity": None}
    assert files.means == {"clip_score": 0.5, "clip_reference": 0.5, "lpips": 0.75, **absent}
    assert files.entries == {"tar": storage.digest(files.tar), "parquet": storage.digest(files.parquet)}
    assert set(write(tmp_path / "none", [failed(0)]).means.values()) == {None}


# What the writer refuses


def test_a_row_never_disappears_from_its_shard(tmp_path: Path) -> None:
    """A row never disappears. Each manifest row ends as success, rejected or failed."""
    shard = Shard(1, 10, 13, "00001")
    with shards.ShardWriter(str(tmp_path), shard, "png", sample_records.schema(NO_COLUMNS, False)) as writer:
        writer.add(success(10))
        with pytest.raises(ValueError, match="expected row 11, got 12"):
            writer.add(success(12))
        writer.add(failed(11))
        with pytest.raises(ValueError, match="2 of its 3 rows"):
            writer.finish()
        writer.add(success(12))
        with pytest.raises(ValueError, match="rows 10 to 12"):
            writer.add(success(13))
        assert writer.finish().counts == {"success": 2, "rejected": 0, "failed": 1}


@pytest.mark.parametrize(
    "sample",
    [
        success(0, image=None),
        success(0, status="failed", error_message="x"),
        failed(0, ""),
        success(0, status="rejected"),
    ],
)
def test_samples_that_contradict_themselves_are_refused(tmp_path: Path, sample: Sample) -> None:
    with (
        shards.ShardWriter(
            str(tmp_path), Shard(0, 0, 1, "00000"), "png", sample_records.schema(NO_COLUMNS, False)
        ) as writer,
        pytest.raises(ValueError, match="000000000"),
    ):
        writer.add(sample)


def test_an_abandoned_shard_leaves_no_files(tmp_path: Path) -> None:
    """Nothing is ever half-written: an exception within the shard leaves nothing that looks whole."""

    def interrupted() -> None:
        with shards.ShardWriter(str(tmp_path), SHARD, "png", sample_records.schema(NO_COLUMNS, False)) as writer:
            writer.add(success(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_names_that_are_no_web_address_are_recorded_as_they_are(tmp_path: Path) -> None:
    """Two files stay two files in the column; what follows a ``?`` may be secret on the web alone."""
    names = ["q?x=1.png", "q?x=2.png", "s3://bucket/q?x=3.png", "http://host/q?x=4.png"]
    samples = [success(number) for number in range(len(names))]
    samples = [
        dataclasses.replace(each, row=dataclasses.replace(each.row, references=(Reference(name),)))
        for each, name in zip(samples, names, strict=True)
    ]
    found = pq.read_table(write(tmp_path, samples).parquet)["reference"].to_pylist()
    assert found == [*names[:3], "http://host/q?..."]


def test_a_full_scratch_disk_is_a_storage_error(tmp_path: Path) -> None:
    """Trouble of storage fails the attempt, never the row."""
    os.symlink("/dev/full", tmp_path / "00000.tar")
    with (
        pytest.raises(StorageError, match=r"No space left.*TMPDIR"),
        shards.ShardWriter(
            str(tmp_path), Shard(0, 0, 1, "00000"), "png", sample_records.schema(NO_COLUMNS, False)
        ) as writer,
    ):
        writer.add(success(0, image=b"x" * 1_000_000))
    assert os.listdir(tmp_path) == []


def test_a_tar_that_is_cut_is_noticed(tmp_path: Path) -> None:
    files = write(tmp_path, [success(0, image=b"x" * 5000), success(1)])
    data = Path(files.tar).read_bytes()
    Path(files.tar).write_bytes(data[:3000])
    with pytest.raises(tarfile.ReadError):
        list(shards.read_samples(files.tar))
    Path(files.tar).write_bytes(io.BytesIO(b"not a tar" * 1000).getvalue())
    with pytest.raises(tarfile.ReadError):
        list(shards.read_samples(files.tar))


def test_neither_torch_nor_ray_is_imported() -> None:
    """``shards`` and ``storage`` import neither torch nor ray."""
    code = (
        "import sys, vcf_batch.output.shards;"
        "sys.exit(bool({'torch', 'ray', 'diffusers', 'webdataset'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
