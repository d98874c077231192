"""The queue of finished shards, which are committed to the output beside the loop, several at a time."""

import dataclasses
import logging
from collections.abc import Callable, Container, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, Self

from vcf_batch.driver import failing_shard
from vcf_batch.driver.ledger import MAX_SET_ASIDE, Ledger
from vcf_batch.errors import StorageError, VcfBatchError
from vcf_batch.output import commits
from vcf_batch.output.commits import StagedFilesLost
from vcf_batch.output.lease import Lease
from vcf_batch.output.receipts import Receipt
from vcf_batch.setup.shard_task import ShardTask

COMMITS_AT_ONCE = 64
"""Most commits under way. One takes seconds on an object store: more than a dozen requests follow one another, and the
server copies the files. One at a time would keep a hundred GPUs waiting."""

MAX_PENDING = 256
"""Largest number of finished shards that wait for their commit. At this number no further shard is begun, which bounds
the staged files."""


@dataclass(frozen=True)
class Finished:
    """A shard that a worker has generated and staged."""

    task: ShardTask
    node: str
    receipt: Receipt
    staged: Any
    """What the commit takes: the staged files by kind. :func:`vcf_batch.output.commits.commit` removes each entry once
    its file is moved."""


@dataclass
class _Commit:
    """A finished shard until it is committed or given up."""

    finished: Finished
    under_way: Future[Receipt] | None = None
    """The commit under way; None while the shard waits for its next try."""
    failures: int = 0
    not_before: float = 0.0
    """Earliest time of the next try, on the clock."""


class CommitQueue:
    """Queue that begins to commit shards in the order in which they are added.

    Use it with ``with``: leaving the block waits for the commits under way.

    A commit that fails is tried again after each of :data:`vcf_batch.driver.failing_shard.PAUSES`, from the same staged
    files. From then on commits are tried one at a time, until one succeeds: a storage that is down for a while must not
    use up the tries of all.

    A shard is doubtful if every row is blamed for the death of its workers: only a sample of another shard can show
    that workers are healthy. It waits until there is such a sample, or until nothing else is left. So its outcome does
    not depend on the order of the shards.

    Args:
        output: URL of the run's output.
        held: the lease on the output, confirmed before each commit.
        ledger: the ledger of the run.
        note: logs each commit that fails and is tried again: see :meth:`vcf_batch.driver.progress.Progress.note`.
        now: reads the clock.
        executor: carries out the commits, and is shut down at the end.
        check: raises if the output does not hold the record of this run any more. Called before each commit.
        put: the commit itself, which takes the output, the receipt, what is staged, and the fingerprints of shards that
            are not replaced; None is :func:`vcf_batch.output.commits.commit`.
    """

    def __init__(
        self,
        output: str,
        held: Lease,
        ledger: Ledger,
        note: Callable[..., None],
        now: Callable[[], float],
        executor: Executor,
        check: Callable[[], object] = lambda: None,
        put: Callable[[str, Receipt, Any, Container[str]], Receipt] | None = None,
    ) -> None:
        self._output, self._lease, self._ledger = output, held, ledger
        self._note, self._now, self._executor, self._check, self._put = note, now, executor, check, put
        self._pending: list[_Commit] = []
        self._doubtful: list[Finished] = []
        self._in_trouble = False
        """Whether a commit has failed since one last succeeded."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def __len__(self) -> int:
        return len(self._pending) + len(self._doubtful)

    @property
    def is_full(self) -> bool:
        """Whether :data:`MAX_PENDING` shards are pending, so that no further one should be begun."""
        return len(self) >= MAX_PENDING

    def raise_if_lost(self) -> None:
        """Raise if another driver is known to own the output.

        Raises:
            RefusedError: another driver owns it.
        """
        if self._lease.lost:
            raise self._lease.lost

    def add(self, finished: Finished) -> None:
        """Queue a shard for its commit."""
        if finished.task.verdicts and not finished.receipt.sampled:
            self._doubtful.append(finished)
        else:
            self._pending.append(_Commit(finished))
            self._begin()

    def outcomes(self) -> Iterator[tuple[Finished, BaseException | None]]:
        """Yield the shards that were committed since the last call, and those that failed for good, with the reason.

        A committed shard comes with the receipt that it has now, which is another one if the shard was there already.
        Where the reason is :class:`vcf_batch.output.commits.StagedFilesLost`, the shard has to be generated again.
        """
        yield from self._judged()
        for commit in [*self._pending]:
            if commit.under_way is not None and commit.under_way.done():
                error = commit.under_way.exception()
                self._in_trouble = isinstance(error, StorageError) and not isinstance(error, StagedFilesLost)
                if isinstance(error, StorageError) and self._wait(commit, error):
                    continue
                self._pending.remove(commit)
                finished = commit.finished
                if error is None and (there := commit.under_way.result()) is not finished.receipt:
                    # The shard was there already, and nothing of this attempt is recorded.
                    task = dataclasses.replace(finished.task, verdicts={})
                    finished = dataclasses.replace(finished, task=task, receipt=there)
                yield finished, error
        self._begin()

    def _judged(self) -> Iterator[tuple[Finished, VcfBatchError]]:
        """Decide on the doubtful shards as soon as that is possible, and yield those that are refused."""
        left = self._doubtful
        if self._ledger.totals.sampled:
            self._pending += map(_Commit, left)
        elif self._ledger.left == len(left) or len(left) == MAX_SET_ASIDE:
            doubt = "rows seem to kill their workers, but nothing that was generated shows that these are healthy"
            yield from [(finished, VcfBatchError(f"{len(finished.task.verdicts)} {doubt}")) for finished in left]
        else:
            return
        self._doubtful = []

    def _wait(self, commit: _Commit, error: StorageError) -> bool:
        """Let a commit wait for another try; return False if there is none."""
        if isinstance(error, StagedFilesLost) or commit.failures >= len(failing_shard.PAUSES):
            return False
        commit.not_before = self._now() + failing_shard.PAUSES[commit.failures]
        commit.failures += 1
        commit.under_way = None
        self._note(
            f"shard {commit.finished.task.title}: its commit failed and is repeated: {error}",
            "commit_failed",
            logging.WARNING,
            shard=commit.finished.task.shard.name,
        )
        return True

    def _begin(self) -> None:
        """Begin the commits that are due, as many as may be under way: those first that have failed least, in order."""
        free = 1 if self._in_trouble else COMMITS_AT_ONCE
        free -= sum(commit.under_way is not None for commit in self._pending)
        for commit in sorted(self._pending, key=lambda commit: commit.failures):
            if free > 0 and commit.under_way is None and self._now() >= commit.not_before:
                commit.under_way = self._executor.submit(self._commit, commit.finished)
                free -= 1

    def _commit(self, finished: Finished) -> Receipt:
        self._lease.confirm()
        self._check()
        stays = self._ledger.stays(finished.task.shard)
        put = self._put or commits.commit
        return put(self._output, finished.receipt, finished.staged, stays)
