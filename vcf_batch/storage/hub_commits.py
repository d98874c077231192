"""Commits to a repository on the Hugging Face Hub, of many files each.

Contents are uploaded as they come, and become part of the repository with the commit. What a Hub keeps of an upload
without a commit is not sent again by a second call. This was tried with the Hub of the tests alone.
"""

import functools
import hashlib
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.hf_api import RepoFile

from vcf_batch import __version__, storage
from vcf_batch.errors import UsageError
from vcf_batch.records import FileEntry
from vcf_batch.storage import scratch
from vcf_batch.storage.drivers import filesystem
from vcf_batch.storage.retries import retried

MAX_FILES = 1000
"""Largest number of files in a commit. The Hub refuses commits that take it too long."""
MAX_AT_HAND_BYTES = 1 << 30
"""Bytes of local copies that wait to be uploaded together. One file may be larger."""


def is_repository(url: str) -> bool:
    """Whether a URL names a repository on the Hub, or a folder in one, rather than a bucket or another storage."""
    return url.startswith("hf://") and not url.startswith("hf://buckets/")


class HubCommits:
    """Changes of a folder in a repository, committed in the order in which they are made; use it with ``with``.

    A commit has at most :data:`MAX_FILES` files. Leaving the block commits what is left, unless it is left by an error.

    Args:
        url: the folder, such as ``hf://datasets/OWNER/NAME``.

    Raises:
        UsageError: there is no such repository.
        StorageError: the Hub failed, or refuses.
    """

    compares_contents = True
    """Whether :meth:`holds` compares contents, rather than sizes."""

    def __init__(self, url: str) -> None:
        self._driver, path = filesystem(url)
        try:
            place = retried("find", url, lambda: self._driver.resolve_path(path), (FileNotFoundError,))
        except FileNotFoundError as error:
            raise UsageError(
                f"there is no repository {url} that you may see; make it on the Hub first, or check your token"
            ) from error
        self._url, self._api = url, HfApi(endpoint=self._driver.endpoint, token=self._driver.token)
        self._repository = {"repo_id": place.repo_id, "repo_type": place.repo_type, "revision": place.revision}
        self._folder = place.path_in_repo
        self._pending: dict[str, CommitOperationAdd | CommitOperationDelete] = {}
        self._waiting: list[tuple[CommitOperationAdd, str]] = []
        """Files that are not uploaded yet, each with its local path."""
        self._waiting_bytes = 0
        self._scratch = ExitStack()
        self._local = ""
        self._count = 0

    def __enter__(self) -> Self:
        self._local = self._scratch.enter_context(scratch.folder())
        return self

    def __exit__(self, kind: object, *exc_info: object) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self._scratch.close()

    @functools.cached_property
    def _there(self) -> dict[str, str]:
        """Name to content of the folder's files: the SHA-256 of a large file, the Git object of another."""

        def read() -> dict[str, str]:
            try:
                tree = self._api.list_repo_tree(path_in_repo=self._folder or None, **self._repository)
                files = [entry for entry in tree if isinstance(entry, RepoFile)]
            except EntryNotFoundError:
                return {}
            return {os.path.basename(file.path): file.lfs.sha256 if file.lfs else file.blob_id for file in files}

        return retried("list", self._url, read, ())

    def has(self, name: str) -> bool:
        """Whether the folder had a file of that name at the first call, and it was not removed since."""
        return name in self._there

    def holds(self, name: str, entry: FileEntry) -> bool:
        """Whether the folder has a large file with that content. What the Hub keeps as a small one is sent again."""
        return self._there.get(name) == entry.sha256

    def holds_bytes(self, name: str, data: bytes) -> bool:
        """Whether the folder has a file with these bytes."""
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return self._there.get(name) in (git, hashlib.sha256(data).hexdigest())

    def put(self, path: str, name: str) -> None:
        """Add or replace a file by a local one, which is moved away.

        Raises:
            StorageError: the Hub failed, or refuses.
        """
        self._count += 1
        local = os.path.join(self._local, str(self._count), name)  # its own name, which the client's bar shows
        os.mkdir(os.path.dirname(local))
        os.rename(path, local)
        addition = CommitOperationAdd(self._in_repository(name), local)
        self._waiting.append((addition, local))
        self._waiting_bytes += os.path.getsize(local)
        self._change(name, addition)
        if self._waiting_bytes >= MAX_AT_HAND_BYTES:
            self._upload()

    def put_bytes(self, name: str, data: bytes) -> None:
        """Add or replace a small file, unless it is there.

        Raises:
            StorageError: the Hub failed, or refuses.
        """
        if not self.holds_bytes(name, data):
            self._change(name, CommitOperationAdd(self._in_repository(name), data))

    def remove(self, name: str) -> None:
        """Delete a file that is there.

        Raises:
            StorageError: the Hub failed, or refuses.
        """
        del self._there[name]
        self._change(name, CommitOperationDelete(self._in_repository(name), is_folder=False))

    def commit(self) -> None:
        """Commit what has been changed since the last commit.

        Raises:
            StorageError: the Hub failed, or refuses.
        """
        if not self._pending:
            return
        self._upload()
        changes, told = [*self._pending.values()], f"{len(self._pending)} files by vcf-batch {__version__}"
        retried(
            "commit to",
            self._url,
            lambda: self._api.create_commit(operations=changes, commit_message=told, **self._repository),
            (),
        )
        self._pending = {}
        self._driver.invalidate_cache()

    def _change(self, name: str, change: CommitOperationAdd | CommitOperationDelete) -> None:
        # A file that is deleted and comes back in one commit is replaced.
        self._pending.pop(name, None)
        self._pending[name] = change
        if len(self._pending) == MAX_FILES:
            self.commit()

    def _upload(self) -> None:
        """Send the local copies, and delete them."""
        additions = [addition for addition, _ in self._waiting]
        retried(
            "upload",
            self._url,
            lambda: self._api.preupload_lfs_files(additions=additions, num_threads=4, **self._repository),
            (),
        )
        for addition, path in self._waiting:
            if addition.path_or_fileobj == path:  # The Hub takes small files with the commit.
                addition.path_or_fileobj = Path(path).read_bytes()
            os.unlink(path)
            os.rmdir(os.path.dirname(path))
        self._waiting, self._waiting_bytes = [], 0

    def _in_repository(self, name: str) -> str:
        return storage.join(self._folder, name) if self._folder else name
