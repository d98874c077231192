"""Bugs of kinds that such systems have had, each as a change of the product. The simulation has to find them all."""

import contextlib
import dataclasses
from collections.abc import Callable, Container, Mapping
from typing import Any

import pytest

from vcf_batch import storage
from vcf_batch.driver import bisection, failing_shard, workers
from vcf_batch.driver.commit_queue import CommitQueue, Finished
from vcf_batch.driver.failing_shard import FailingShard
from vcf_batch.driver.heartbeats import Watch
from vcf_batch.driver.loop import Loop
from vcf_batch.driver.workers import Workers
from vcf_batch.output import commits, lease, receipts
from vcf_batch.output.lease import Lease
from vcf_batch.output.receipts import Receipt
from vcf_batch.storage import writing
from vcf_batch.storage.retries import Kinds

Plant = Callable[[pytest.MonkeyPatch], None]


def commit_before_confirm(patch: pytest.MonkeyPatch) -> None:
    """A shard is committed without a look at the lease."""

    def commit(self: CommitQueue, finished: Finished) -> Receipt:
        stays = self._ledger.stays(finished.task.shard)
        return commits.commit(self._output, finished.receipt, finished.staged, stays)

    patch.setattr(CommitQueue, "_commit", commit)


def done_before_the_receipt(patch: pytest.MonkeyPatch) -> None:
    """A shard counts as done once its commit has begun."""

    def outcomes(self: CommitQueue) -> Any:
        for commit in [*self._pending]:
            self._pending.remove(commit)
            yield commit.finished, None

    patch.setattr(CommitQueue, "outcomes", outcomes)


def blame_after_one_death(patch: pytest.MonkeyPatch) -> None:
    """A shard is bisected after its first death, and a row that is alone when its worker dies is blamed at once."""
    patch.setattr(bisection, "REPEATS", 1)
    patch.setattr(failing_shard, "PAUSES", ())


def shard_in_flight_forgotten(patch: pytest.MonkeyPatch) -> None:
    """The shards of a worker that ends are not queued again."""
    patch.setattr(Workers, "let_go", _without_repeat(Workers.let_go))


def _without_repeat(let_go: Callable[..., None]) -> Callable[..., None]:
    def forgetting(self: Workers, worker: Any) -> None:
        queue, self._queue = self._queue, _Forgets()  # type: ignore[assignment]
        try:
            let_go(self, worker)
        finally:
            self._queue = queue

    return forgetting


class _Forgets:
    def repeat(self, task: Any) -> None:
        pass


def attempt_name_reused(patch: pytest.MonkeyPatch) -> None:
    """Staged files bear the name of the shard and the number of its attempt alone."""

    def ask(self: Workers, worker: Any, method: Any, task: Any = None) -> None:
        request = workers.Request(worker, method, task, f"{task.shard.name}-{task.attempt}" if task else "")
        request.key = self._cluster.send(request)
        self.requests[request.key] = request
        worker.requests.append(request)

    patch.setattr(Workers, "ask", ask)


def sizes_not_checked(patch: pytest.MonkeyPatch) -> None:
    """Staged files are committed whatever their sizes are."""
    commit = commits.commit

    def trusting(output: str, receipt: Receipt, staged: dict[str, str], stays: Container[str] = frozenset()) -> Receipt:
        sizes = {
            kind: dataclasses.replace(receipt.files[kind], size=storage.size(storage.join(output, path)))
            for kind, path in staged.items()
            if storage.exists(storage.join(output, path))
        }
        return commit(output, dataclasses.replace(receipt, files={**receipt.files, **sizes}), staged, stays)

    patch.setattr(commits, "commit", trusting)


def retry_without_bound(patch: pytest.MonkeyPatch) -> None:
    """A row that kills its worker is tried again for ever."""
    patch.setattr(failing_shard, "PAUSES", (10.0,) * 100_000)


def lease_taken_by_a_clock(patch: pytest.MonkeyPatch) -> None:
    """A lease counts as dead a while after it was taken, whatever its heartbeat says."""
    acquire = Lease.acquire

    def impatient(self: Lease) -> None:
        begin = lease.time.monotonic()
        patched = lease._is_gone

        def old(owner: dict[str, Any]) -> bool:
            return patched(owner) or lease.time.monotonic() - begin > 10

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(lease, "_is_gone", old)
            acquire(self)

    patch.setattr(Lease, "acquire", impatient)


def staging_cleaned_while_a_replacement_waits(patch: pytest.MonkeyPatch) -> None:
    """What a killed driver has staged is deleted, the new receipt of a replacement among it."""

    def clean(output: str, confirm: Callable[[], object] = lambda: None) -> None:
        storage.remove_tree(storage.join(output, commits.STAGING))
        commits._delete_strays(output, confirm)

    patch.setattr(commits, "clean", clean)


def older_receipt_stays(patch: pytest.MonkeyPatch) -> None:
    """A shard is replaced while its older receipt stands beside the files."""
    move = storage.move

    def kept(source: str, target: str, version: str | None = None) -> None:
        if target.endswith(commits._OLD_RECEIPT):
            return
        move(source, target, version)

    patch.setattr(storage, "move", kept)


def receipt_first(patch: pytest.MonkeyPatch) -> None:
    """The receipt is published before the files."""

    def commit(output: str, receipt: Receipt, staged: dict[str, str], stays: Container[str] = frozenset()) -> Receipt:
        url = storage.join(output, receipt.shard.name + receipts.RECEIPT_SUFFIX)
        storage.publish_bytes(url, receipt.to_json())
        for path in staged.values():
            storage.move(storage.join(output, path), storage.join(output, storage.name(path)))
        return receipt

    patch.setattr(commits, "commit", commit)


def innocent_on_a_bad_node(patch: pytest.MonkeyPatch) -> None:
    """A verdict counts though its row died on one node alone, and another one generated the rest."""
    patch.setattr(FailingShard, "is_proven", lambda self, task, node: True)


def lost_answer_swallowed(patch: pytest.MonkeyPatch) -> None:
    """A file whose upload got no answer counts as written."""
    retried = writing.retried

    def trusting(action: str, url: str, call: Callable[[], Any], stay: Kinds, needed: int | None = None) -> Any:
        def once() -> None:
            if action in ("write", "upload"):
                with contextlib.suppress(ConnectionError, TimeoutError):
                    call()
            else:
                call()

        retried(action, url, once, stay, needed)

    patch.setattr(writing, "retried", trusting)


def silence_unheard(patch: pytest.MonkeyPatch) -> None:
    """Nobody notices a worker that hangs."""
    patch.setattr(Watch, "timed_out", lambda self, requests: iter(()))


def second_shard_blamed(patch: pytest.MonkeyPatch) -> None:
    """Where a worker had two shards, one of them is not repeated."""
    patch.setattr(Loop, "_undecided", lambda self, tasks, fault: None)


PLANTED: Mapping[str, Plant] = {
    plant.__name__: plant
    for plant in (
        commit_before_confirm,
        done_before_the_receipt,
        blame_after_one_death,
        shard_in_flight_forgotten,
        attempt_name_reused,
        sizes_not_checked,
        retry_without_bound,
        lease_taken_by_a_clock,
        staging_cleaned_while_a_replacement_waits,
        older_receipt_stays,
        receipt_first,
        innocent_on_a_bad_node,
        lost_answer_swallowed,
        silence_unheard,
        second_shard_blamed,
    )
}
