"""Copy an output's committed shards, their scores, its card and its report to another storage."""

import contextlib
import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass

from vcf_batch import storage
from vcf_batch.commands.push_scores import PushedScores, push_scores
from vcf_batch.driver.progress import steps
from vcf_batch.errors import DamageFound, RefusedError, UsageError
from vcf_batch.output import receipts, run_file, shards
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Damaged, Receipt
from vcf_batch.output.shards import side_by_side
from vcf_batch.records import FileEntry, Shard
from vcf_batch.report import card, page
from vcf_batch.storage import scratch
from vcf_batch.storage.hub_commits import HubCommits, is_repository

ABANDONED_SECONDS = 3600.0
"""Seconds without a write after which an unfinished file in a local target counts as left by a push that was killed.
Another push may be at work there: it writes its files without a pause, so none of them is as old."""

COPY_TRIES = 3
"""Number of times that a shard is read until its files match its receipt, as a repair may replace it meanwhile."""
COPY_PAUSE_SECONDS = 1.0
"""Seconds between two tries."""


@dataclass(frozen=True)
class Pushed:
    """What became of the shards of a run in a push."""

    shards: int
    """Number of shards of the run."""
    copied: int
    there: int
    """Number of shards that the target had already."""
    damaged: Mapping[str, str]
    """Names of the shards that are left out because they are damaged, each with the reason."""
    unfinished: int
    """Number of shards that are left out because they are not generated yet."""
    first_unfinished: str | None
    """Name of the first of these."""
    scores: PushedScores
    """What became of the scores that were added to the output."""

    @property
    def left_out(self) -> list[str]:
        """Lines that say which shards are left out, and why."""
        damaged = {**self.damaged, **self.scores.damaged}
        lines = [f"{name} is left out, as it is damaged: {reason}" for name, reason in damaged.items()]
        if self.unfinished == 1:
            lines.append(f"{self.first_unfinished} is left out, as it is not generated yet")
        elif self.unfinished:
            others = f"{self.first_unfinished} and {self.unfinished - 1:,} more"
            lines.append(f"{others} are left out, as they are not generated yet")
        return lines


def push(output: Output, target: str) -> Pushed:
    """Copy the committed shards of an output.

    Scores that were added to them come behind, see :func:`vcf_batch.commands.push_scores.push_scores`.
    A shard's receipt is copied last, as in a run. So a shard that was copied in part does not exist, and calling this
    again continues the copy. On the Hub, all receipts are in the last commits, and files that are there are not sent
    again. Shards that are damaged or not generated yet are left out. Report and card are written
    anew first, except a card that somebody has changed. What a killed push left unfinished in a local target is deleted
    after :data:`ABANDONED_SECONDS`.

    Args:
        target: a folder or URL, such as ``hf://datasets/OWNER/NAME`` of an existing repository.

    Raises:
        RefusedError: the target holds another run.
        UsageError: the target is the output or lies in it, no shard is finished, or the target has another's card.
        DamageFound: the bytes of a shard do not match its receipt.
        StorageError: one of the storages failed.
    """
    target = storage.absolute(target)
    check_target(output.url, target)
    with contextlib.suppress(card.OthersCard):
        card.write(output)
    _refuse_others(output, target)
    storage.publish_bytes(storage.join(output.url, page.PAGE_NAME), page.render(output).encode())
    if is_repository(target):
        with HubCommits(target) as hub:
            tally = _push_to_hub(output, hub)
        return tally.pushed(push_scores(output, target, tally.handed_on, HubCommits))
    return _push_to_folder(output, target)


class _Tally:
    """Count of the shards of a push: those that are handed on, and those that are left out.

    Args:
        output: the output that is pushed.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._damaged: dict[str, str] = {}
        self._handed_on: dict[int, bool] = {}

    def finished(self) -> Iterator[Shard]:
        """Yield the shards that are committed, and note those that are damaged."""
        for found in self._output.examine():
            if isinstance(found, Damaged):
                self._damaged[found.name] = found.reason
            else:
                yield found.shard

    def note(self, shard: Shard, is_new: bool | None) -> None:
        """Note whether a shard was copied or was there; None takes back what was noted."""
        self._handed_on.pop(shard.index, None)
        if is_new is not None:
            self._handed_on[shard.index] = is_new

    @property
    def handed_on(self) -> Set[int]:
        """Indices of the shards that the target has."""
        return self._handed_on.keys()

    def pushed(self, scores: PushedScores) -> Pushed:
        """What became of the shards, and of their scores."""
        plan, counts = self._output.plan, Counter(self._handed_on.values())
        left_out = [each.name for each in plan if each.index not in self._handed_on and each.name not in self._damaged]
        first = left_out[0] if left_out else None
        return Pushed(len(plan), counts[True], counts[False], self._damaged, len(left_out), first, scores)


class _Folder:
    """The target of a push on any storage, as it was at the beginning, with what has been removed since.

    Args:
        url: the target.

    Raises:
        StorageError: the storage failed.
    """

    compares_contents = False
    """Whether :meth:`holds` compares contents, rather than sizes."""

    def __init__(self, url: str) -> None:
        self._url = url
        with storage.refusals_as_storage_errors():
            self._sizes = dict(storage.list_files(url))

    def has(self, name: str) -> bool:
        return name in self._sizes

    def holds(self, name: str, entry: FileEntry) -> bool:
        return self._sizes.get(name) == entry.size

    def holds_bytes(self, name: str, data: bytes) -> bool:
        with storage.refusals_as_storage_errors():
            return self.has(name) and storage.read_bytes(storage.join(self._url, name)) == data

    def remove(self, name: str) -> None:
        del self._sizes[name]
        storage.remove(storage.join(self._url, name), missing_ok=True)

    def put(self, path: str, name: str) -> None:
        storage.upload(path, storage.join(self._url, name))

    def put_bytes(self, name: str, data: bytes) -> None:
        storage.publish_bytes(storage.join(self._url, name), data)


def _push_to_folder(output: Output, target: str) -> Pushed:
    """Copy shard by shard, several at the same time, each receipt after its shard's files."""
    storage.remove_unfinished(target, ABANDONED_SECONDS)
    folder, tally = _Folder(target), _Tally(output)
    _copy(output, folder, run_file.RUN_FILE_NAME)

    def copy(shard: Shard) -> bool | None:
        return _copy_shard(output, folder, shard, folder.put_bytes)

    for shard, is_new in steps(side_by_side(copy, tally.finished()), "copying", len(output.plan), "shard"):
        tally.note(shard, is_new)
    scores = push_scores(output, target, tally.handed_on, lambda url: contextlib.nullcontext(_Folder(url)))
    for name in (card.CARD_NAME, page.PAGE_NAME):
        _copy(output, folder, name)
    return tally.pushed(scores)


def _push_to_hub(output: Output, hub: HubCommits) -> _Tally:
    """Copy all files of shards, and then all receipts, in few commits.

    A shard whose receipt has changed meanwhile, because a repair has replaced it, is copied again.
    """
    tally = _Tally(output)
    for name in (run_file.RUN_FILE_NAME, card.CARD_NAME, page.PAGE_NAME):
        with storage.refusals_as_storage_errors():
            hub.put_bytes(name, storage.read_bytes(storage.join(output.url, name)))
    digests: dict[str, str] = {}
    """SHA-256 of each receipt whose files are copied, by its name."""

    def remember(name: str, data: bytes) -> None:
        digests[name] = hashlib.sha256(data).hexdigest()

    def publish(shard: Shard) -> bool:
        """Copy a shard's receipt; return whether it was still the one that was remembered."""
        name = shard.name + receipts.RECEIPT_SUFFIX
        data = receipts.content(output.url, shard.name)
        if not data or hashlib.sha256(data).hexdigest() != digests.pop(name):
            return False
        hub.put_bytes(name, data)
        return True

    left: Iterable[Shard] = tally.finished()
    count = len(output.plan)
    for _ in range(COPY_TRIES):
        sent: list[Shard] = []
        for shard in steps(left, "copying", count, "shard"):
            is_new = _copy_shard(output, hub, shard, remember)
            tally.note(shard, is_new)
            sent += [shard] if is_new else []
        left = [shard for shard in sent if not publish(shard)]
        count = len(left)
    for shard in left:
        tally.note(shard, None)
    return tally


def check_target(output: str, target: str) -> None:
    """Refuse a target that is the output or lies in it, where its files would be taken for the output's own.

    Raises:
        UsageError: the target cannot be pushed to.
    """
    there, here = (_place(storage.absolute(url)) for url in (target, output))
    if there == here:
        raise UsageError(f"{target} is the output itself; name another place")
    if there.startswith(here.rstrip("/") + "/"):
        raise UsageError(f"{target} lies in the output {output}; name a place outside of it")


def _place(url: str) -> str:
    return os.path.realpath(url) if storage.is_local(url) else storage.join(url)


def _refuse_others(output: Output, target: str) -> None:
    """Refuse a target that holds another run or somebody else's card, so that neither is replaced."""
    record = run_file.read(target)
    if record is not None and record.fingerprint not in output.fingerprints:
        raise RefusedError(f"{target} holds another run; push to another place")
    if record is None and receipts.files_found(target):
        raise RefusedError(f"{target} holds shards but no {run_file.RUN_FILE_NAME}; push to another place")
    there = card.read(storage.join(target, card.CARD_NAME))
    if there is not None and not card.is_ours(there) and there != card.read(storage.join(output.url, card.CARD_NAME)):
        raise UsageError(f"{target} has a {card.CARD_NAME} of somebody else's; copy it into {output.url}, or delete it")


def _copy_shard(
    output: Output, target: _Folder | HubCommits, shard: Shard, publish: Callable[[str, bytes], None]
) -> bool | None:
    """Copy a shard as its receipt describes it, unless the target has it already by its files and receipt.

    Args:
        publish: takes name and content of the receipt after the shard's files are copied.

    Returns:
        Whether it was copied; None if it has no receipt any more, because it is being generated again.

    Raises:
        DamageFound: the bytes of a file do not match the receipt, and both stay the same.
    """
    name = shard.name + receipts.RECEIPT_SUFFIX
    reason = ""
    for number in range(COPY_TRIES):
        if number:
            time.sleep(COPY_PAUSE_SECONDS)
        data = receipts.content(output.url, shard.name)
        if not data:  # An empty one is just being written.
            reason = ""
            continue
        try:
            receipt = Receipt.from_json(data)
        except ValueError as error:
            reason = f"{name} is damaged: {error}"
            continue
        entries = {shards.file_name(shard, kind): entry for kind, entry in receipt.files.items()}
        surplus = [file for file in receipts.surplus(receipt) if target.has(file)]
        if target.has(name):
            is_whole = not surplus and all(target.holds(file, entry) for file, entry in entries.items())
            if is_whole and target.holds_bytes(name, data):
                return False
            target.remove(name)
        for file in surplus:
            target.remove(file)
        for file, entry in entries.items():
            if target.compares_contents and target.holds(file, entry):
                continue
            try:
                # A copy of its own: what was compared with the receipt is what is sent, whatever becomes of the file.
                with _at_hand(storage.join(output.url, file)) as path:
                    if storage.digest(path) != entry:
                        reason = f"{file} does not match its receipt"
                        break
                    target.put(path, file)
            except FileNotFoundError:
                reason = f"{file} is missing"
                break
        else:
            publish(name, data)
            return True
    if reason:
        raise DamageFound(f"{reason}; see 'vcf-batch verify {output.url}'")
    return None


def _copy(output: Output, target: _Folder, name: str) -> None:
    with _at_hand(storage.join(output.url, name)) as path:
        target.put(path, name)


@contextlib.contextmanager
def _at_hand(url: str) -> Iterator[str]:
    """The path of a local copy of the file, which nobody else changes. It is valid inside the block only."""
    with scratch.folder() as folder:
        path = storage.join(folder, storage.name(url))
        with storage.refusals_as_storage_errors():
            storage.download(url, path)
        yield path
