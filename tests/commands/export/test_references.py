"""References on their way out: no path of this machine leaves, and copies are there once, by their hashes."""

import hashlib
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support import exports, runs
from vcf_batch.commands.export.check import ExportCheck
from vcf_batch.errors import UsageError


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def output(folder: Path, references: list[object], roots: tuple[str, ...] = (), **columns: list[object]) -> Path:
    """An output of one shard whose manifest has these references."""
    manifest = runs.write_manifest(folder / "in", len(references), {"reference": references, **columns})
    runs.write_output(manifest, folder / "out", 100, reference_root=roots)
    return folder / "out"


def test_no_path_of_this_machine_leaves(tmp_path: Path) -> None:
    """Names under the manifest's folder or a root become relative, of another path the last part stays, URLs stay."""
    root = tmp_path / "root"
    given: list[object] = [
        "reference0.png",
        str(tmp_path / "in/more/reference1.png"),
        f"file://{tmp_path}/in/reference2.png",
        str(root / "deep/a.png"),
        "/elsewhere/of/somebody/b.png",
        "s3://bucket/c.png",
        None,
    ]
    source = output(tmp_path, given, (str(root),), negative_reference=[str(tmp_path / "in/n.png")] * 7)
    exports.make(tmp_path / "t", source, split="train=1")
    rows = exports.rows(tmp_path / "t")
    assert [row["reference"] for row in rows] == [
        "reference0.png",
        "more/reference1.png",
        "reference2.png",
        "deep/a.png",
        "b.png",
        "s3://bucket/c.png",
        None,
    ]
    assert {row["negative_reference"] for row in rows} == {"n.png"}
    assert all(str(tmp_path).encode() not in data for data in exports.tree(tmp_path / "t").values())


def test_a_folder_may_be_the_manifest(tmp_path: Path) -> None:
    """Names are then relative to it, and the same reference has the same name, however a manifest spells it."""
    source = output(tmp_path, [str(tmp_path / "in/x/a.png"), "x/a.png"])
    run = json.loads((source / "run.json").read_text())
    run["config"]["manifest"] = run["manifest"]["url"] = str(tmp_path / "in")
    (source / "run.json").write_text(json.dumps(run))
    exports.make(tmp_path / "t", source, split="train=1")
    assert [row["reference"] for row in exports.rows(tmp_path / "t")] == ["x/a.png", "x/a.png"]


def test_copies_are_there_once(tmp_path: Path) -> None:
    """Named by their hash and kind, whatever they were called; rows name their paths and their hashes."""
    (tmp_path / "in").mkdir()
    for number, name in ((1, "same.jpg"), (2, "n.png")):
        (tmp_path / "in" / name).write_bytes(runs.png(number))
    given: list[object] = ["reference0.png", "reference1.png", "same.jpg", None]
    source = output(tmp_path, given, negative_reference=[None, None, "n.png", None])
    exports.make(tmp_path / "t", source, split="train=1", references="copy")
    zero, one, two = (sha256(tmp_path / f"in/reference{number}.png") for number in range(3))
    paths = {each: f"references/{each[:2]}/{each}.png" for each in (zero, one, two)}
    rows = exports.rows(tmp_path / "t")
    assert [row["reference"] for row in rows] == [paths[zero], paths[one], paths[one], None]
    assert [row["reference_sha256"] for row in rows] == [zero, one, one, None]
    assert rows[2]["negative_reference"] == paths[two]
    there = {path: data for path, data in exports.tree(tmp_path / "t").items() if path.startswith("references/")}
    assert exports.hashes(there) == {path: each for each, path in paths.items()}
    assert [*ExportCheck(str(tmp_path / "t")).findings()] == []


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("lost", ["reference", "negative_reference"])
def test_a_lost_copy_is_told_and_the_same_export_puts_it_back(tmp_path: Path, lost: str, lists: bool) -> None:
    given: list[object] = ["reference0.png", "reference1.png", None]
    given = [each and [each] for each in given] if lists else given
    source = output(tmp_path, given, negative_reference=[None, None, "reference2.png"])
    exports.make(tmp_path / "t", source, split="train=1", references="copy")
    whole = exports.tree(tmp_path / "t")
    [name] = [row[lost] for row in exports.rows(tmp_path / "t") if row[lost]][-1:]
    (tmp_path / "t" / (name[0] if isinstance(name, list) else name)).unlink()
    assert "which is not there" in "".join(map(str, ExportCheck(str(tmp_path / "t")).findings()))
    exports.make(tmp_path / "t", source, split="train=1", references="copy")
    assert exports.tree(tmp_path / "t") == whole


def test_a_damaged_shard_is_written_again_with_its_copies(tmp_path: Path) -> None:
    """Damage that keeps the size of a parquet is met where its references are looked up."""
    source = output(tmp_path, ["reference0.png", None])
    exports.make(tmp_path / "t", source, split="train=1", references="copy")
    whole = exports.tree(tmp_path / "t")
    parquet = next((tmp_path / "t/train").glob("*.parquet"))
    parquet.write_bytes(bytes(parquet.stat().st_size))
    exports.make(tmp_path / "t", source, split="train=1", references="copy")
    assert exports.tree(tmp_path / "t") == whole


def test_lists_and_embedded_references_are_copied(tmp_path: Path) -> None:
    """A row with several references names each; bytes in the manifest are references too."""
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    data = runs.png(7)
    for number, (column, wanted) in enumerate(
        (
            (pa.array([["reference0.png", "reference1.png"], None]), 2),
            (pa.array([{"bytes": data, "path": None}, {"bytes": data, "path": "x.png"}], image), 1),
            (pa.array([[{"bytes": data, "path": None}], None], pa.large_list(image)), 1),
        )
    ):
        folder = tmp_path / str(number)
        manifest = runs.write_manifest(folder / "in", 2)
        table = pq.read_table(manifest)
        pq.write_table(table.set_column(table.schema.get_field_index("reference"), "reference", column), manifest)
        runs.write_output(manifest, folder / "out", 100)
        exports.make(folder / "t", folder / "out", split="train=1", references="copy")
        assert len([*(folder / "t/references").glob("*/*.png")]) == wanted
        first = exports.rows(folder / "t")[0]
        names = first["reference"] if isinstance(first["reference"], list) else [first["reference"]]
        assert all((folder / "t" / name).is_file() for name in names)
        assert [*ExportCheck(str(folder / "t")).findings()] == []


@pytest.mark.parametrize("references", ["relative", "copy"])
def test_a_reference_is_taken_down_by_its_hash(tmp_path: Path, references: str) -> None:
    """Rows that were made with it are left out, whatever its name, though the outputs have no hashes."""
    source = output(tmp_path, [f"reference{row % 3}.png" for row in range(9)])
    shutil.copy(tmp_path / "in/reference1.png", tmp_path / "in/reference2.png")
    gone = sha256(tmp_path / "in/reference1.png")
    where = f"reference_sha256 NOT IN ('{gone}')"
    exports.make(tmp_path / "t", source, split="train=1", where=where, references=references)
    rows = exports.rows(tmp_path / "t")
    assert [row["key"] for row in rows] == ["000000000", "000000003", "000000006"]
    assert {row["reference_sha256"] for row in rows} == {sha256(tmp_path / "in/reference0.png")}
    assert not [*(tmp_path / "t").rglob(f"*{gone}*")]


@pytest.mark.parametrize("kind", [pa.large_list(pa.large_string()), pa.list_(pa.string(), 1)])
@pytest.mark.parametrize("references", ["relative", "copy"])
def test_a_reference_is_taken_down_by_its_hash_whatever_kind_of_list_has_it(
    tmp_path: Path, references: str, kind: pa.DataType
) -> None:
    """polars writes every list as a large one."""
    zero = hashlib.sha256(runs.png(0)).hexdigest()
    one = hashlib.sha256(runs.png(1)).hexdigest()
    hashes = pa.array([[zero], [one]], kind)
    source = output(tmp_path, [["reference0.png"], ["reference1.png"]], reference_sha256=hashes)  # type: ignore[arg-type]
    where = f"NOT list_contains(reference_sha256, '{one}')"
    exports.make(tmp_path / "t", source, split="train=1", where=where, references=references)
    assert [(row["key"], row["reference_sha256"]) for row in exports.rows(tmp_path / "t")] == [("000000000", [zero])]
    assert [*ExportCheck(str(tmp_path / "t")).findings()] == []


def test_embedded_images_without_a_path_are_references_by_their_hash(tmp_path: Path) -> None:
    """Datasets that were made in memory have no paths. The same bytes are one reference, and stay in one split."""
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pictures = [runs.png(row % 3) for row in range(60)]
    given = pa.array([{"bytes": data, "path": None} for data in pictures], image)
    source = output(tmp_path, given, prompt=[f"prompt {row}" for row in range(60)])  # type: ignore[arg-type]
    exports.make(tmp_path / "t", source, split="train=0.5,test=0.5", split_by="reference")
    rows = {split: exports.rows(tmp_path / "t", split) for split in ("train", "test")}
    names = {split: {row["reference"] for row in found} for split, found in rows.items()}
    assert not names["train"] & names["test"]
    digests = {f"sha256:{hashlib.sha256(data).hexdigest()}" for data in pictures}
    assert names["train"] | names["test"] == digests


def test_a_reference_that_is_gone_is_told(tmp_path: Path) -> None:
    """With the row and the remedy, and so is a manifest that is gone; names need neither."""
    source = output(tmp_path, ["reference0.png", "reference1.png"])
    (tmp_path / "in/reference1.png").unlink()
    with pytest.raises(UsageError) as caught:
        exports.make(tmp_path / "t", source, split="train=1", references="copy")
    assert "row '000000001' of " in str(caught.value) and "'reference1.png' does not exist" in str(caught.value)
    assert "leave the row out with --exclude, or hand on names alone with --references relative" in str(caught.value)
    shutil.rmtree(tmp_path / "in")
    for given in ({"references": "copy"}, {"where": "reference_sha256 != 'a'"}):
        with pytest.raises(UsageError, match="is needed to find references, and cannot be read"):
            exports.make(tmp_path / "u", source, split="train=1", **given)
    exports.make(tmp_path / "u", source, split="train=1")
