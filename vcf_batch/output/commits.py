"""The protocol that commits a shard: a worker stages its files, the driver alone commits them, receipt last.

A worker stages its files under a name of its own attempt (:func:`stage`), so no two attempts share a name, even if a
worker that was declared dead lives on. The driver moves the files to their final names and then publishes the receipt
(:func:`commit`). At every start it deletes files that were staged but never committed (:func:`clean`).

Before a shard is replaced, its new receipt is written beside the staged files. If the driver dies after that, the next
start finds everything it needs to finish the replacement, so samples that were to be kept are never lost.
"""

import contextlib
import logging
import uuid
from collections.abc import Callable, Container, Mapping

from vcf_batch import storage
from vcf_batch.errors import StorageError
from vcf_batch.output import receipts
from vcf_batch.output.receipts import Receipt
from vcf_batch.output.shards import ShardFiles
from vcf_batch.records import FileEntry, Shard

STAGING = "_staging"
"""Folder of the output for files that are not committed yet. Each attempt has a folder of its own in it."""
_NEW_RECEIPT, _OLD_RECEIPT = "replacing.json", "replaced.json"
"""Names of the two receipts in an attempt's folder while its files replace older ones."""
_OLD_FILE = "replaced-"
"""Begin of the name of a file in an attempt's folder that its shard has no more."""

_log = logging.getLogger(__name__)


def stage(
    files: ShardFiles, output_url: str, shard: Shard, attempt_id: str, note_progress: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """Put a finished shard into the output's staging folder, one whole file at a time.

    Args:
        attempt_id: name of this attempt, unique in the output.
        note_progress: called after each part of a file that was uploaded.

    Returns:
        The staged files' URLs relative to ``output_url``, by kind as in ``files.entries``.

    Raises:
        StorageError: the storage failed.
    """
    staged = _staged(shard, attempt_id, files.entries)
    paths = {"tar": files.tar, "parquet": files.parquet}
    for kind, url in staged.items():
        storage.upload(paths[kind], storage.join(output_url, url), note_progress)
    return staged


def _staged(shard: Shard, attempt_id: str, kinds: Container[str]) -> dict[str, str]:
    return {
        kind: f"{STAGING}/{attempt_id}/{shard.name}{suffix}"
        for kind, suffix in receipts.FILE_SUFFIXES.items()
        if kind in kinds
    }


class StagedFilesLost(StorageError):
    """A staged file is missing, has another size, or cannot be committed. The shard has to be generated again."""


def commit(output_url: str, receipt: Receipt, staged: dict[str, str], stays: Container[str] = frozenset()) -> Receipt:
    """Make a staged shard exist: files to their final names, then the receipt.

    Only the driver calls this, right after it has confirmed its lease. If it is suspended in here and loses the lease,
    it cannot harm the next owner's files: the next owner has emptied the staging folder, and no receipt is overwritten.

    An older receipt of the shard is moved away first, so that a receipt never stands beside files it does not describe.
    It is moved into the staging folder. If the next owner has deleted that folder, the move fails and the next owner's
    receipt stays in place. In the same way, an older tar of a shard that has none any more is moved away before the
    new receipt is published, and after the new parquet is in its place: only an owner whose staged files were there
    does it.

    Object stores have no folders. On S3 the older receipt, or tar, is deleted only if it is still the one that was
    found (``If-Match``). If the next owner has left that very receipt in place, it is put back. On a store without
    ``If-Match`` two requests are left: a driver that is suspended right before it deletes the older receipt, or the
    older tar, for longer than a lease lasts, deletes what the next owner has published in its place.
    :mod:`vcf_batch.commands.verify` then reports it as missing, and a rerun generates the shard again.

    Args:
        staged: the return value of :func:`stage`. Each file that has been moved is removed from it, so that a repeated
            call continues a failed commit where it stopped.
        stays: fingerprints of the shards that are not replaced. If a whole one of them is there, because a listing that
            lags behind did not show it, it stays, and what was staged is deleted.

    Returns:
        The receipt that the shard has now.

    Raises:
        StagedFilesLost: a staged file is missing, or not of the receipt's size; or an older tar cannot be moved away.
        StorageError: the storage failed, or another driver committed the shard meanwhile.
    """
    receipt_url = storage.join(output_url, receipt.shard.name + receipts.RECEIPT_SUFFIX)
    left = dict(staged)
    moved_away = False
    older: bytes | None = None
    surplus: dict[str, str | None] = {}
    try:
        with storage.refusals_as_storage_errors():
            if len(left) == len(receipt.files):
                folder = storage.join(output_url, storage.parent(left["parquet"]))
                # Look for older files first. What another driver commits later must not be taken for one.
                older = receipts.content(output_url, receipt.shard.name)
                there = _parsed(older)
                if there and there.fingerprint in stays and receipts.is_whole(output_url, there, receipt.shard):
                    _log.warning("shard %s is there already, and stays as it is", receipt.shard.name)
                    with contextlib.suppress(StorageError):
                        discard(output_url, staged)
                    return there
                version = None if older is None else storage.version(receipt_url)
                surplus = {file: storage.version(file) for file in _surplus(output_url, receipt)}
            if older is not None:
                storage.publish_bytes(storage.join(folder, _NEW_RECEIPT), receipt.to_json())
            for kind, path in left.items():
                found, said = storage.size(url := storage.join(output_url, path)), receipt.files[kind].size
                if found != said:
                    raise StagedFilesLost(
                        f"staged file {url} has {found} bytes, but its receipt says {said}; the shard has to be "
                        "generated again"
                    )
        if older is not None:
            storage.move(receipt_url, storage.join(folder, _OLD_RECEIPT), version)
            moved_away = True
        for kind, path in left.items():
            storage.move(storage.join(output_url, path), storage.join(output_url, storage.name(path)))
            del staged[kind]
        for file, its_version in surplus.items():
            try:
                # The next owner may have committed the shard since, and the tar may be its own.
                if receipts.content(output_url, receipt.shard.name) is not None:
                    raise FileExistsError(receipt_url)
                storage.move(file, storage.join(folder, _OLD_FILE + storage.name(file)), its_version)
            except StorageError as error:
                # A repeated call has no staged file left by which it knows that it is not too late.
                raise StagedFilesLost(
                    f"{file} cannot be moved away, and shard {receipt.shard.name} has no such file any more ({error}); "
                    "the shard has to be generated again"
                ) from error
    except FileExistsError as error:
        raise StorageError(f"another driver committed shard {receipt.shard.name} meanwhile") from error
    except FileNotFoundError as error:
        if moved_away and len(staged) == len(left):
            # The next owner has deleted what was staged, so the receipt was not to be moved.
            _restore(output_url, storage.name(folder), older)
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
    return receipt


def discard(output_url: str, staged: Mapping[str, str]) -> None:
    """Delete the staging folder of an attempt that will not be committed.

    Raises:
        StorageError: the storage failed.
    """
    for folder in {storage.parent(path) for path in staged.values()}:
        storage.remove_tree(storage.join(output_url, folder))


def any_committed(output_url: str) -> bool:
    """Whether the output has a receipt of any run, or a receipt that is just being replaced.

    What is no receipt counts as absent.

    Raises:
        StorageError: the output cannot be read.
    """
    names = sorted(name for name, sizes in receipts.files_found(output_url).items() if receipts.RECEIPT_SUFFIX in sizes)
    if any(_parsed(receipts.content(output_url, name)) for name in names):
        return True
    with storage.refusals_as_storage_errors():
        return any(
            _parsed(_content(output_url, attempt_id, kind))
            for kind in (_NEW_RECEIPT, _OLD_RECEIPT)
            for attempt_id in _replacing(output_url, kind)
        )


def clean(output_url: str, confirm: Callable[[], object] = lambda: None) -> None:
    """Finish the replacements during which a driver died, and delete all other unfinished files.

    The driver calls this while no worker runs. If it is suspended in here and loses the lease, no file of the next
    owner is deleted on a file system: a file without a receipt is moved into the staging folder, and the next owner
    has deleted the folder that it is moved to. On object stores one request lies between the check of the lease and
    each deletion.

    Args:
        confirm: raises if the driver no longer owns the output. Called before each replacement is finished, before
            files without a receipt are looked for, and before each is deleted.

    Raises:
        RefusedError: ``confirm`` raises it.
        StorageError: the storage failed.
    """
    try:
        with storage.refusals_as_storage_errors():
            for attempt_id in _replacing(output_url, _NEW_RECEIPT):
                confirm()
                _finish(output_url, attempt_id)
            for attempt_id in _replacing(output_url, _OLD_RECEIPT):
                confirm()
                _restore(output_url, attempt_id)
    except OSError as error:
        raise StorageError(f"another driver changed {output_url} meanwhile: {error}") from error
    storage.remove_tree(storage.join(output_url, STAGING))
    storage.remove_unfinished(output_url)
    if _strays(output_url):
        _delete_strays(output_url, confirm)


def _strays(output_url: str) -> list[str]:
    """Names of the files for which no receipt stands, sorted; an empty file is no receipt."""
    found = receipts.files_found(output_url)
    return sorted(
        name + suffix for name, sizes in found.items() if not sizes.get(receipts.RECEIPT_SUFFIX) for suffix in sizes
    )


def _delete_strays(output_url: str, confirm: Callable[[], object]) -> None:
    folder = storage.join(output_url, STAGING, f"strays-{uuid.uuid4().hex}")
    # The folder is there before the lease is confirmed and files are looked for. An owner that comes later deletes it.
    storage.publish_bytes(storage.join(folder, "note"), b"files without a receipt, to be deleted")
    confirm()
    for name in _strays(output_url):
        match = receipts.SHARD_FILE.fullmatch(name)
        if match and receipts.content(output_url, match[1]):
            continue  # The listing did not show the receipt yet.
        confirm()
        url = storage.join(output_url, name)
        try:
            if storage.is_local(output_url):
                storage.move(url, storage.join(folder, name))
            else:
                storage.remove(url, missing_ok=True)
        except FileNotFoundError as error:
            confirm()
            raise StorageError(f"another driver changed {output_url} meanwhile: {error}") from error
    storage.remove_tree(storage.join(output_url, STAGING))


def _replacing(output_url: str, kind: str) -> list[str]:
    """Ids of the attempts that were replacing a shard, and left a receipt of that kind."""
    files = storage.list_tree(storage.join(output_url, STAGING))
    return sorted(storage.parent(file) for file in files if storage.name(file) == kind)


def _content(output_url: str, attempt_id: str, kind: str) -> bytes | None:
    try:
        return storage.read_bytes(storage.join(output_url, STAGING, attempt_id, kind))
    except FileNotFoundError:
        return None


def _parsed(data: bytes | None) -> Receipt | None:
    """The receipt; None if there is none, or something that is no receipt."""
    try:
        return None if data is None else Receipt.from_json(data)
    except ValueError:
        return None


def _is_there(output_url: str, path: str, entry: FileEntry) -> bool:
    """Whether a file has the size and hash of a receipt's entry."""
    try:
        return storage.digest(storage.join(output_url, path)) == entry
    except (FileNotFoundError, storage.NotAFileError):
        return False


def _surplus(output_url: str, receipt: Receipt) -> list[str]:
    """URLs of the files in the places of a shard's files that the receipt does not name."""
    urls = (storage.join(output_url, name) for name in receipts.surplus(receipt))
    return [url for url in urls if storage.exists(url)]


def _restore(output_url: str, attempt_id: str, data: bytes | None = None) -> None:
    """Put a receipt back that was moved away, if its shard has none and its files are still those that it describes.

    Args:
        data: the receipt to put back if the one that was moved into the attempt's folder does not fit.
    """
    for content in (_content(output_url, attempt_id, _OLD_RECEIPT), data):
        receipt = _parsed(content)
        if content is None or receipt is None or receipts.read_one(output_url, receipt.shard):
            continue
        finals = {receipt.shard.name + receipts.FILE_SUFFIXES[kind]: entry for kind, entry in receipt.files.items()}
        are_there = all(_is_there(output_url, path, entry) for path, entry in finals.items())
        if are_there and not _surplus(output_url, receipt):
            receipt_url = storage.join(output_url, receipt.shard.name + receipts.RECEIPT_SUFFIX)
            if receipts.content(output_url, receipt.shard.name) is not None:
                storage.remove(receipt_url, missing_ok=True)  # no receipt, as it was read above
            with contextlib.suppress(FileExistsError):  # Another driver has committed the shard.
                storage.publish_bytes(receipt_url, content, create=True)


def _finish(output_url: str, attempt_id: str) -> None:
    """Finish a replacement, unless the shard still has its older receipt or already has the new one.

    What stands in a receipt's place and is none is moved away, as :func:`commit` moves an older receipt.
    """
    data = _content(output_url, attempt_id, _NEW_RECEIPT)
    receipt = _parsed(data)
    if data is None or receipt is None:  # The new receipt is damaged. The older one may be restored.
        return
    receipt_url = storage.join(output_url, receipt.shard.name + receipts.RECEIPT_SUFFIX)
    if receipts.read_one(output_url, receipt.shard):
        return
    entries = receipt.files
    staged = _staged(receipt.shard, attempt_id, entries)
    waiting = {kind: path for kind, path in staged.items() if _is_there(output_url, path, entries[kind])}
    if all(
        kind in waiting or _is_there(output_url, storage.name(path), entries[kind]) for kind, path in staged.items()
    ):
        for path in waiting.values():
            storage.move(storage.join(output_url, path), storage.join(output_url, storage.name(path)))
        for file in _surplus(output_url, receipt):
            storage.move(file, storage.join(output_url, STAGING, attempt_id, _OLD_FILE + storage.name(file)))
        if storage.exists(receipt_url):
            storage.move(receipt_url, storage.join(output_url, STAGING, attempt_id, _OLD_RECEIPT))
        storage.publish_bytes(receipt_url, data, create=True)
