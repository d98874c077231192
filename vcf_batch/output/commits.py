"""The protocol that commits a shard: a worker stages its files, the driver alone commits them, receipt last.

A worker stages its files under a name of its own attempt (:func:`stage`), so no two attempts share a name, even if a
worker that was declared dead lives on. The driver moves the files to their final names and then publishes the receipt
(:func:`commit`). At every start it deletes files that were staged but never committed (:func:`clean`).

Before a shard is replaced, its new receipt is written beside the staged files. If the driver dies after that, the next
start finds everything it needs to finish the replacement, so samples that were to be kept are never lost.
"""

import contextlib
from collections.abc import Callable, Mapping

from vcf_batch import storage
from vcf_batch.errors import StorageError
from vcf_batch.output import receipts
from vcf_batch.output.receipts import Receipt
from vcf_batch.output.shards import ShardFiles
from vcf_batch.records import Shard

STAGING = "_staging"
"""Folder of the output for files that are not committed yet. Each attempt has a folder of its own in it."""
_NEW_RECEIPT, _OLD_RECEIPT = "replacing.json", "replaced.json"
"""Names of the two receipts in an attempt's folder while its files replace older ones."""


def stage(
    files: ShardFiles, output_url: str, shard: Shard, attempt_id: str, note_progress: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """Put a finished shard into the output's staging folder, one whole file at a time.

    Args:
        attempt_id: name of this attempt, unique in the output.
        note_progress: called after each part of a file that was uploaded.

    Returns:
        The staged files' URLs relative to ``output_url``, by ``tar`` and ``parquet``.

    Raises:
        StorageError: the storage failed.
    """
    staged = _staged(shard, attempt_id)
    for kind, path in (("tar", files.tar), ("parquet", files.parquet)):
        storage.upload(path, storage.join(output_url, staged[kind]), note_progress)
    return staged


def _staged(shard: Shard, attempt_id: str) -> dict[str, str]:
    return {kind: f"{STAGING}/{attempt_id}/{shard.name}{suffix}" for kind, suffix in receipts.FILE_SUFFIXES.items()}


class StagedFilesLost(StorageError):
    """A staged file is missing, or its size is wrong. The shard has to be generated again."""


def commit(output_url: str, receipt: Receipt, staged: dict[str, str]) -> None:
    """Make a staged shard exist: files to their final names, then the receipt.

    Only the driver calls this, right after it has confirmed its lease. If it is suspended in here and loses the lease,
    it cannot harm the next owner's files: the next owner has emptied the staging folder, and no receipt is overwritten.

    An older receipt of the shard is moved away first, so that a receipt never stands beside files it does not describe.
    It is moved into the staging folder. If the next owner has deleted that folder, the move fails and the next owner's
    receipt stays in place.

    This protection of the next owner's receipt works on file systems only, because object stores have no folders. There
    a few requests lie between the check of the staged files and the removal of the older receipt. A driver that is
    suspended between them for longer than a lease lasts may remove the next owner's receipt of that shard.
    :mod:`vcf_batch.commands.verify` then reports the receipt as missing, and a rerun generates the shard again.

    Args:
        staged: the return value of :func:`stage`. Each file that has been moved is removed from it, so that a repeated
            call continues a failed commit where it stopped.

    Raises:
        StagedFilesLost: a staged file is missing, or not of the receipt's size.
        StorageError: the storage failed, or another driver committed the shard meanwhile.
    """
    receipt_url = storage.join(output_url, receipt.shard.name + receipts.RECEIPT_SUFFIX)
    left = dict(staged)
    try:
        with storage.refusals_as_storage_errors():
            # Look for an older receipt first. A receipt that another driver commits later must not be taken for one.
            replaces = len(left) == len(receipt.files) and storage.exists(receipt_url)
            if replaces:
                folder = storage.join(output_url, storage.parent(left["tar"]))
                storage.publish_bytes(storage.join(folder, _NEW_RECEIPT), receipt.to_json())
            for kind, path in left.items():
                found, said = storage.size(url := storage.join(output_url, path)), receipt.files[kind].size
                if found != said:
                    raise StagedFilesLost(
                        f"staged file {url} has {found} bytes, but its receipt says {said}; the shard has to be "
                        "generated again"
                    )
        if replaces:
            storage.move(receipt_url, storage.join(folder, _OLD_RECEIPT))
        for kind, path in left.items():
            storage.move(storage.join(output_url, path), storage.join(output_url, storage.name(path)))
            del staged[kind]
    except FileNotFoundError as error:
        raise StagedFilesLost(
            f"a staged file of shard {receipt.shard.name} is gone ({error}); the shard has to be generated again"
        ) from error
    try:
        storage.publish_bytes(receipt_url, receipt.to_json(), create=True)
    except FileExistsError as error:
        # An earlier call may have published this receipt although its answer was lost.
        there = receipts.read_one(output_url, receipt.shard)
        if there is None:
            raise StorageError(f"{receipt_url} is no receipt, so shard {receipt.shard.name} has none") from error
        if there.to_json() != receipt.to_json():
            raise StorageError(f"another driver committed shard {receipt.shard.name} meanwhile") from error
    # The shard is whole now. If the empty staging folder stays behind, the next clean deletes it.
    with contextlib.suppress(StorageError):
        discard(output_url, left)


def discard(output_url: str, staged: Mapping[str, str]) -> None:
    """Delete the staging folder of an attempt that will not be committed.

    Raises:
        StorageError: the storage failed.
    """
    for folder in {storage.parent(path) for path in staged.values()}:
        storage.remove_tree(storage.join(output_url, folder))


def any_committed(output_url: str) -> bool:
    """Whether the output has a receipt of any run, or a receipt that is just being replaced.

    A damaged receipt counts, because a run had begun. An empty one does not: it is left by a driver that died.

    Raises:
        StorageError: the output cannot be read.
    """
    if any(sizes.get(receipts.RECEIPT_SUFFIX) for sizes in receipts.files_found(output_url).values()):
        return True
    with storage.refusals_as_storage_errors():
        return bool(_replacing(output_url))


def clean(output_url: str) -> None:
    """Finish the replacements during which a driver died, and delete all other unfinished files.

    The driver calls this while no worker runs.

    Raises:
        StorageError: the storage failed.
    """
    try:
        with storage.refusals_as_storage_errors():
            for attempt_id in _replacing(output_url):
                _finish(output_url, attempt_id)
    except OSError as error:
        raise StorageError(f"another driver changed {output_url} meanwhile: {error}") from error
    storage.remove_tree(storage.join(output_url, STAGING))
    storage.remove_unfinished(output_url)
    for name, sizes in receipts.files_found(output_url).items():
        if not sizes.get(receipts.RECEIPT_SUFFIX):
            for suffix in sizes:
                storage.remove(storage.join(output_url, name + suffix), missing_ok=True)


def _replacing(output_url: str) -> list[str]:
    """Ids of the attempts that were replacing a shard."""
    files = storage.list_tree(storage.join(output_url, STAGING))
    return [storage.parent(file) for file in files if storage.name(file) == _NEW_RECEIPT]


def _finish(output_url: str, attempt_id: str) -> None:
    """Finish a replacement, unless the shard still has its older receipt or already has the new one.

    What stands in a receipt's place and is none is moved away, as :func:`commit` moves an older receipt.
    """
    data = storage.read_bytes(storage.join(output_url, STAGING, attempt_id, _NEW_RECEIPT))
    try:
        receipt = Receipt.from_json(data)
    except ValueError:  # The new receipt is damaged, so the shard has none and is generated as a whole.
        return
    receipt_url = storage.join(output_url, receipt.shard.name + receipts.RECEIPT_SUFFIX)
    if receipts.read_one(output_url, receipt.shard):
        return

    def is_there(path: str, kind: str) -> bool:
        try:
            return storage.digest(storage.join(output_url, path)) == receipt.files.get(kind)
        except (FileNotFoundError, storage.NotAFileError):
            return False

    staged = _staged(receipt.shard, attempt_id)
    waiting = {kind: path for kind, path in staged.items() if is_there(path, kind)}
    if all(kind in waiting or is_there(storage.name(path), kind) for kind, path in staged.items()):
        for path in waiting.values():
            storage.move(storage.join(output_url, path), storage.join(output_url, storage.name(path)))
        if storage.exists(receipt_url):
            storage.move(receipt_url, storage.join(output_url, STAGING, attempt_id, _OLD_RECEIPT))
        storage.publish_bytes(receipt_url, data, create=True)
