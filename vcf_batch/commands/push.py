"""Copy an output's committed shards, its card and its report to another storage."""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vcf_batch import storage
from vcf_batch.errors import DamageFound, RefusedError, UsageError
from vcf_batch.output import receipts, run_file, shards
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Damaged, Receipt
from vcf_batch.output.shards import side_by_side
from vcf_batch.records import Shard
from vcf_batch.report import card, page
from vcf_batch.storage import scratch

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

    @property
    def left_out(self) -> list[str]:
        """Lines that say which shards are left out, and why."""
        lines = [f"{name} is left out, as it is damaged: {reason}" for name, reason in self.damaged.items()]
        if self.unfinished == 1:
            lines.append(f"{self.first_unfinished} is left out, as it is not generated yet")
        elif self.unfinished:
            others = f"{self.first_unfinished} and {self.unfinished - 1:,} more"
            lines.append(f"{others} are left out, as they are not generated yet")
        return lines


def push(output: Output, target: str) -> Pushed:
    """Copy the committed shards of an output.

    A shard's receipt is copied last, as in a run. So a shard that was copied in part does not exist, and calling this
    again continues the copy. Shards that are damaged or not generated yet are left out. Report and card are written
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
    storage.remove_unfinished(target, ABANDONED_SECONDS)
    storage.publish_bytes(storage.join(output.url, page.PAGE_NAME), page.render(output).encode())
    _copy(storage.join(output.url, run_file.RUN_FILE_NAME), storage.join(target, run_file.RUN_FILE_NAME))
    with storage.refusals_as_storage_errors():
        sizes = storage.list_files(target)
    damaged: dict[str, str] = {}

    def finished() -> Iterator[Shard]:
        for found in output.examine():
            if isinstance(found, Damaged):
                damaged[found.name] = found.reason
            else:
                yield found.shard

    def copy(shard: Shard) -> bool | None:
        return _copy_shard(output, target, shard, sizes)

    # On the Hub each file is a commit, and two commits at the same time conflict.
    one_by_one = target.startswith("hf://")
    done = ((shard, copy(shard)) for shard in finished()) if one_by_one else side_by_side(copy, finished())
    counts: Counter[bool] = Counter()
    handed_on: set[int] = set()
    for shard, is_new in done:
        if is_new is not None:
            counts[is_new] += 1
            handed_on.add(shard.index)
    for name in (card.CARD_NAME, page.PAGE_NAME):
        _copy(storage.join(output.url, name), storage.join(target, name))
    unfinished = [each.name for each in output.plan if each.index not in handed_on and each.name not in damaged]
    first = unfinished[0] if unfinished else None
    return Pushed(len(output.plan), counts[True], counts[False], damaged, len(unfinished), first)


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


def _copy_shard(output: Output, target: str, shard: Shard, sizes: Mapping[str, int]) -> bool | None:
    """Copy a shard as its receipt describes it, unless the target has it already by ``sizes`` and the receipt.

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
        if data is None:
            reason = ""
            continue
        try:
            receipt = Receipt.from_json(data)
        except ValueError as error:
            reason = f"{name} is damaged: {error}"
            continue
        entries = {shards.file_name(shard, kind): entry for kind, entry in receipt.files.items()}
        surplus = [file for file in receipts.surplus(receipt) if file in sizes]
        if name in sizes:
            is_whole = not surplus and all(sizes.get(file) == entry.size for file, entry in entries.items())
            if is_whole and storage.read_bytes(storage.join(target, name)) == data:
                return False
            storage.remove(storage.join(target, name), missing_ok=True)
        for file in surplus:
            storage.remove(storage.join(target, file), missing_ok=True)
        for file, entry in entries.items():
            try:
                # A copy of its own: what was compared with the receipt is what is sent, whatever becomes of the file.
                with _at_hand(storage.join(output.url, file)) as path:
                    if storage.digest(path) != entry:
                        reason = f"{file} does not match its receipt"
                        break
                    storage.upload(path, storage.join(target, file))
            except FileNotFoundError:
                reason = f"{file} is missing"
                break
        else:
            storage.publish_bytes(storage.join(target, name), data)
            return True
    if reason:
        raise DamageFound(f"{reason}; see 'vcf-batch verify {output.url}'")
    return None


def _copy(source: str, target: str) -> None:
    with _at_hand(source) as path:
        storage.upload(path, target)


@contextlib.contextmanager
def _at_hand(url: str) -> Iterator[str]:
    """The path of a local copy of the file, which nobody else changes. It is valid inside the block only."""
    with scratch.folder() as folder:
        path = storage.join(folder, storage.name(url))
        with storage.refusals_as_storage_errors():
            storage.download(url, path)
        yield path
