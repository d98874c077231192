"""An export has the rows that are asked for, once each, with the bytes of their images; or it says why not."""

import errno
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from support import exports, runs
from vcf_batch import storage
from vcf_batch.cli import main
from vcf_batch.commands.export import settings as options
from vcf_batch.commands.export.check import ExportCheck
from vcf_batch.commands.export.shard_files import OpenShard
from vcf_batch.commands.export.sources import Sources
from vcf_batch.commands.push import ABANDONED_SECONDS
from vcf_batch.errors import DamageFound, RefusedError, StorageError, Unfinished, UsageError
from vcf_batch.output import receipts
from vcf_batch.storage import local

ROWS = 24
FAILED, REJECTED = 3, 11


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows in four shards, two of them without an image, with triplets. It is not changed."""
    folder = tmp_path_factory.mktemp("source")
    manifest = runs.write_manifest(folder / "in", ROWS)
    runs.write_output(manifest, folder / "out", 7, failed={FAILED}, rejected={REJECTED}, triplets=True)
    return folder / "out"


def another(folder: Path, prefix: str = "b", rows: int = 6, **options: Any) -> Path:
    """An output of a run with keys of its own."""
    keys = {"sample_id": [f"{prefix}{row}" for row in range(rows)]}
    runs.write_output(runs.write_manifest(folder / "in", rows, keys), folder / "out", 4, **options)
    return folder / "out"


def damage(target: Path | str) -> list[str]:
    return [str(finding) for finding in ExportCheck(str(target)).findings()]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("format", options.EXPORT_FORMATS)
def test_an_export_has_each_row_with_an_image_once(output: Path, tmp_path: Path, format: str) -> None:
    """In the order of the outputs, in splits, with run and key; images are those of the outputs, byte for byte."""
    second = another(tmp_path, triplets=True)
    done = exports.make(tmp_path / "t", output, second, format=format, images=("content", "style"), shard_bytes=60_000)
    assert damage(tmp_path / "t") == []
    assert done.shards["train"] > 1 and done.record.left_out == {"without an image": 2}
    sources = [row for each in (output, second) for row in runs.rows_of(each) if row["status"] == "success"]
    train, validation = (exports.rows(tmp_path / "t", split) for split in ("train", "validation"))
    place = {row["key"]: number for number, row in enumerate(sources)}
    for rows in (train, validation):
        assert [place[row["key"]] for row in rows] == sorted(place[row["key"]] for row in rows)
    by_key = {row["key"]: row for row in train + validation}
    assert by_key.keys() == place.keys() and len(train) + len(validation) == len(sources)
    fingerprints = {json.loads((each / "run.json").read_text())["fingerprint"] for each in (output, second)}
    assert {row["run_fingerprint"] for row in by_key.values()} == fingerprints
    for source in sources:
        row = by_key[source["key"]]
        assert {name: row[name] for name in source} == source
    pictures = exports.images(output) | exports.images(second)
    if format == "parquet":
        found = {
            row[name]["path"]: row[name]["bytes"] for row in by_key.values() for name in ("image", "content", "style")
        }
        assert exports.hashes(found) == exports.hashes(pictures)
    else:
        assert exports.hashes(exports.images(tmp_path / "t")) == exports.hashes(pictures)


@pytest.mark.parametrize("format", ["webdataset", "parquet"])
def test_an_export_that_is_killed_goes_on(tmp_path: Path, format: str) -> None:
    """Killed before or after a change of its target, or twice: the same command makes the very bytes."""
    source = another(tmp_path / "b", rows=12)
    given: dict[str, Any] = {"format": format, "references": "copy", "shard_bytes": 20_000}
    exports.make(tmp_path / "calm/t", source, **given)
    calm = exports.tree(tmp_path / "calm/t")
    steps = 0
    # Of the changes, every third one, in turns before and after its effect.
    while exports.killed_after(steps, steps % 2 == 0, target := tmp_path / f"{steps}/t", source, **given):
        if steps == 3:
            exports.killed_after(2, True, target, source, **given)
        exports.make(target, source, **given)
        assert exports.tree(target) == calm, steps
        steps += 3
    assert steps > 12


def test_what_is_there_is_not_written_again(output: Path, tmp_path: Path) -> None:
    """Nor is a card that somebody has changed. A shard whose file has another size is written again."""
    target = tmp_path / "t"
    exports.make(target, output, shard_bytes=40_000)
    calm = exports.tree(target)
    (target / "README.md").write_text("Mine")
    assert exports.make(target, output, shard_bytes=40_000).written == 0
    assert (target / "README.md").read_text() == "Mine"
    with (target / "train/00001.tar").open("ab") as file:
        file.write(b"\0")
    assert exports.make(target, output, shard_bytes=40_000).written > 0
    assert exports.tree(target) == calm | {"README.md": b"Mine"}


def test_a_shard_is_closed_at_its_size(output: Path, tmp_path: Path) -> None:
    """A tar is no larger than asked for, but for its end; a row that is larger has a shard of its own."""
    exports.make(tmp_path / "t", output, split="train=1", shard_bytes=30_000)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "t/train").glob("*.tar"))]
    assert len(sizes) > 3 and max(sizes) < 30_000 + 10_240 and min(sizes[:-1]) > 15_000
    exports.make(tmp_path / "one", output, split="train=1", shard_bytes=1000)
    assert len([*(tmp_path / "one/train").glob("*.tar")]) == ROWS - 2
    assert damage(tmp_path / "one") == []


def test_rows_are_selected_by_a_condition_and_a_list(output: Path, tmp_path: Path) -> None:
    """What is left out is counted by its reason, and keys of the list that no row has are named."""
    keys = tmp_path / "keys.txt"
    keys.write_text("000000007\n\n000000008\r\nnobody\n")
    result = call("export", output, tmp_path / "t", "--where", "clip_score >= 0.3", "--exclude", keys, "--json")
    told = json.loads(result.stdout)
    left = {"without an image": 2, "not selected by --where": 4, "in --exclude": 2}
    assert told["left_out"] == left and told["rows"] == ROWS - 8
    assert told["notes"] == ["1 of 3 keys of --exclude are none of a row with an image"]
    assert [row["key"] for row in exports.rows(tmp_path / "t")][:3] == ["000000005", "000000006", "000000009"]
    assert "keys.txt" not in (tmp_path / "t/export.json").read_text()
    runs.write_output(runs.write_manifest(tmp_path / "in", 9), tmp_path / "out", 9, seed=5)
    keys.write_text("\n".join(f"{row:09d}" for row in range(9)))
    result = call("export", output, tmp_path / "out", tmp_path / "u", "--exclude", keys, "--json")
    told = json.loads(result.stdout)
    assert told["left_out"]["in --exclude"] == 17
    assert told["notes"] == []


@pytest.mark.parametrize("by", ["prompt", "reference", "prompt,reference"])
def test_no_value_is_in_two_splits(tmp_path: Path, by: str) -> None:
    """Neither a prompt nor a reference; rows that straddle are left out and counted."""
    columns = {
        "prompt": [f"p{row % 9}" for row in range(60)],
        "reference": [f"reference{row % 7 % 3}.png" for row in range(60)],
    }
    runs.write_output(runs.write_manifest(tmp_path / "in", 60, columns), tmp_path / "out", 30)
    done = exports.make(tmp_path / "t", tmp_path / "out", split="a=0.5,b=0.5", split_by=by)
    for column in by.split(","):
        values = [{row[column] for row in exports.rows(tmp_path / "t", split)} for split in ("a", "b")]
        assert values[0] and values[1] and not values[0] & values[1]
    assert (done.record.left_out.get("straddling splits", 0) > 0) == (by == "prompt,reference")
    assert done.record.rows + sum(done.record.left_out.values()) == 60


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"where": "clip_scor > 0.1"},
            "'clip_scor > 0.1' is not a condition on the columns key, run_fingerprint",
        ),
        ({"where": "random() < 0.5"}, "random sees more than the row; leave it out"),
        ({"where": "now() > '2000-01-01'"}, "now sees more than the row; leave it out"),
        (
            {"where": "clip_score > 9"},
            "no row is left of 24 rows: 22 not selected by --where, 2 without an image. Select",
        ),
        (
            {"split": "train=0.999,test=0.001"},
            "the split 'test' has the share 0.001 and gets none of the 22 rows that the selection keeps (left out: 2 "
            "without an image). Give it a larger share",
        ),
        ({"split_by": "label"}, "--split-by is 'label'; it must be one of key, prompt, reference, prompt,reference"),
        ({"format": "tar"}, "--format is 'tar'; it must be one of webdataset, parquet, energon"),
        ({"references": "all"}, "--references is 'all'; it must be one of relative, copy"),
        ({"images": ("styl",)}, "--images names 'styl'; it takes content,style"),
        ({"shard_bytes": 10}, "--shard-bytes is 10; it must be at least 1,000"),
    ],
)
def test_what_cannot_be_is_refused(output: Path, tmp_path: Path, given: dict[str, Any], told: str) -> None:
    """With the value, the limit and the remedy, and before anything is written."""
    with pytest.raises(UsageError) as caught:
        exports.make(tmp_path / "t", output, **given)
    assert told in str(caught.value)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("text", "number"), [("500MB", 5 * 10**8), ("1.5 gb", 15 * 10**8), ("256MiB", 2**28), ("1000", 1000), ("5x", None)]
)
def test_sizes_have_units(text: str, number: int | None) -> None:
    if number is not None:
        assert options.parse_bytes(text) == number
        return
    with pytest.raises(UsageError, match="--shard-bytes is '5x'; give a number of bytes, such as 500MB"):
        options.parse_bytes(text)


def test_outputs_that_do_not_fit_are_refused(output: Path, tmp_path: Path) -> None:
    """A key that is there twice, other formats of images, other types of columns, images that a run has not made."""
    plain = tmp_path / "plain"
    webp = another(tmp_path / "webp", image_format="webp")
    runs.write_output(
        runs.write_manifest(plain / "in", 6, {"label": [*range(6)], "sample_id": [f"c{row}" for row in range(6)]}),
        plain / "out",
        6,
    )
    twice = tmp_path / "twice"
    runs.write_output(runs.write_manifest(twice / "in", 6), twice / "out", 6, seed=5)
    refused: tuple[tuple[tuple[Path, ...], dict[str, Any], str], ...] = (
        ((output, output), {}, f"{output} is named twice; name each output once"),
        ((output, twice / "out"), {}, "the key '000000000' is in "),
        ((output, twice / "out"), {}, "and 4 more rows have a key of an earlier one"),
        ((output, webp), {}, f"the images have several formats: png in {output}, webp in {webp}"),
        ((output, plain / "out"), {}, f"column 'label' is int64 in {plain}/out and string in the outputs before it"),
        ((webp,), {"images": ("style",)}, f"{webp} has no such images, as it was made without --triplets"),
    )
    for outputs, given, told in refused:
        with pytest.raises(UsageError) as caught:
            exports.make(tmp_path / "t", *outputs, **given)
        assert told in str(caught.value)
    fingerprint = json.loads((output / "run.json").read_text())["fingerprint"]
    exports.make(tmp_path / "t", output, twice / "out", where=f"run_fingerprint = '{fingerprint}' OR key > '000000005'")
    exports.make(tmp_path / "mixed", output, webp, format="parquet")
    assert damage(tmp_path / "t") == damage(tmp_path / "mixed") == []


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("mine.txt", "holds files, such as mine.txt, and no export.json: name a new or empty folder"),
        ("export.json", "export.json is damaged, or of another version"),
    ],
)
def test_nobody_elses_files_are_touched(output: Path, tmp_path: Path, file: str, told: str) -> None:
    """A folder that is not empty, and holds no export: exit code 4, and nothing is written."""
    runs.write_files(tmp_path / "t", {file: b"{}"})
    before = exports.tree(tmp_path / "t")
    with pytest.raises(RefusedError, match=told):
        exports.make(tmp_path / "t", output)
    assert exports.tree(tmp_path / "t") == before


def test_another_export_is_refused(output: Path, tmp_path: Path) -> None:
    """Both values are told. An export cannot be made in an output, nor of an export."""
    exports.make(tmp_path / "t", output)
    before = exports.tree(tmp_path / "t")
    with pytest.raises(RefusedError) as caught:
        exports.make(tmp_path / "t", output, where="clip_score > 0.1", format="parquet")
    assert 'where: null there, "clip_score > 0.1" now' in str(caught.value)
    assert 'format: "webdataset" there, "parquet" now' in str(caught.value)
    for target in (output, output / "export"):
        with pytest.raises(UsageError, match="; name a"):
            exports.make(target, output)
    with pytest.raises(UsageError, match="is an export, a dataset that was made of outputs"):
        exports.make(tmp_path / "u", tmp_path / "t")
    assert exports.tree(tmp_path / "t") == before


def test_damaged_and_unfinished_outputs_are_told(tmp_path: Path) -> None:
    """Nothing is left out without --partial, and with it what is left out is named."""
    source = another(tmp_path, rows=12)
    (source / "00001_stats.json").unlink()
    with pytest.raises(Unfinished) as caught:
        exports.make(tmp_path / "t", source)
    assert f"1 shard of {source} not generated yet: 00001" in str(caught.value)
    assert "Rerun the command of the run, or leave them out with --partial" in str(caught.value)
    (source / "00002.tar").unlink()
    with pytest.raises(DamageFound) as damaged:
        exports.make(tmp_path / "t", source)
    assert "1 shard is damaged, and nothing is exported:" in str(damaged.value)
    assert f"00002 of {source} is damaged: 00002.tar is missing" in str(damaged.value)
    assert not (tmp_path / "t").exists()
    done = exports.make(tmp_path / "t", source, partial=True, split="train=1")
    assert [row["key"] for row in exports.rows(tmp_path / "t")] == ["b0", "b1", "b2", "b3"]
    assert done.record.sources[0]["shards_left_out"] == 2
    assert any("00002" in line for line in done.lines) and any("not generated yet" in line for line in done.lines)
    assert damage(tmp_path / "t") == []


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_bytes_that_have_changed_are_not_handed_on(tmp_path: Path, kind: str) -> None:
    """A file of the right size whose bytes are not those of its receipt, or of its row, ends the export with code 5."""
    source = another(tmp_path, triplets=True)
    path = source / f"00001.{kind}"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    for number, images in enumerate(((), ("content",))):
        with pytest.raises(DamageFound, match="00001"):
            exports.make(tmp_path / f"t{number}", source, images=images, split="train=1")


def test_receipts_are_read_twice(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once at the beginning, and once at the end to see whether they have changed."""
    content, read = receipts.content, list[str]()

    def counted(url: str, stem: str) -> bytes | None:
        read.append(stem)
        return content(url, stem)

    monkeypatch.setattr(receipts, "content", counted)
    exports.make(tmp_path / "t", output)
    assert sorted(read) == sorted(2 * [f"0000{number}" for number in range(4)])


def test_a_shard_that_changes_before_it_is_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its receipt is read again before damage is told."""
    source = another(tmp_path)
    schema = Sources.schema

    def repaired(self: Sources) -> Any:
        found = schema(self)
        files = runs.Files(source, "00001")
        files.edit_everywhere(0, clip_score=0.75)
        files.write()
        return found

    monkeypatch.setattr(Sources, "schema", repaired)
    with pytest.raises(RefusedError, match=r"shard 00001 of .* has changed while it was exported, by a repair; rerun"):
        exports.make(tmp_path / "t", source)


def test_an_output_that_changes_meanwhile_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a repair: the export does not end as if nothing had been, and the same command is refused afterwards."""
    source = another(tmp_path)
    files = runs.Files(source, "00001")

    def repaired(shard: OpenShard) -> Any:
        if files.rows[0]["clip_score"] != 0.5:
            files.edit_everywhere(0, clip_score=0.5)
            files.write()
        return finish(shard)

    finish = OpenShard.finish
    monkeypatch.setattr(OpenShard, "finish", repaired)
    with pytest.raises(RefusedError, match="an output has changed while it was exported"):
        exports.make(tmp_path / "t", source, split="train=1")
    with pytest.raises(RefusedError, match="the outputs: others there, or they have changed since"):
        exports.make(tmp_path / "t", source, split="train=1")


def test_a_full_disk_is_told_and_the_same_command_goes_on(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the target, and in the scratch: with the bytes that are needed and free, and the remedy."""
    exports.make(tmp_path / "calm/t", output)
    target, publish, add = tmp_path / "t", local.publish, OpenShard.add

    def full(path: str, *arguments: Any, **given: Any) -> None:
        if path.endswith("00000.tar"):
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(path, *arguments, **given)

    monkeypatch.setattr(local, "publish", full)
    with pytest.raises(StorageError, match=r"cannot upload .*00000.tar: No space left .* bytes are needed.*Make room"):
        exports.make(target, output)
    monkeypatch.undo()

    def full_scratch(shard: OpenShard, *arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(OpenShard, "add", full_scratch)
    with pytest.raises(StorageError, match=r"cannot write the shards of an export: No space left.* set TMPDIR"):
        exports.make(target, output)
    monkeypatch.setattr(OpenShard, "add", add)
    exports.make(target, output)
    assert exports.tree(target) == exports.tree(tmp_path / "calm/t")


def test_an_export_may_lie_in_an_object_store(output: Path, tmp_path: Path, s3: str) -> None:
    """On S3 it has the bytes that it has on a disk."""
    name = storage.name(s3)
    exports.make(tmp_path / name, output, references="copy")
    exports.make(s3, output, references="copy")
    assert damage(s3) == []
    there = {path: storage.read_bytes(storage.join(s3, path)) for path in storage.list_tree(s3)}
    assert there == exports.tree(tmp_path / name)


def test_the_commands_tell_what_they_do(output: Path, tmp_path: Path) -> None:
    """``export`` and ``verify``, in words and as JSON; other commands refuse an export in a sentence."""
    target = tmp_path / "t"
    result = call("export", output, target, "--split", "train=0.7,validation=0.3")
    assert result.exit_code == 0, result.output
    assert f"{target}: 22 rows in 2 shards (train " in result.stdout
    assert "left out: 2 without an image" in result.stdout and "train/00000: " in result.stderr
    result = call("verify", target)
    assert result.exit_code == 0 and result.stdout == f"{target}: 22 rows in 2 shards, no damage\n"
    assert json.loads(call("verify", target, "--json").stdout)["rows"] == 22
    for command in ("report", "status", "card", "repair", "push"):
        more = [tmp_path / "there"] if command == "push" else []
        result = call(command, target, *more)
        assert result.exit_code == 2 and "is an export, a dataset that was made of outputs" in result.stderr, command
    result = call("verify", target, "--regenerate", 2)
    assert result.exit_code == 2 and "--regenerate is not for" in result.stderr
    for text, told in ((None, "cannot be read"), ("\n", "has no key; give a key on each line")):
        keys = tmp_path / "keys"
        if text is not None:
            keys.write_text(text)
        result = call("export", output, tmp_path / "u", "--exclude", keys)
        assert result.exit_code == 2 and told in result.stderr


def test_what_a_killed_export_left_half_written_is_deleted(output: Path, tmp_path: Path) -> None:
    """Once nobody has written it for an hour: another export may be at work."""
    exports.make(tmp_path / "t", output, references="copy", where="clip_score >= 0")
    for folder in (tmp_path / "t", tmp_path / "t/train", next((tmp_path / "t/references").iterdir())):
        for name, age in (("left", ABANDONED_SECONDS + 60), ("at-work", 60)):
            path = folder / f".tmp-{name}"
            path.write_bytes(b"half")
            os.utime(path, (time.time() - age,) * 2)
    exports.make(tmp_path / "t", output, references="copy", where="clip_score >= 0")
    assert {path.name for path in (tmp_path / "t").rglob(".tmp-*")} == {".tmp-at-work"}
    assert damage(tmp_path / "t") == []


def test_receipts_are_those_of_the_bytes(output: Path, tmp_path: Path) -> None:
    """Hash and size of each file, and no date, host or path."""
    exports.make(tmp_path / "t", output, format="energon")
    for path in (tmp_path / "t").glob(f"*/*{receipts.RECEIPT_SUFFIX}"):
        told = json.loads(path.read_text())
        assert told.keys() == {"fingerprint", "split", "name", "rows", "next", "files"}
        for kind, suffix in (("tar", ".tar"), ("parquet", ".parquet"), ("index", ".tar.idx")):
            data = path.with_name(told["name"] + suffix).read_bytes()
            entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            assert told["files"][kind] == entry
    for path in (tmp_path / "t").rglob("*"):
        assert path.is_dir() or str(output.parent).encode() not in path.read_bytes()


def test_a_column_that_an_output_lacks_is_null(tmp_path: Path) -> None:
    manifest = runs.write_manifest(tmp_path / "a", 3, {"colour": ["red"] * 3})
    runs.write_output(manifest, tmp_path / "out", 3)
    exports.make(tmp_path / "t", tmp_path / "out", another(tmp_path / "b", rows=3), split="train=1")
    assert [row["colour"] for row in exports.rows(tmp_path / "t")] == ["red"] * 3 + [None] * 3
    assert pq.read_schema(tmp_path / "t/train/00000.parquet").names[:2] == ["key", "run_fingerprint"]


@pytest.mark.parametrize("column", ["image", "style"])
def test_carried_columns_may_have_names_of_images_in_tars(tmp_path: Path, column: str) -> None:
    """In a parquet with images, columns of these names hold them, so that a carried one is refused there."""
    manifest = runs.write_manifest(tmp_path / "in", 3, {column: ["a"] * 3})
    source = tmp_path / "out"
    runs.write_output(manifest, source, 3, triplets=True, carry=(column,))
    told = f"{source} has a column '{column}', where --format parquet puts images; use tars, or rename it for a new run"
    with pytest.raises(UsageError, match=told):
        exports.make(tmp_path / "t", source, split="train=1", format="parquet", images=("style",))
    assert not (tmp_path / "t").exists()
    exports.make(tmp_path / "t", source, split="train=1", images=("style",))
    assert damage(tmp_path / "t") == [] and exports.rows(tmp_path / "t")[0][column] == "a"
