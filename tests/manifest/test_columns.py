"""Names of a manifest's columns: what is read, what is carried, and near misses that are neither in silence."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vcf_batch.errors import ManifestError
from vcf_batch.manifest import columns
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.records import Reference


def write(path: Path, **values: Any) -> str:
    pq.write_table(pa.table({"prompt": ["a cat", "a dog"]} | values), path)
    return str(path)


VARIANTS = {
    "Reference": "reference", " reference": "reference", "Seed": "seed", "SEED ": "seed", "sample-id": "sample_id",
    "SampleID": "sample_id", "Negative_Prompt": "negative_prompt", "negative prompt": "negative_prompt",
    "negativeprompt": "negative_prompt", "Guidance Scale": "guidance_scale", "reference-weights": "reference_weights",
    "Reference_SHA256": "reference_sha256", "pnoSteps": "pno_steps",
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_a_near_miss_is_refused_with_the_name_that_was_meant(tmp_path: Path, name: str) -> None:
    """Variants in case, outer blanks, ``_``, ``-`` and spaces; --carry carries them on purpose."""
    url = write(tmp_path / "m.parquet", **{name: ["1", "2"]})
    with pytest.raises(ManifestError, match=f"column '{name}' is not read: if '{VARIANTS[name]}' is meant, rename it"):
        Manifest.open(url)
    assert Manifest.open(url, carry=[name]).rows(1, 2, 0)[0].carried == {name: "2"}
    both = write(tmp_path / "both.parquet", **{name: ["1", "2"], VARIANTS[name]: pa.nulls(2)})
    with pytest.raises(ManifestError, match="is not read"):
        Manifest.open(both)


@pytest.mark.parametrize(
    ("meant", "name"), [(meant, other) for meant, all in columns.OTHER_NAMES.items() for other in all]
)
def test_other_peoples_names_are_refused_where_the_column_meant_is_absent(
    tmp_path: Path, meant: str, name: str
) -> None:
    url = write(tmp_path / "m.parquet", **{name: ["1", "2"]})
    if meant == "prompt":
        assert Manifest.open(url).remarks == {name: "not read as 'prompt'"}
        pq.write_table(pa.table({name: ["a"]}), tmp_path / "without.parquet")
        with pytest.raises(ManifestError, match=f"if '{name}' is meant, give --prompt-column {name}"):
            Manifest.open(str(tmp_path / "without.parquet"))
        return
    with pytest.raises(ManifestError, match=f"'{name}' is not read, and there is no '{meant}': if it is meant, rename"):
        Manifest.open(url)
    for opened in (
        Manifest.open(url, carry=[name]),
        Manifest.open(write(tmp_path / "both.parquet", **{name: ["1", "2"], meant: pa.nulls(2)})),
    ):
        assert opened.rows(0, 1, 0)[0].carried == {name: "1"}
        assert opened.remarks == {name: f"not read as '{meant}'"}


def test_every_problem_with_names_is_told_at_once(tmp_path: Path) -> None:
    url = write(tmp_path / "m.parquet", image=["a", "b"], Seed=[1, 2], carried=[1, 2])
    with pytest.raises(ManifestError) as refused:
        Manifest.open(url, carry=["gone", "prompt"])
    for part in (
        "--reference-column image",
        "--seed-column Seed",
        "'gone' of --carry is missing",
        "'prompt' of --carry",
    ):
        assert part in str(refused.value)


def test_columns_of_any_name_are_read(tmp_path: Path) -> None:
    """A column that is read in place of another has its meaning and is not carried under its own name."""
    path = tmp_path / "m.parquet"
    pq.write_table(
        pa.table(
            {"caption": ["a", "b"], "pic url": ["x.png", None], "uid": ["k0", "k1"], "noise": [5, 6], "n": [1, 2]}
        ),
        path,
    )
    mapped = {"prompt": "caption", "reference": "pic url", "sample_id": "uid", "seed": "noise"}
    opened = Manifest.open(str(path), mapped=mapped)
    assert opened.carried_schema.names == ["n"]
    assert [(row.prompt, row.references, row.key, row.seed) for row in opened.rows(0, 2, 0)] == [
        ("a", (Reference("x.png"),), "k0", 5),
        ("b", (), "k1", 6),
    ]
    assert opened.check().having == {"prompt": 2, "reference": 1, "sample_id": 2, "seed": 2}
    assert opened.has_any("reference")


def test_wrong_names_of_columns_are_named(tmp_path: Path) -> None:
    url = write(tmp_path / "m.parquet", reference=["a", "b"], photo=["c", "d"], uid=["a b", "c"], n=[1, 2])
    for mapped, message in (
        ({"prompt": "gone"}, "column 'gone' of --prompt-column is missing; the file has: prompt, reference, photo"),
        ({"sample_id": "n"}, "column 'n' is int64; it must be string"),
    ):
        with pytest.raises(ManifestError, match=message):
            Manifest.open(url, mapped=mapped)
    with pytest.raises(ManifestError, match=r"column 'uid': 1 row is unsafe"):
        Manifest.open(url, mapped={"sample_id": "uid"}).check()


def test_a_column_that_another_one_is_read_in_place_of_is_left_out_and_told(tmp_path: Path) -> None:
    """A manifest may have a prompt and a caption, and either may be read."""
    url = write(tmp_path / "m.parquet", prompt=["p", "q"], caption=["a", "b"], note=["x", "y"])
    opened = Manifest.open(url, mapped={"prompt": "caption"})
    assert [row.prompt for row in opened.rows(0, 2, 0)] == ["a", "b"]
    assert opened.carried_schema.names == ["note"]
    assert opened.left_out == {"prompt": "--prompt-column reads 'caption' in its place"}
    with pytest.raises(ManifestError, match="'prompt' of --carry has the name of a column that the outputs have"):
        Manifest.open(url, mapped={"prompt": "caption"}, carry=["prompt"])


@pytest.mark.parametrize("name", ["Status", "KEY", "Sha256"])
def test_a_carried_column_is_not_taken_for_one_of_the_outputs(tmp_path: Path, name: str) -> None:
    """DuckDB and others do not heed case. --carry carries it on purpose."""
    url = write(tmp_path / "m.parquet", **{name: ["1", "2"]})
    with pytest.raises(ManifestError, match=f"column '{name}' would be taken for the output's own"):
        Manifest.open(url)
    assert Manifest.open(url, carry=[name]).carried_schema.names == [name]


@pytest.mark.parametrize("name", ["b.PARQUET", "b.pq", "b.parquet.zst", "b.Parquet"])
def test_files_that_may_belong_to_a_manifest_are_not_passed_over(tmp_path: Path, name: str) -> None:
    """A folder with files of other endings is refused with their names; what Spark adds is not among them."""
    write(tmp_path / "a.parquet")
    (tmp_path / ".a.parquet.crc").touch()
    assert Manifest.open(str(tmp_path)).num_rows == 2
    write(tmp_path / name)
    with pytest.raises(ManifestError, match=f"1 files such as '{name}', which are not read: rename"):
        Manifest.open(str(tmp_path))


IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.mark.parametrize(
    ("references", "having"),
    [
        (pa.array(["a", None], pa.string()), 1),
        (pa.nulls(2), 0),
        (pa.array([["a"], []], pa.list_(pa.string())), 1),
        (pa.array([{"bytes": b"1", "path": None}, None], IMAGE), 1),
        (pa.array([[{"bytes": b"1", "path": "x"}], []], pa.list_(IMAGE)), 1),
        (pa.array([{"path": "a"}, {"path": None}], pa.struct({"path": pa.string()})), 1),
        (pa.array([{"bytes": b"1"}, None], pa.struct({"bytes": pa.binary()})), None),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_rows_with_a_reference_are_counted_without_reading_images(
    tmp_path: Path, references: pa.Array, having: int | None
) -> None:
    """The pass that checks ids counts rows with a prompt, reference, seed and id; bytes of images are not read."""
    opened = Manifest.open(write(tmp_path / "m.parquet", reference=references, seed=pa.array([None, 3], pa.int64())))
    for _, batch in opened._batches(["prompt", "reference"], 0, 2, 10, counting=True):
        assert "bytes" not in str(batch.schema)
    assert opened.check().having == {"prompt": 2, "reference": having, "sample_id": 0, "seed": 1}


def test_prompts_with_weights_are_counted(tmp_path: Path) -> None:
    prompts = ["a (red:1.2) cat", "time 10:30", "(a: b)", "(((x:.5)))", "[a:b:0.5] (y)", "plain"]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "m.parquet")
    assert Manifest.open(str(tmp_path / "m.parquet")).check().weighted == 2
