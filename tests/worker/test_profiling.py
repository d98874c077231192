"""The trace of a shard."""

import dataclasses
import json
from pathlib import Path

import pytest

from support import runs
from vcf_batch.worker import clock, worker

pytestmark = pytest.mark.usefixtures("restored_torch")


def test_a_trace_shows_the_phases_of_a_shard_and_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--profile: a Chrome trace of the first batches, from every thread, in which the phases are named ranges."""
    monkeypatch.setattr(clock, "PROFILED_BATCHES", 3)
    manifest = runs.write_manifest(tmp_path / "in", 8, {"reference": ["reference0.png"] * 8})
    model = runs.save_model(tmp_path / "model")
    for name, profiled in (("plain", None), ("profiled", 0)):
        job = runs.settled(manifest, tmp_path / name, model, batch_size=2, shard_size=8)
        runs.commit(worker.load(dataclasses.replace(job, profiled=profiled)))
    assert runs.data_files(tmp_path / "profiled") == runs.data_files(tmp_path / "plain")
    assert not (tmp_path / "plain" / "profile").exists()
    events = json.loads((tmp_path / "profiled" / "profile" / "trace.json").read_text())["traceEvents"]
    ranges = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert {"read_manifest", "read_references", "sample", "score", "encode", "write"} <= {*ranges}
    assert ranges.count("wait_for_scores") == 3
    assert {"aten::conv2d", "aten::addmm"} <= {event["name"] for event in events}
