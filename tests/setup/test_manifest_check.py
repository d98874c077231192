"""A manifest is checked before a run, once."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support import runs
from vcf_batch.commands import verify
from vcf_batch.errors import RefusedError
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.output.output import Output
from vcf_batch.setup import claim
from vcf_batch.setup.job import Job


def test_ids_are_not_checked_again_on_a_resume(settle: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniqueness is not rechecked on a resume of the same manifest."""
    claim.claim(settle())
    monkeypatch.setattr(Manifest, "check", pytest.fail)
    settle()


def other_names(folder: Path) -> Path:
    """A manifest of which no column but the carried ones has the name that a run reads."""
    folder.mkdir()
    (folder / "a.png").write_bytes(runs.png(1))
    columns = {
        "caption": ["a cat", "a (red:1.2) dog"],
        "image": ["a.png", None],
        "uid": ["k0", "k1"],
        "noise": [5, 6],
        "text": ["x", "y"],
        "raw": [b"1", b"2"],
        "at": pa.array([1001, 2], pa.timestamp("ns")),
    }
    pq.write_table(pa.table(columns), folder / "m.parquet")
    return folder / "m.parquet"


NAMES = {"prompt_column": "caption", "reference_column": "image", "id_column": "uid", "seed_column": "noise"}


def test_the_first_lines_of_a_run_tell_what_is_read_carried_and_left_out(
    settle: Callable[..., Job], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """How many rows have a prompt, reference, seed and id; what is carried and what is left out, with the reason; and,
    once, that weights in prompts are text. A resume tells what it need not count."""
    manifest = str(other_names(tmp_path / "other"))
    with caplog.at_level(logging.INFO, "vcf_batch"):
        claim.claim(settle(manifest=manifest, **NAMES))
    assert caplog.messages == [
        f"reading {manifest}",
        "columns: 2 rows, all with prompt, sample_id, seed; 1 with reference; reads 'prompt' from "
        "'caption', 'reference' from 'image', 'sample_id' from 'uid', 'seed' from 'noise'",
        "carried: text (not read as 'prompt'), at (nanoseconds become microseconds)",
        "left out: raw (it holds bytes)",
        "weights: 1 prompt has a weight such as (word:1.2), which is taken literally: it is text like any other",
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO, "vcf_batch"):
        settle(manifest=manifest, **NAMES)
    assert [line.split(":")[0] for line in caplog.messages[1:]] == ["columns", "carried", "left out"]


def test_names_of_columns_belong_to_the_run(settle: Callable[..., Job], tmp_path: Path, model: Path) -> None:
    """They are part of its fingerprint and of run.json; whoever opens the output reads the manifest by them. What is
    carried on purpose is recorded, and is no other run."""
    manifest, out = other_names(tmp_path / "other"), tmp_path / "out"
    assert {settle().fields[name] for name in NAMES} == {None}
    named = {**NAMES, "carry": ("text",), "shard_size": 2}
    runs.generate(manifest, out, model, steps=1, lpips="none", **named)
    record = json.loads((out / "run.json").read_text())
    assert {name: record["fields"][name] for name in NAMES} == NAMES
    assert (record["config"]["carry"], "carry" in record["fields"]) == (["text"], False)
    assert [row["key"] for row in runs.rows_of(out)] == ["k0", "k1"]
    assert [row["seed"] for row in runs.rows_of(out)] == [5, 6]
    opened = Output(str(out))
    assert [row.prompt for row in opened.need_manifest().rows(0, 2, 0)] == ["a cat", "a (red:1.2) dog"]
    assert [*verify.check(opened)] == []
    again = {"manifest": str(manifest), "steps": 1, "lpips": "none", "shard_size": 2}
    assert claim.claim(settle(**again, **NAMES)) == ()
    with pytest.raises(RefusedError, match='seed_column: "noise" there, nothing now'):
        claim.claim(settle(**again, **NAMES | {"seed_column": None}))
