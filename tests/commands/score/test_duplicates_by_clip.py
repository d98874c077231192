"""A search by a CLIP: embeddings are computed once and kept, and duplicates follow the rule of every search."""

import builtins
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import vcf_batch
from support import exports, runs, scorers
from vcf_batch.cli import main
from vcf_batch.commands.score.duplicates import near_embeddings
from vcf_batch.manifest.references import ReferenceReader
from vcf_batch.metrics.clip_score import ClipJudge
from vcf_batch.output.output import Output
from vcf_batch.records import Row

ROWS, FAILED = 10, 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, restored_torch: None) -> Path:
    """Ten rows in three shards, one of them without an image, and a CLIP beside them."""
    folder = tmp_path_factory.mktemp("source")
    runs.write_output(runs.write_manifest(folder / "in", ROWS), folder / "out", 4, failed={FAILED})
    scorers.save_clip(folder / "clip")
    return folder


@pytest.fixture
def output(made: Path, tmp_path: Path) -> Path:
    """A copy of the output that a test may change."""
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


@pytest.fixture
def by_clip(made: Path) -> tuple[str, ...]:
    return ("--with", f"duplicates={made / 'clip'}", "--by", "clip")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def search(output: Path, *given: object) -> dict[str, Any]:
    result = call("score", output, *given, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def found(output: Path, column: str) -> dict[int, int]:
    """The rows that have a value, with it, by their numbers."""
    tables = [pq.read_table(path) for path in sorted(output.glob("_scores/duplicates/*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [int(row["key"]) for row in rows] == [*range(ROWS)]
    return {int(row["key"]): int(row[column]) for row in rows if row[column] is not None}


def parquets(output: Path) -> dict[str, bytes]:
    return {name: data for name, data in exports.tree(output / "_scores").items() if name.endswith(".parquet")}


def expected(clip: Path, pictures: dict[int, Any], cosine: float) -> dict[int, int]:
    """What the rule gives for the pictures of some rows, each embedded alone."""
    judge = ClipJudge.from_pretrained(str(clip))
    own = {row: judge.embed_images([picture])[0].numpy().astype(np.float64) for row, picture in pictures.items()}
    firsts: dict[int, int] = {}
    for row in own:
        near = (other for other in own if other < row and other not in firsts and own[row] @ own[other] >= cosine)
        if (first := next(near, None)) is not None:
            firsts[row] = first
    return firsts


def test_images_and_references_are_compared_by_their_embeddings(
    output: Path, made: Path, by_clip: tuple[str, ...]
) -> None:
    """By the rule of every search, with the values that a comparison one by one gives; the output keeps its bytes."""
    before = {name: data for name, data in exports.tree(output).items() if "_scores" not in name}
    done = search(output, *by_clip, "--threshold", 0.9)
    assert done["scores"] == {"duplicates": ["duplicate_of", "reference_duplicate_of"]}
    opened = Output(str(output))
    rows = [*opened.manifest_rows(0, ROWS)]
    with_images = {row.number: row for row in rows if row.number != FAILED}
    images = {int(name[:9]): picture_of(data) for name, data in exports.images(output).items()}
    assert {*images} == {*with_images}
    references = {number: picture for number, row in with_images.items() if (picture := reference_of(row, opened))}
    assert found(output, "duplicate_of") == expected(made / "clip", images, 0.9)
    assert found(output, "reference_duplicate_of") == expected(made / "clip", references, 0.9)
    assert "by a CLIP with a cosine of 0.9 or more" in done["notes"][0]
    assert {name: data for name, data in exports.tree(output).items() if "_scores" not in name} == before
    assert call("verify", output).exit_code == 0


def picture_of(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def reference_of(row: Row, opened: Output) -> Image.Image | None:
    reader = ReferenceReader(opened.need_manifest().base, opened.config.reference_root, opened.config.max_pixels)
    return reader.read(row.references[0]) if row.references else None


def test_another_threshold_computes_no_embedding_again(output: Path, made: Path, by_clip: tuple[str, ...]) -> None:
    """Embeddings belong to the CLIP; once a search is complete, they may be deleted."""
    search(output, *by_clip)
    folder, *others = output.glob("_scores/embedding_*/")
    before = exports.tree(folder)
    assert not others and len(before) == 6
    wider = ("--with", f"duplicates:wide={made / 'clip'}", "--by", "clip", "--threshold", 0.5)
    assert search(output, *wider)["scores"] == {"wide": ["wide_duplicate_of", "wide_reference_duplicate_of"]}
    assert exports.tree(folder) == before
    shutil.rmtree(folder)
    assert search(output, *by_clip)["scored"] == 0 and not folder.exists()


def test_embeddings_are_no_columns_of_an_output(output: Path, tmp_path: Path, by_clip: tuple[str, ...]) -> None:
    """Rows, exports and reports have the keys alone; ``verify`` reads the embeddings too, and ``push`` copies them."""
    search(output, *by_clip, "--threshold", 0.9)
    assert not [name for row in vcf_batch.Output(output).rows() for name in row if "embedding" in name]
    exports.make(tmp_path / "t", output, split="train=1", where="duplicate_of IS NULL")
    assert len(exports.rows(tmp_path / "t")) == ROWS - 1 - len(found(output, "duplicate_of"))
    assert call("report", output).exit_code == 0 and call("status", output).exit_code == 0
    assert call("push", output, tmp_path / "pushed").exit_code == 0
    assert parquets(tmp_path / "pushed") == parquets(output)
    path = next(output.glob("_scores/embedding_*/00001.parquet"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = call("verify", output)
    assert result.exit_code == 5 and "its receipt says" in result.output


def test_a_repaired_shard_is_embedded_and_searched_again(output: Path, by_clip: tuple[str, ...]) -> None:
    search(output, *by_clip)
    files = runs.Files(output, "00001")
    files.edit(0, clip_score=0.5)
    files.write()
    kept = {name: data for name, data in exports.tree(output / "_scores").items() if "embedding" in name}
    assert search(output, *by_clip)["scored"] == 3
    now = {name: data for name, data in exports.tree(output / "_scores").items() if "embedding" in name}
    assert {name for name in now if now[name] != kept[name]} == {
        name for name in now if name.endswith("00001_stats.json")
    }
    assert "_scores" not in call("verify", output).output


@pytest.mark.parametrize("after", [False, True])
def test_killed_anywhere_and_rerun_it_ends_with_the_same_bytes(
    output: Path, after: bool, by_clip: tuple[str, ...]
) -> None:
    """Whatever change a call dies at, before or after it, of embeddings or of the search."""
    search(output, *by_clip)
    whole = parquets(output)
    assert len(whole) == 6
    steps = 0
    while True:
        shutil.rmtree(output / "_scores")
        if not runs.dies_in_scores(lambda: search(output, *by_clip), steps, after):
            break
        search(output, *by_clip)
        assert parquets(output) == whole
        steps += 3
    assert steps > 14


def test_clusters_are_trained_on_a_sample_of_shards(
    output: Path, by_clip: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an output with more rows than are compared in full; here all clusters are looked at, so nothing is missed."""
    search(output, *by_clip, "--threshold", 0.9)
    exact = parquets(output)
    monkeypatch.setattr(near_embeddings, "EXACT_ROWS", 4)
    shutil.rmtree(output / "_scores/duplicates")
    search(output, *by_clip, "--threshold", 0.9)
    assert parquets(output) == exact


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--threshold", "0"), "--threshold 0 is no cosine"),
        (("--threshold", "4"), "--threshold 4 is no cosine"),
        (("--by", "phash"), "takes no model by hashes"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    output: Path, by_clip: tuple[str, ...], given: tuple[str, ...], message: str
) -> None:
    result = call("score", output, *by_clip, *given)
    assert result.exit_code == 2 and message in result.output, result.output
    assert not (output / "_scores").exists()


def test_a_search_that_is_there_otherwise_is_refused_before_anything_is_computed(
    output: Path, by_clip: tuple[str, ...]
) -> None:
    search(output, *by_clip)
    shutil.rmtree(next(output.glob("_scores/embedding_*/")))
    result = call("score", output, *by_clip, "--threshold", 0.5)
    assert result.exit_code == 4 and "cosine: 0.95 there, 0.5 now" in result.output
    assert not [*output.glob("_scores/embedding_*/")]


def test_a_missing_extra_is_told_before_anything_is_computed(
    output: Path, by_clip: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    importing = builtins.__import__

    def without(name: str, *given: Any, **more: Any) -> Any:
        if name == "faiss":
            raise ImportError("No module named 'faiss'")
        return importing(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    result = call("score", output, *by_clip)
    assert result.exit_code == 2 and "pip install 'vcf-batch[duplicates]'" in result.output
    assert not (output / "_scores").exists()
