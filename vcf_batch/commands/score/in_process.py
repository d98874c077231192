"""Scoring in this process: two shards under way, so that one is read while the other is scored."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from vcf_batch.records import Shard
from vcf_batch.setup.shard_task import ShardTask
from vcf_batch.worker.scoring import worker
from vcf_batch.worker.scoring.worker import ScoredShard, ScoreJob

SHARDS_UNDER_WAY = 2


def score(job: ScoreJob, shards: Iterable[Shard]) -> Iterator[Sequence[ScoredShard]]:
    """Score shards, in order. The models are loaded for the first one.

    Raises:
        VcfBatchError: see :func:`vcf_batch.worker.scoring.worker.load` and :meth:`ScoringWorker.run`.
    """
    waiting = iter(shards)
    first = next(waiting, None)
    if first is None:
        return
    own = worker.load(job)
    threads = ThreadPoolExecutor(SHARDS_UNDER_WAY, "shards")
    try:
        begun = (threads.submit(own.run, ShardTask(shard), shard.name) for shard in itertools.chain((first,), waiting))
        window = deque(itertools.islice(begun, SHARDS_UNDER_WAY))
        while window:
            answer = window.popleft().result()
            window.extend(itertools.islice(begun, 1))
            assert answer, "it is no trial"
            yield answer[1]
    finally:
        threads.shutdown(cancel_futures=True)
