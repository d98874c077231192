"""The loop of a run scores shards too: trouble is repeated, and a row that kills its worker costs itself alone."""

import itertools
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from support import runs, simulated
from vcf_batch import storage
from vcf_batch.commands.score import wanted as wants
from vcf_batch.commands.score.command import scoring_config
from vcf_batch.commands.score.scoring import Added, _Committing, _lacking
from vcf_batch.driver.cluster import Answer, Heartbeat, Loaded, Request, WorkerHandle
from vcf_batch.driver.commit_queue import CommitQueue
from vcf_batch.driver.fault import Fault
from vcf_batch.driver.ledger import Ledger
from vcf_batch.driver.loop import Loop
from vcf_batch.driver.progress import Progress
from vcf_batch.errors import StorageError, UsageError
from vcf_batch.output import lease
from vcf_batch.output.output import Output
from vcf_batch.output.scores.store import ScoreStore
from vcf_batch.pool.scoring import _Silent
from vcf_batch.worker.scoring import worker
from vcf_batch.worker.scoring.job import ScoreJob

World = Callable[[Request], Fault | None]
"""Function that gives the fault that a ``run`` ends with, if any."""


class HereCluster:
    """A cluster of one node whose workers are in this process, one after the other, on a clock of its own."""

    def __init__(self, job: ScoreJob, world: World) -> None:
        self._worker, self._world = worker.load(job), world
        self._answers: dict[Hashable, Answer] = {}
        self._numbers, self._clock = itertools.count(), 0.0

    def now(self) -> float:
        return self._clock

    def sleep(self, seconds: float) -> None:
        self._clock += seconds

    def new_id(self) -> str:
        return str(next(self._numbers))

    def start(self, left_out: Sequence[str]) -> Any:
        return object()

    def send(self, request: Request) -> Hashable:
        key = next(self._numbers)
        self._answers[key] = self._answer(request)
        return key

    def _answer(self, request: Request) -> Answer:
        if request.task is None:
            return Heartbeat("node", {}, {}) if request.method == "heartbeat" else Loaded({"type": "here"})
        if fault := self._world(request):
            return fault
        try:
            return self._worker.run(request.task, request.attempt_id)
        except Exception as error:
            return Fault.of(error, "node")

    def wait(self, requests: Mapping[Hashable, Request], seconds: float) -> list[tuple[Request, Answer]]:
        self._clock += 1.0
        return [(request, self._answers[key]) for key, request in requests.items()]

    def kill(self, worker: WorkerHandle) -> None:
        """Nothing runs here beside this process."""

    def room(self) -> dict[str, int]:
        return {"node": 1}

    def describe(self) -> str:
        return "one worker here"


@pytest.fixture
def output(tmp_path: Path, restored_torch: None) -> Path:
    runs.write_output(runs.write_manifest(tmp_path / "in", 10), tmp_path / "out", 4)
    return tmp_path / "out"


def score(url: Path, world: World) -> Added:
    """Score an output by the loop."""
    output = Output(str(url))
    scores = wants.resolve([wants.parse("texture")], None, [])
    store = ScoreStore(output.url)
    added = Added([each.definition for each in scores])
    with lease.hold(output.url) as held:
        shards = [*_lacking(output, store, added)]
        committing = _Committing(output, store, added)
        job = ScoreJob(output, scoring_config(output, {}), scores, held.token)
        here = HereCluster(job, world)
        ledger = Ledger.of(shards, here.now)

        def put(output_url: str, receipt: Any, scored: Any, stays: Any) -> Any:
            committing(scored)
            return receipt

        with Progress(10, 0, None) as progress:
            queue = CommitQueue(output.url, held, ledger, progress.note, here.now, simulated.AtOnce(), put=put)
            Loop(job, here, ledger, queue, progress, _Silent()).run()
    return added


def values(output: Path) -> dict[str, float | None]:
    tables = [pq.read_table(path) for path in sorted(output.glob("_scores/texture/*.parquet"))]
    return {row["key"]: row["texture"] for table in tables for row in table.to_pylist()}


def test_every_shard_is_scored_once(output: Path) -> None:
    """And no file of the run is written, its progress file included."""
    assert score(output, lambda request: None).scored == 3
    assert len(values(output)) == 10 and not (output / "_progress.json").exists()
    assert score(output, lambda request: None).scored == 0


def test_trouble_is_repeated(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a worker, and of a commit; the bytes are those of a call without it."""
    failed: set[str] = set()

    def once(name: str) -> bool:
        return name not in failed and not failed.add(name)  # type: ignore[func-returns-value]

    def world(request: Request) -> Fault | None:
        assert request.task
        shard = request.task.shard.name
        return Fault.of(StorageError("the network is down"), "node") if once(shard) else None

    publish = storage.publish_bytes

    def publishing(url: str, data: bytes, create: bool = False) -> None:
        if "_scores/texture/" in url and once(url):
            raise StorageError("the store is down")
        publish(url, data, create)

    monkeypatch.setattr(storage, "publish_bytes", publishing)
    assert score(output, world).scored == 3
    monkeypatch.undo()
    found = {path.name: path.read_bytes() for path in output.glob("_scores/texture/*.parquet")}
    for path in output.glob("_scores/texture/*"):
        path.unlink()
    score(output, lambda request: None)
    assert {path.name: path.read_bytes() for path in output.glob("_scores/texture/*.parquet")} == found


def test_a_row_that_kills_its_worker_costs_itself_alone(output: Path) -> None:
    """It is found, has no score, and the receipt says why; every other row has its score."""

    def world(request: Request) -> Fault | None:
        assert request.task
        return simulated.death("node") if 5 in simulated.rows_of(request.task) else None

    added = score(output, world)
    found = values(output)
    assert added.scored == 3 and added.without == 1 and simulated.SYMPTOM in str(added.reason)
    expected = [row for row in range(10) if row == 5 or row % 5 == 4]  # every fifth row has no reference
    assert [int(key) for key, value in found.items() if value is None] == expected
    receipt = json.loads((output / "_scores/texture/00001_stats.json").read_text())
    assert receipt["without"] == 1 and receipt["reason"].startswith("000000005")


def test_a_fault_of_a_function_ends_the_call(output: Path) -> None:
    """Nothing is repeated that can only fail again."""
    with pytest.raises(UsageError, match="the function"):
        score(output, lambda request: Fault.of(UsageError("the function m:f fails"), "node"))
