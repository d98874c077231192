"""Scoring in this process, in the place of a Ray cluster."""

from collections.abc import Iterator, Sequence

import pytest

from vcf_batch.output.lease import Lease
from vcf_batch.pool import scoring
from vcf_batch.pool.scoring import Commit
from vcf_batch.pool.signals import Signals
from vcf_batch.records import Shard
from vcf_batch.setup.shard_task import ShardTask
from vcf_batch.worker.scoring import worker
from vcf_batch.worker.scoring.job import ScoreJob


def score(job: ScoreJob, shards: Sequence[Shard], held: Lease, commit: Commit, signals: Signals) -> None:
    """What :func:`vcf_batch.pool.scoring.score` does, shard by shard."""
    own = worker.load(job)
    for shard in shards:
        answer = own.run(ShardTask(shard), shard.name)
        assert answer, "it is no trial"
        held.confirm()
        commit(answer[1])


@pytest.fixture(scope="package", autouse=True)
def in_this_process() -> Iterator[None]:
    """Let commands of this process score without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "score", score)
        yield
