"""Publishing files whole, moving and removing them."""

import contextlib
import functools
import os
from collections.abc import Callable

from fsspec.callbacks import Callback

from vcf_batch.storage import local
from vcf_batch.storage.drivers import filesystem
from vcf_batch.storage.listing import list_tree
from vcf_batch.storage.paths import as_local_path, is_local, join
from vcf_batch.storage.reading import CHUNK_BYTES, exists, read_bytes, refusals_as_storage_errors, size
from vcf_batch.storage.retries import MOVING, may_pass, retried


def publish_bytes(url: str, data: bytes, create: bool = False) -> None:
    """Write a whole file at once, replacing what is there; readers see the old bytes or the new ones.

    Args:
        create: write only if there is no such file yet. If several writers try, one succeeds. An empty local file
            counts as none once it has stayed empty for :data:`vcf_batch.storage.local.CREATOR_SECONDS`: on a file
            system without hard links, a writer that dies may leave one. So never create an empty file.

    Raises:
        FileExistsError: ``create`` is true, and the file existed at the last try.
        StorageError: see :mod:`vcf_batch.storage`.
    """
    tries = 0

    def publish() -> None:
        nonlocal tries
        tries += 1
        if is_local(url):
            local.publish(as_local_path(url), lambda temporary: local.write(temporary, data), create)
            return
        fs, path = filesystem(url)
        fs.pipe_file(path, data, **({"mode": "create"} if create else {}))

    try:
        retried("write", url, publish, (FileExistsError,) if create else (), len(data))
    except FileExistsError as error:
        # An earlier try may have written the file, and only the answer was lost.
        if tries == 1 or _content(url) != data:
            raise error


def _content(url: str) -> bytes | None:
    """The bytes of a file; None if it is gone, or no file that can be read.

    Raises:
        StorageError: the storage failed.
    """
    try:
        return read_bytes(url)
    except OSError:
        return None


def upload(local_path: str, url: str, note_progress: Callable[[], None] = lambda: None) -> None:
    """Copy a local file to ``url``, whole or not at all, and check the size that arrived.

    Args:
        note_progress: called after each part is sent.

    Raises:
        StorageError: see :mod:`vcf_batch.storage`.
    """

    def copy(temporary: str) -> None:
        with open(local_path, "rb") as source, open(temporary, "wb") as target:
            while chunk := source.read(CHUNK_BYTES):
                target.write(chunk)
                note_progress()

    def put() -> None:
        if is_local(url):
            local.publish(as_local_path(url), copy, create=False)
            return
        fs, path = filesystem(url)
        fs.put_file(local_path, path, callback=_Parts(note_progress))
        arrived, sent = size(url), os.path.getsize(local_path)
        if arrived != sent:
            raise ConnectionError(f"{arrived} of {sent} bytes arrived")

    needed: int | None = None
    with contextlib.suppress(OSError):  # whoever cannot read the file learns it when it is copied
        needed = os.path.getsize(local_path)
    retried("upload", url, put, (), needed)


def move(source: str, target: str, version: str | None = None) -> None:
    """Give a file another name in the same storage, replacing what is there.

    A local file is renamed; elsewhere the server copies the file, and then the source is deleted.

    Args:
        version: what :func:`version` gave for the source. An S3 store that knows ``If-Match`` then moves that content
            only; every other storage ignores it.

    Raises:
        FileNotFoundError: there is no ``source`` (or, locally, no folder for ``target``). This also follows a try that
            moved the file and failed nevertheless, as a network file system may do.
        FileExistsError: the source has another content than that of ``version``; it stays.
        StorageError: see :mod:`vcf_batch.storage`.
    """
    if is_local(source):

        def rename() -> None:
            os.replace(as_local_path(source), as_local_path(target))
            local.sync_folder(as_local_path(target))

        retried("move", source, rename, MOVING)
        return
    fs, path = filesystem(source)
    retried("copy", source, lambda: fs.cp_file(path, filesystem(target)[1]), MOVING)
    remove(source, missing_ok=True, version=version)


def remove(url: str, missing_ok: bool = False, version: str | None = None) -> None:
    """Delete one file.

    If a request to delete it fails, and the next one finds no file, the first is taken to have had its effect, although
    somebody else may have deleted the file between them. A failure to look for the file is no such request.

    Args:
        missing_ok: whether a file that is missing is no error.
        version: what :func:`version` gave for the file. An S3 store that knows ``If-Match`` then deletes that content
            only; every other storage ignores it.

    Raises:
        FileNotFoundError: there is no such file and ``missing_ok`` is false.
        FileExistsError: the file has another content than that of ``version``; it stays.
        StorageError: see :mod:`vcf_batch.storage`.
    """
    may_be_deleted = False

    def delete() -> None:
        nonlocal may_be_deleted
        if is_local(url):
            request = functools.partial(os.unlink, as_local_path(url))
        else:
            fs, path = filesystem(url)
            if not missing_ok:
                fs.info(path)  # an object store reports no error for a missing object
            request = functools.partial(fs.rm_file, path)
            if version is not None:
                bucket, key, _ = fs.split_path(path)
                request = functools.partial(fs.call_s3, "delete_object", Bucket=bucket, Key=key, IfMatch=version)
        try:
            request()
        except Exception as error:
            may_be_deleted |= may_pass(error)
            raise

    try:
        retried("delete", url, delete, (FileNotFoundError, FileExistsError))
    except FileNotFoundError:
        if not missing_ok and not may_be_deleted:
            raise
    except FileExistsError:
        # An earlier try may have deleted it, and only the answer was lost. Stores differ in how they tell that.
        if exists(url):
            raise


def remove_tree(url: str) -> None:
    """Delete a folder and everything in it, if it exists.

    Raises:
        StorageError: see :mod:`vcf_batch.storage`.
    """
    if is_local(url):
        retried("delete", url, lambda: local.remove_tree(as_local_path(url)), ())
        return
    with refusals_as_storage_errors():
        files = list_tree(url)
    # Files are removed one by one: fs.rm(recursive=True) reads brackets and stars in names as patterns.
    for file in files:
        remove(join(url, file), missing_ok=True)


def remove_unfinished(url: str, silent_for: float = 0.0) -> None:
    """Delete temporary files of killed writers directly in a local folder. Other storages show no such files.

    Args:
        silent_for: seconds without a write after which a writer counts as killed. 0 is for whoever knows that nobody
            writes there. A living writer whose file is deleted fails with a StorageError, and harms nothing.

    Raises:
        StorageError: the storage failed.
    """
    if is_local(url):
        for path in retried("list", url, lambda: local.unfinished(as_local_path(url), silent_for), ()):
            remove(path, missing_ok=True)


class _Parts(Callback):
    """fsspec callback: drivers report each part sent, and it calls ``note_progress``."""

    def __init__(self, note_progress: Callable[[], None]) -> None:
        super().__init__()
        self._note_progress = note_progress

    def relative_update(self, inc: int = 1) -> None:
        self._note_progress()
