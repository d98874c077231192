"""A manifest is read by its footers, checked once in bounded memory, and its rows come by row groups."""

import io
import itertools
import json
import os
import pickle
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcf_batch import storage
from vcf_batch.errors import ManifestError, RefusedError, StorageError
from vcf_batch.manifest import check, contents, parquet
from vcf_batch.manifest import manifest as reader
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.records import Reference
from vcf_batch.storage.resilient_file import ResilientFile


def write(path: Path, row_group_size: int | None = None, **columns: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return str(path)


def numbered(start: int, stop: int) -> dict[str, list[Any]]:
    numbers = range(start, stop)
    return {"prompt": [f"cat {n}" for n in numbers], "sample_id": [f"id-{n}" for n in numbers], "n": list(numbers)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files of 10, 0 and 15 rows in small row groups, and files that are none of the manifest's."""
    write(tmp_path / "m" / "a.parquet", 4, **numbered(0, 10))
    pq.write_table(pa.table(numbered(0, 1)).slice(0, 0), tmp_path / "m" / "b.parquet")
    write(tmp_path / "m" / "c.parquet", 6, **numbered(10, 25))
    for name in ("_SUCCESS", ".a.parquet.crc", "_metadata.parquet", "notes.txt", "deeper/d.parquet"):
        path = tmp_path / "m" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"junk")
    return tmp_path / "m"


def test_a_folder_is_its_files_in_the_order_of_their_names(folder: Path) -> None:
    opened = Manifest.open(str(folder))
    assert (opened.num_rows, opened.base) == (25, str(folder))
    rows = opened.rows(0, 25, run_seed=0)
    assert [row.carried["n"] for row in rows] == [row.number for row in rows] == list(range(25))
    assert [row.key for row in rows] == [f"id-{n}" for n in range(25)]
    assert opened.locate(10) == "row 0 of c.parquet"
    opened.check()


def test_a_file_resolves_references_against_its_folder(folder: Path) -> None:
    opened = Manifest.open(str(folder / "c.parquet"))
    assert (opened.num_rows, opened.base) == (15, str(folder))
    assert opened.rows(0, 1, 0)[0].prompt == "cat 10"


@settings(deadline=None, max_examples=60)
@given(cuts=st.lists(st.integers(0, 25), min_size=0, max_size=6), limit=st.none() | st.integers(1, 40))
def test_rows_are_the_same_in_any_slices(
    cuts: list[int], limit: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "slices"
    if not path.exists():
        write(path / "a.parquet", 4, **numbered(0, 10))
        write(path / "b.parquet", 7, **numbered(10, 25))
    opened = Manifest.open(str(path), limit)
    stops = sorted(min(cut, opened.num_rows) for cut in [*cuts, 0, opened.num_rows])
    parts = [row for start, stop in itertools.pairwise(stops) for row in opened.rows(start, stop, 3)]
    assert parts == opened.rows(0, opened.num_rows, 3)
    assert [row.carried["n"] for row in parts] == list(range(min(25, limit or 25)))


def test_only_the_needed_row_groups_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the manifest: rows stream."""
    noise = [random.Random(n).randbytes(250).hex() for n in range(8000)]
    url = write(tmp_path / "m.parquet", 100, prompt=noise)
    opened = Manifest.open(url)
    taken = 0

    class Counting(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            nonlocal taken
            data = super().read(-1 if size is None else size)
            taken += len(data)
            return data

    monkeypatch.setattr(storage, "open_read", lambda url: Counting(url))
    assert [row.prompt for row in opened.rows(4050, 4060, 0)] == noise[4050:4060]
    assert taken < (tmp_path / "m.parquet").stat().st_size / 10


def test_embedded_images_are_read_in_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_ROWS_PER_READ", 7)
    images = [{"bytes": bytes([n]) * 1000, "path": f"{n}.png"} for n in range(40)]
    opened = Manifest.open(write(tmp_path / "m.parquet", prompt=["a cat"] * 40, reference=images))
    rows = opened.rows(20, 30, 0)
    assert [row.references for row in rows] == [(Reference(f"{n}.png", bytes([n]) * 1000),) for n in range(20, 30)]
    assert opened.carried_schema == pa.schema([])
    assert not opened.reference_is_list


@pytest.mark.parametrize(
    "kind", [pa.null(), pa.string(), pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))]
)
def test_whether_there_are_references(tmp_path: Path, kind: pa.DataType) -> None:
    nothing = pa.array([None, None], kind)
    assert not Manifest.open(write(tmp_path / "none.parquet", prompt=["a", "b"])).has_any("reference")
    assert not Manifest.open(write(tmp_path / "null.parquet", prompt=["a", "b"], reference=nothing)).has_any(
        "reference"
    )
    if not pa.types.is_null(kind):
        value = "a.png" if kind == pa.string() else [{"bytes": b"x", "path": None}]
        some = pa.array([None, value], kind)
        assert Manifest.open(write(tmp_path / "some.parquet", 1, prompt=["a", "b"], reference=some)).has_any(
            "reference"
        )


def test_negative_references_are_references(tmp_path: Path) -> None:
    """They need a model that takes images, and are looked at before it is loaded."""
    opened = Manifest.open(write(tmp_path / "m.parquet", prompt=["a", "b"], negative_reference=[None, "n.png"]))
    assert opened.has_any("negative_reference") and not opened.has_any("reference")
    assert [row.images for row in opened.rows(0, 2, 0)] == [(), (Reference("n.png"),)]
    plain = Manifest.open(write(tmp_path / "p.parquet", prompt=["a"], reference=["a.png"]))
    assert plain.has_any("reference") and not plain.has_any("negative_reference")


def test_lists_of_references(tmp_path: Path) -> None:
    kinds = pa.array([["a.png", "b.png"], [], None], pa.list_(pa.string()))
    opened = Manifest.open(write(tmp_path / "m.parquet", prompt=["x"] * 3, reference=kinds))
    assert opened.reference_is_list
    assert [len(row.references) for row in opened.rows(0, 3, 0)] == [2, 0, 0]


def test_images_as_datasets_writes_them(tmp_path: Path) -> None:
    """The ``reference`` column may be struct<bytes, path> as Hugging Face ``datasets`` writes images."""
    datasets = pytest.importorskip("datasets")
    image_module = pytest.importorskip("PIL.Image")
    features = datasets.Features({"prompt": datasets.Value("string"), "reference": datasets.Image()})
    images = [image_module.new("RGB", (3, 2), "red"), None]
    datasets.Dataset.from_dict({"prompt": ["a", "b"], "reference": images}, features).to_parquet(tmp_path / "m.parquet")
    opened = Manifest.open(str(tmp_path / "m.parquet"))
    with_image, text_only = opened.rows(0, 2, 0)
    assert with_image.references[0].data is not None
    assert with_image.references[0].data.startswith(b"\x89PNG")
    assert text_only.references == ()
    assert text_only.error is None


def test_a_url_and_a_path_are_the_same_manifest(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("a.parquet", "b.parquet", "c.parquet"):
        memory.pipe_file(f"/manifest-test/{name}", (folder / name).read_bytes())
    here, there = Manifest.open(str(folder)), Manifest.open("memory://manifest-test")
    assert there.identity == here.identity
    assert there.base == "memory://manifest-test"
    assert there.rows(3, 17, 0) == here.rows(3, 17, 0)
    assert Manifest.open("memory://manifest-test/c.parquet").num_rows == 15
    there.check()


def test_identity_names_the_content(folder: Path) -> None:
    whole = Manifest.open(str(folder))
    assert Manifest.open(str(folder), limit=25).identity == whole.identity
    write(folder / "c.parquet", 6, **numbered(11, 26))
    assert Manifest.open(str(folder)).identity != whole.identity


PLAIN = {"compression": "none", "use_dictionary": False, "write_statistics": False}
"""Options that leave no trace of the rows in a file's footer."""


@pytest.mark.parametrize("place", ["local", "s3"])
@pytest.mark.parametrize("change", ["shuffled", "edited", "carried"])
def test_identity_covers_every_row(tmp_path: Path, change: str, place: str, request: pytest.FixtureRequest) -> None:
    """A manifest of other rows has another identity, even if the footers are equal to the byte."""
    prompts, notes = [f"a cat {n}" for n in range(10)], [f"note {n}" for n in range(10)]
    before = pa.table({"prompt": prompts, "note": notes})
    pq.write_table(before, tmp_path / "m.parquet", **PLAIN)
    data = (tmp_path / "m.parquet").read_bytes()
    if change == "shuffled":
        after = before.take(list(reversed(range(10))))
    else:
        after = pa.table(
            {
                "prompt": [prompts[0], "a dog 1", *prompts[2:]] if change == "edited" else prompts,
                "note": [*notes[:9], "note X"] if change == "carried" else notes,
            }
        )
    pq.write_table(after, tmp_path / "n.parquet", **PLAIN)
    other = (tmp_path / "n.parquet").read_bytes()
    assert parquet.read_footer(str(tmp_path / "m.parquet")) == parquet.read_footer(str(tmp_path / "n.parquet"))
    url = str(tmp_path / "m.parquet")
    if place == "s3":
        url = f"{request.getfixturevalue('s3')}/identity-{change}/m.parquet"
    storage.publish_bytes(url, data)
    opened = Manifest.open(url)
    assert len(opened.rows(0, 10, 0)) == 10
    time.sleep(0.02)
    storage.publish_bytes(url, other)
    assert Manifest.open(url).identity != opened.identity
    # The rows of a run that has begun are not mixed with others either.
    with pytest.raises(RefusedError, match=r"m\.parquet has changed: .* must not change during a run"):
        opened.rows(0, 10, 0)


def test_identity_covers_the_rows_in_use(tmp_path: Path) -> None:
    """``--limit`` neither reads nor hashes row groups behind its rows."""
    prompts = [f"a cat {n}" for n in range(10)]
    url = str(tmp_path / "m.parquet")
    identities = []
    for edited in (None, 1, 8):
        rows = ["a dog 0" if n == edited else prompt for n, prompt in enumerate(prompts)]
        pq.write_table(pa.table({"prompt": rows}), url, row_group_size=4, **PLAIN)
        identities.append([Manifest.open(url, limit).identity for limit in (3, 4, 5, 8, 9, 10, 11, None)])
    before, early, late = identities
    assert not set(early) & set(before)
    assert [now == then for now, then in zip(late, before, strict=True)] == [True] * 4 + [False] * 4


def test_image_bytes_are_neither_read_nor_in_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a manifest with embedded images does not read them: they may be hundreds of gigabytes."""
    url = str(tmp_path / "m.parquet")

    def identity(image: int, path: str, thumbnail: int, note: str) -> str:
        images = [[{"bytes": bytes([image]) * 100_000, "path": path}]] * 10
        columns = {
            "prompt": ["a cat"] * 10,
            "reference": images,
            "thumbnail": [bytes([thumbnail]) * 100_000] * 10,
            "note": [note] * 10,
        }
        pq.write_table(pa.table(columns), url, row_group_size=4, **PLAIN)
        return Manifest.open(url).identity

    taken = 0
    read = ResilientFile.read

    def counting(self: ResilientFile, size: int | None = -1, /) -> bytes:
        nonlocal taken
        data = read(self, size)
        taken += len(data)
        return data

    monkeypatch.setattr(ResilientFile, "read", counting)
    first = identity(1, "a.png", 1, "x")
    assert taken < 100_000 < Path(url).stat().st_size
    assert identity(2, "a.png", 2, "x") == first
    assert identity(1, "b.png", 1, "x") != first
    assert identity(1, "a.png", 1, "y") != first


def test_a_file_of_known_version_is_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume takes the hash of a file from ``run.json`` as long as the file is as it was, by size, dates, inode."""
    url = write(tmp_path / "m.parquet", prompt=["a", "b"])
    young = Manifest.open(url).versions
    assert young["m.parquet"].stamp is None, "a later write may have the date of a file that is just being written"
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 10)
    opened = Manifest.open(url)
    hashed: list[str] = []
    sha256 = contents.sha256

    def counting(url: str, *others: Any) -> str:
        hashed.append(url)
        return sha256(url, *others)

    monkeypatch.setattr(contents, "sha256", counting)
    assert Manifest.open(url, known=opened.versions).identity == opened.identity
    assert not hashed
    assert Manifest.open(url, known=young).identity == opened.identity
    os.utime(url, (1e9, 1e9))
    assert Manifest.open(url, known=opened.versions).identity == opened.identity
    assert len(opened.rows(0, 2, 0)) == 2, "a file that is only touched stays the same"
    assert len(hashed) == 3


@pytest.mark.parametrize("way", ["in place", "by another file"])
def test_an_edit_of_equal_size_and_date_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """As ``rsync --times`` and reproducible builds leave it. The date of a file is what its writer says; the time of
    the last change of its inode is not.
    """
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 10)
    url = write(tmp_path / "m.parquet", prompt=["a", "b"])
    opened, status = Manifest.open(url), Path(url).stat()
    edited = Path(write(tmp_path / "edited.parquet", prompt=["a", "c"]))
    assert edited.stat().st_size == status.st_size
    if way == "in place":
        Path(url).write_bytes(edited.read_bytes())
        edited.unlink()
    else:
        edited.replace(url)
    os.utime(url, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert Manifest.open(url, known=opened.versions).identity != opened.identity


@pytest.mark.parametrize("name", ["sample_id", "batch"])
def test_the_identity_covers_uuids(tmp_path: Path, name: str) -> None:
    """They are stored as bytes, as images may be, but are ids or carried."""

    def identity(order: list[int]) -> str:
        uuids = pa.array([bytes([number]) * 16 for number in order], pa.uuid())
        pq.write_table(pa.table({"prompt": ["a", "b"], name: uuids}), tmp_path / "m.parquet", compression="none")
        return Manifest.open(str(tmp_path / "m.parquet")).identity

    assert len({identity([1, 2]), identity([2, 1]), identity([1, 3])}) == 3


def test_a_file_that_is_replaced_while_it_is_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its footer and its contents, by one of equal size."""
    url = write(tmp_path / "m.parquet", prompt=["a", "b"])
    other = Path(write(tmp_path / "other.parquet", prompt=["a", "c"]))
    sha256 = contents.sha256

    def replacing(*given: Any) -> str:
        if other.exists():
            os.utime(other, (1e9, 1e9))
            other.replace(url)
        return sha256(*given)

    monkeypatch.setattr(contents, "sha256", replacing)
    with pytest.raises(ManifestError, match="was written while it was read"):
        Manifest.open(url)


def test_a_hash_over_fewer_rows_is_not_taken_for_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit, the row groups of a file that are hashed depend on the files before it."""
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 10)
    for name in ("a", "b"):
        table = pa.table({"prompt": [f"{name} {number}" for number in range(4)]})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    half = Manifest.open(str(tmp_path), limit=6)
    assert [version.groups for version in half.versions.values()] == [2, 1]
    whole = Manifest.open(str(tmp_path), limit=8)
    assert whole.versions["a.parquet"] == half.versions["a.parquet"]
    assert Manifest.open(str(tmp_path), limit=8, known=half.versions).identity == whole.identity


def test_a_manifest_travels_to_workers_small(folder: Path) -> None:
    opened = Manifest.open(str(folder), limit=12)
    pickled = pickle.dumps(opened)
    assert len(pickled) < 4000
    assert pickle.loads(pickled).rows(8, 12, 0) == opened.rows(8, 12, 0)


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        (["data/train-0.parquet", "README.md"], "its sub-folders do: name {}/data$"),
        (
            ["split=test/0.parquet", "split=train/0.parquet"],
            "split=test are partitions, .* name one, {}/split=test or {}/",
        ),
        (["data-0.arrow", "state.json"], r"datasets\.load_from_disk\('{}'\)\.to_parquet"),
        (["dataset_dict.json", "train/data-0.arrow"], r"datasets\.load_from_disk\('{}/train'\)\.to_parquet"),
        (["notes.txt", "_temporary/0.parquet"], "a manifest is a Parquet file"),
    ],
)
def test_a_folder_of_another_layout_is_refused_with_the_path_that_works(
    tmp_path: Path, files: list[str], advice: str
) -> None:
    for url in (str(tmp_path / "m"), f"memory://{tmp_path.name}"):
        for name in files:
            storage.publish_bytes(storage.join(url, name), b"x")
        with pytest.raises(ManifestError, match=advice.replace("{}", re.escape(url))):
            Manifest.open(url)


def test_limit_uses_and_checks_the_first_rows_only(tmp_path: Path) -> None:
    url = write(tmp_path / "m.parquet", prompt=["a", "b", "", None], sample_id=["x", "y", "x", "z"])
    opened = Manifest.open(url, limit=2)
    opened.check()
    assert opened.num_rows == len(opened.rows(0, 2, 0)) == 2
    with pytest.raises(ValueError, match="the manifest has 0 to 2"):
        opened.rows(0, 3, 0)


def test_check_names_file_column_and_first_offending_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", prompt=["ok", None, "", " \u3000"], sample_id=["1", "2", "3", "4"])
    write(tmp_path / "b.parquet", prompt=["ok"] * 7, sample_id=["../5", "6", None, *["a b"] * 4])
    with pytest.raises(ManifestError) as refused:
        Manifest.open(str(tmp_path)).check()
    lines = str(refused.value).splitlines()
    assert lines[0].startswith(str(tmp_path))
    assert lines[1:] == [
        "  column 'prompt': 1 row is null (every row needs a value), first: row 1 of a.parquet",
        "  column 'prompt': 2 rows are empty (every row needs a prompt), first: row 2 of a.parquet; row 3 of a.parquet",
        "  column 'sample_id': 1 row is null (every row needs a value), first: row 2 of b.parquet",
        (
            "  column 'sample_id': 5 rows are unsafe (an id is 1 to 128 of the characters A-Z a-z 0-9 _ -), first: "
            "row 0 of b.parquet ('../5'); row 3 of b.parquet ('a b'); row 4 of b.parquet ('a b'); "
            "row 5 of b.parquet ('a b'); row 6 of b.parquet ('a b')"
        ),
    ]


def test_check_names_both_rows_of_a_repeated_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniqueness of ids is checked in bounded memory: through hash partitions, also across files."""
    monkeypatch.setattr(check, "ROWS_PER_PARTITION", 10)
    write(tmp_path / "a.parquet", 5, **numbered(0, 60))
    write(tmp_path / "b.parquet", 5, **numbered(57, 90))
    with pytest.raises(ManifestError) as refused:
        Manifest.open(str(tmp_path)).check()
    assert str(refused.value).splitlines()[1] == (
        "  column 'sample_id': 3 rows are repeated (every id must be unique), first: "
        "row 0 of b.parquet ('id-57', as row 57 of a.parquet); row 1 of b.parquet ('id-58', as row 58 of a.parquet); "
        "row 2 of b.parquet ('id-59', as row 59 of a.parquet)"
    )


def test_check_leaves_trouble_of_single_rows_to_the_rows(tmp_path: Path) -> None:
    """One bad row never costs another one: what fails a row does not refuse the manifest."""
    array = pa.array([b"ok", b"\xff", b"a\0b", b"x" * 200_000], pa.binary())
    prompts = pa.Array.from_buffers(pa.string(), len(array), array.buffers())
    opened = Manifest.open(write(tmp_path / "m.parquet", prompt=prompts, strength=[float("nan"), 1, 1, 1]))
    opened.check()
    errors = [row.error or "" for row in opened.rows(0, 4, 0)]
    assert [error.split()[:2] for error in errors] == [
        ["strength", "is"], ["prompt", "cannot"], ["prompt", "has"], ["prompt", "has"],
    ]  # fmt: skip


def test_blank_prompts_are_found_beside_text_that_is_not_utf8(tmp_path: Path) -> None:
    array = pa.array([b"ok", b"\xff", b" \t"], pa.binary())
    prompts = pa.Array.from_buffers(pa.string(), len(array), array.buffers())
    with pytest.raises(ManifestError, match=r"1 row is empty .* row 2 of m\.parquet"):
        Manifest.open(write(tmp_path / "m.parquet", prompt=prompts)).check()


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_every_encoding_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    texts = (
        pa.array(["one", "two"]).cast(kind)
        if not pa.types.is_dictionary(kind)
        else pa.array(["one", "two"]).dictionary_encode()
    )
    opened = Manifest.open(write(tmp_path / "m.parquet", prompt=texts, sample_id=texts, reference=texts))
    opened.check()
    row = opened.rows(1, 2, 0)[0]
    assert (row.prompt, row.key, row.references) == ("two", "two", (Reference("two"),))


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "m.parquet", prompt=[f"{n} cats" for n in range(5000)]))
    data = bytearray(path.read_bytes())
    data[4:2000] = bytes(1996)
    path.write_bytes(data)
    opened = Manifest.open(str(path))
    for read in (opened.check, lambda: opened.rows(0, 10, 0)):
        with pytest.raises(ManifestError, match=r"m\.parquet is damaged: "):
            read()


def test_a_manifest_that_changes_is_refused(tmp_path: Path) -> None:
    url = write(tmp_path / "m.parquet", prompt=["a"])
    opened = Manifest.open(url)
    write(tmp_path / "m.parquet", prompt=["a", "b"])
    with pytest.raises(RefusedError, match="must not change during a run"):
        opened.rows(0, 1, 0)
    Path(url).unlink()
    with pytest.raises(StorageError, match="cannot read the manifest's file"):
        opened.rows(0, 1, 0)


def test_trouble_of_storage_stays_trouble_of_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trouble of storage fails the attempt, never the row, and does not count as a damaged manifest."""
    opened = Manifest.open(write(tmp_path / "m.parquet", prompt=["a"] * 10))

    class Failing(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise StorageError("connection reset")

    def open_failing(url: str) -> BinaryIO:
        return Failing(url)  # type: ignore[return-value]

    monkeypatch.setattr(storage, "open_read", open_failing)
    with pytest.raises(StorageError, match="connection reset"):
        opened.rows(0, 1, 0)
    with pytest.raises(StorageError, match="connection reset"):
        opened.check()


def test_credentials_are_not_repeated() -> None:
    with pytest.raises(ManifestError) as refused:
        Manifest.open("memory://user:secret@nowhere/m.parquet")
    assert "secret" not in str(refused.value)


def test_neither_torch_nor_ray_is_imported() -> None:
    """``plan``, ``manifest``, ``records``, ``config``, ``storage`` import neither torch nor ray."""
    code = (
        "import json, sys;"
        "import vcf_batch.manifest.manifest, vcf_batch.sharding, vcf_batch.manifest.contract;"
        "import vcf_batch.config.fingerprint;"
        "print(json.dumps([name for name in ('torch', 'ray', 'diffusers', 'transformers') if name in sys.modules]))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == []


def test_a_manifest_that_is_still_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is edited while it is hashed is not taken for either version."""
    url = str(tmp_path / "m.parquet")
    pq.write_table(pa.table({"prompt": ["a cat"] * 9}), url, **PLAIN)
    sha256 = contents.sha256

    def edited(*arguments: Any) -> str:
        found = sha256(*arguments)
        pq.write_table(pa.table({"prompt": ["a dog"] * 9}), url, **PLAIN)
        os.utime(url, (2e9, 2e9))
        return found

    monkeypatch.setattr(contents, "sha256", edited)
    with pytest.raises(ManifestError, match=r"m\.parquet was written while it was read"):
        Manifest.open(url)


@pytest.mark.parametrize("limit", [None, 5])
def test_a_damaged_footer_of_a_manifest_with_images_never_ends_the_process(tmp_path: Path, limit: int | None) -> None:
    """The places of columns are read from a footer that nobody vouches for: it is usable, or refused."""
    path = tmp_path / "m.parquet"
    images = [{"bytes": b"x" * 50, "path": "x.png"}] * 9
    pq.write_table(pa.table({"prompt": ["a"] * 9, "reference": images}), path, row_group_size=4, store_schema=False)
    good = path.read_bytes()
    refused = 0
    for at in range(len(good) - 8 - int.from_bytes(good[-8:-4], "little"), len(good) - 8):
        path.write_bytes(good[:at] + b"\x7f" + good[at + 1 :])
        try:
            Manifest.open(str(path), limit)
        except ManifestError:
            refused += 1
    assert refused > 30
