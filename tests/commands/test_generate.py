"""A run from Python: what its table becomes, and when the same call is the same run."""

import inspect
from pathlib import Path
from typing import Any

import pandas as pd
import polars
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from datasets.data_files import resolve_pattern

import vcf_batch
from support import runs
from vcf_batch import pool, storage
from vcf_batch.commands import generate, verify
from vcf_batch.config.mapping import SETTLED
from vcf_batch.config.run_config import RunConfig
from vcf_batch.driver.ledger import Summary
from vcf_batch.errors import ManifestError, RefusedError, UsageError
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.output.output import Output

COLUMNS = {"prompt": ["a red star", "a green heart"], "label": ["one", "two"]}
FRAME = pd.DataFrame(COLUMNS)


def configured(table: Any, output: Path, **settings: Any) -> RunConfig:
    return generate.configured(table, output, settings)


def begun(table: Any, output: Path) -> str:
    """Place of the manifest of a run that has committed its shards."""
    manifest = configured(table, output).manifest
    runs.write_output(Path(manifest), output, 2)
    return manifest


@pytest.mark.parametrize(
    "table",
    [FRAME, pa.table(COLUMNS), pa.table(COLUMNS).to_reader()],
    ids=["pandas", "pyarrow", "stream"],
)
def test_a_table_of_any_library_becomes_a_manifest_in_the_output(table: Any, tmp_path: Path) -> None:
    """In a folder that no reader of the output sees, beside no other file."""
    config = configured(table, tmp_path / "out", steps=3)
    with pytest.raises(FileNotFoundError):
        resolve_pattern("**/*.parquet", str(tmp_path / "out"))
    assert not pa.dataset.dataset(tmp_path / "out", format="parquet").files
    assert config.steps == 3 and storage.parent(config.manifest) == str(tmp_path / "out/__manifest__")
    manifest = Manifest.open(config.manifest)
    rows = manifest.rows(0, 2, 0)
    assert [(row.prompt, row.carried["label"]) for row in rows] == list(zip(*COLUMNS.values(), strict=True))
    assert pq.read_schema(config.manifest).metadata is None or b"pandas" not in pq.read_schema(config.manifest).metadata


def test_an_index_is_no_column_unless_it_has_a_name(tmp_path: Path) -> None:
    """A filtered frame has an index with gaps, which would be carried, or change the run."""
    filtered = pd.concat([FRAME, FRAME])[lambda frame: [False, True, True, False]].iloc[::-1]
    config = configured(filtered, tmp_path / "out")
    assert config.manifest == configured(FRAME, tmp_path / "out").manifest
    named = FRAME.assign(sample_id=["x", "y"]).set_index("sample_id")
    assert [row.key for row in Manifest.open(configured(named, tmp_path / "out").manifest).rows(0, 2, 0)] == ["x", "y"]


def test_relative_references_start_at_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They become absolute, and the working directory a root; other references and roots stay as they are."""
    monkeypatch.chdir(tmp_path)
    references = ["a/b.png", None, "/c.png", "s3://d/e.png", "https://f/g.png?h"]
    expected = [f"{tmp_path}/a/b.png", *references[1:]]
    frame = pd.DataFrame({"prompt": ["p"] * 5, "reference": references, "negative_reference": references})
    config = configured(frame, Path("out"), reference_root=["/roots"])
    table = pq.read_table(config.manifest)
    assert table["reference"].to_pylist() == table["negative_reference"].to_pylist() == expected
    assert config.reference_root == ("/roots", str(tmp_path)) and config.output == str(tmp_path / "out")
    absolute = frame.assign(reference=None, negative_reference="/c.png")
    assert configured(absolute, Path("out")).reference_root == ()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([["a.png", "/b.png"], None], [["{}/a.png", "/b.png"], None]),
        ([{"bytes": b"x", "path": "a.png"}, {"bytes": None, "path": "b.png"}], ["a.png", "{}/b.png"]),
        (pa.array(["a.png", "a.png"]).dictionary_encode(), ["{}/a.png", "{}/a.png"]),
    ],
    ids=["lists", "images", "categories"],
)
def test_references_of_every_type_are_made_absolute(
    given: Any, expected: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside bytes a path is a name alone, and stays."""
    monkeypatch.chdir(tmp_path)
    given = given if isinstance(given, pa.Array) else pa.array(given)
    table = pa.table({"prompt": ["p", "q"], "picture": given})
    written = pq.read_table(configured(table, Path("out"), reference_column="picture").manifest)
    assert written.schema.field("picture").type == given.type
    values = [each["path"] if isinstance(each, dict) else each for each in written["picture"].to_pylist()]
    assert str(values) == str(expected).replace("{}", str(tmp_path))


def test_the_same_rows_are_the_same_run(tmp_path: Path) -> None:
    """A frame that is built again resumes, whatever became of its index."""
    output = tmp_path / "out"
    manifest = begun(FRAME, output)
    before = runs.data_files(output)
    assert configured(pd.DataFrame(COLUMNS, index=[7, 8]), output).manifest == manifest
    assert runs.data_files(output) == before and [*verify.check(Output(str(output)))] == []


@pytest.mark.parametrize(
    "table",
    [
        FRAME.astype(object),
        FRAME.astype("string[python]"),
        pa.table(COLUMNS),
        polars.DataFrame(COLUMNS),
        pa.table({name: pa.array(values, pa.string_view()) for name, values in COLUMNS.items()}),
    ],
    ids=["objects", "pandas strings", "pyarrow", "polars", "views"],
)
def test_the_same_texts_of_another_type_are_the_same_run(table: Any, tmp_path: Path) -> None:
    """Another library, or another version of one, chooses another type of text."""
    assert configured(table, tmp_path / "out").manifest == configured(FRAME, tmp_path / "out").manifest


@pytest.mark.parametrize(
    "other",
    [FRAME.iloc[:1], FRAME.iloc[::-1], FRAME.assign(label=["one", "three"]), FRAME.assign(more=1)],
    ids=["fewer rows", "another order", "another value", "another column"],
)
def test_other_rows_are_refused_and_change_nothing(other: pd.DataFrame, tmp_path: Path) -> None:
    output = tmp_path / "out"
    begun(FRAME, output)
    before = sorted(output.rglob("*"))
    with pytest.raises(RefusedError, match=r"holds a run of another manifest, .*: use another output"):
        configured(other, output)
    assert sorted(output.rglob("*")) == before


def test_an_output_of_a_manifest_file_is_not_written_to(tmp_path: Path) -> None:
    output = tmp_path / "out"
    runs.write_output(runs.write_manifest(tmp_path / "in", 2), output, 2)
    with pytest.raises(RefusedError, match=r"another manifest, .*/in/manifest\.parquet"):
        configured(FRAME, output)
    assert not (output / "__manifest__").exists()


def test_rows_that_another_version_of_pyarrow_wrote_are_compared_by_their_values(tmp_path: Path) -> None:
    """Its bytes differ, and so would the name; the run goes on with the file that is there."""
    output, there = tmp_path / "out", tmp_path / "out/__manifest__/0123456789abcdef.parquet"
    there.parent.mkdir(parents=True)
    pq.write_table(pq.read_table(configured(FRAME, tmp_path / "other").manifest), there, compression="none")
    runs.write_output(there, output, 2)
    assert configured(FRAME, output).manifest == str(there)
    with pytest.raises(RefusedError, match="holds a run of another manifest"):
        configured(FRAME.iloc[:1], output)


def test_no_table_replaces_another(tmp_path: Path) -> None:
    """As long as nothing is committed, a frame may be corrected; a run that has just begun keeps its own."""
    first, second = (configured(frame, tmp_path / "out").manifest for frame in (FRAME, FRAME.iloc[:1]))
    assert first != second and pq.read_table(first).num_rows == 2 and pq.read_table(second).num_rows == 1


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ([{"prompt": "p"}], "the manifest is a list; give a path, a URL, or a table"),
        (FRAME.iloc[:0], "has no rows"),
        (pd.DataFrame({"prompt": [object()]}), "cannot be written as a manifest: .*object"),
        (pd.DataFrame({"prompt": ["p", 1]}), "cannot be written as a manifest"),
    ],
    ids=["list", "no rows", "objects", "mixed"],
)
def test_what_is_no_table_is_refused(table: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=reason):
        configured(table, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"step": 3}, "unknown setting 'step'"),
        ({"steps": "3"}, "steps is '3'; it must be a whole number or null"),
        ({"steps": 0}, "steps is 0; it must be between 1 and 1000"),
    ],
)
def test_settings_are_checked_before_anything_is_written(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        configured(FRAME, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_run_takes_a_configuration_or_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths may be `Path`s. A configuration stands for all arguments."""
    seen: list[RunConfig] = []
    summary = Summary("o", 1, {"success": 1, "rejected": 0, "failed": 0}, 0, 1.0)

    def noted(config: RunConfig) -> Summary:
        seen.append(config)
        return summary

    monkeypatch.setattr(pool, "run", noted, raising=False)
    config = RunConfig(manifest=str(tmp_path / "m"), output=str(tmp_path / "o"), model=str(tmp_path / "model"))
    assert vcf_batch.run(config) is summary
    vcf_batch.run(tmp_path / "m", tmp_path / "o", model=tmp_path / "model")
    assert seen == [config, config]
    with pytest.raises(UsageError, match="steps is given beside a RunConfig"):
        vcf_batch.run(config, steps=3)
    with pytest.raises(UsageError, match="output is missing"):
        vcf_batch.run(FRAME)


def test_help_shows_every_setting() -> None:
    """With its type and default, as editors show them."""
    parameters = inspect.signature(vcf_batch.run).parameters
    assert {*parameters} == {*RunConfig.__dataclass_fields__} - SETTLED
    assert parameters["guidance_lo"].default == 0.0 and parameters["steps"].annotation == int | None
