"""Copy an output's committed shards, its card and its report to another storage."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping

from vcf_batch import storage
from vcf_batch.errors import DamageFound, RefusedError, UsageError
from vcf_batch.output import receipts, run_file, shards
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Receipt
from vcf_batch.output.shards import side_by_side
from vcf_batch.records import Shard
from vcf_batch.report import card, page
from vcf_batch.storage import scratch

ABANDONED_SECONDS = 3600.0
"""Seconds without a write after which an unfinished file in a local target counts as left by a push that was killed.
Another push may be at work there: it writes its files without a pause, so none of them is as old."""


def push(output: Output, target: str) -> tuple[int, int]:
    """Copy the committed shards of an output.

    A shard's receipt is copied last, as in a run. So a shard that was copied in part does not exist, and calling this
    again continues the copy. Report and card are written anew first, except a card that somebody has changed. What a
    killed push left unfinished in a local target is deleted after :data:`ABANDONED_SECONDS`.

    Args:
        target: a folder or URL, such as ``hf://datasets/OWNER/NAME`` of an existing repository.

    Returns:
        Number of shards that were copied, and number that were there already.

    Raises:
        RefusedError: the target holds another run.
        UsageError: the target is the output itself, no shard is finished, or the target has somebody else's card.
        DamageFound: a shard does not match its receipt.
        StorageError: one of the storages failed.
    """
    target = storage.absolute(target)
    if storage.join(target) == storage.join(output.url):
        raise UsageError(f"{target} is the output itself; name another place")
    with contextlib.suppress(card.OthersCard):
        card.write(output)
    _refuse_others(output, target)
    storage.remove_unfinished(target, ABANDONED_SECONDS)
    storage.publish_bytes(storage.join(output.url, page.PAGE_NAME), page.render(output).encode())
    _copy(storage.join(output.url, run_file.RUN_FILE_NAME), storage.join(target, run_file.RUN_FILE_NAME))
    with storage.refusals_as_storage_errors():
        sizes = storage.list_files(target)

    def copy(shard: Shard) -> bool:
        return _copy_shard(output.url, target, shard, sizes)

    finished = (receipt.shard for receipt in receipts.read(output.url))
    # On the Hub each file is a commit, and two commits at the same time conflict.
    one_by_one = target.startswith("hf://")
    done = ((shard, copy(shard)) for shard in finished) if one_by_one else side_by_side(copy, finished)
    counts = Counter(is_new for _, is_new in done)
    for name in (card.CARD_NAME, page.PAGE_NAME):
        _copy(storage.join(output.url, name), storage.join(target, name))
    return counts[True], counts[False]


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


def _copy_shard(source: str, target: str, shard: Shard, sizes: Mapping[str, int]) -> bool:
    """Copy a shard unless the target has it already, by ``sizes`` and the receipt. Return whether it was copied."""
    name = shard.name + receipts.RECEIPT_SUFFIX
    try:
        data = storage.read_bytes(storage.join(source, name))
        receipt = Receipt.from_json(data)
    except (FileNotFoundError, ValueError) as error:
        raise DamageFound(f"{name} was removed or damaged during the push; see 'vcf-batch verify {source}'") from error
    files = {shards.file_name(shard, kind): entry for kind, entry in receipt.files.items()}
    if name in sizes:
        is_whole = all(sizes.get(file) == entry.size for file, entry in files.items())
        if is_whole and storage.read_bytes(storage.join(target, name)) == data:
            return False
        storage.remove(storage.join(target, name), missing_ok=True)
    for file, entry in files.items():
        with _at_hand(storage.join(source, file)) as path:
            if storage.digest(path) != entry:
                raise DamageFound(f"{file} does not match its receipt; see 'vcf-batch verify {source}'")
            storage.upload(path, storage.join(target, file))
    storage.publish_bytes(storage.join(target, name), data)
    return True


def _copy(source: str, target: str) -> None:
    with _at_hand(source) as path:
        storage.upload(path, target)


@contextlib.contextmanager
def _at_hand(url: str) -> Iterator[str]:
    """A local path of the file, which is valid inside the block only."""
    if storage.is_local(url):
        yield storage.absolute(url)
        return
    with scratch.folder() as folder:
        path = storage.join(folder, storage.name(url))
        storage.download(url, path)
        yield path
