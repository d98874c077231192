"""Cache of models on this node: each model is fetched once, even if many processes ask for it."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vcf_batch import storage
from vcf_batch.errors import ModelError, StorageError
from vcf_batch.models import hub
from vcf_batch.models.model_files import refuse_code, select
from vcf_batch.models.resolution import FILE_THREADS, ResolvedModel, folder_identity, tiny_folder, url_files

CACHE_VARIABLE = "VCF_BATCH_CACHE"
_MARKER = ".complete.json"
_NAME = ".model.json"
"""File that names the model of a folder."""


def fetch(model: ResolvedModel) -> str:
    """Make the model's files available on this node.

    A model is downloaded once per node, under a file lock, into ``$VCF_BATCH_CACHE`` (else ``~/.cache/vcf-batch``). The
    marker of a complete download is written last.

    Returns:
        A local folder; a file for a model that is one file.

    Raises:
        ModelError: the model is missing on this node, or is not the resolved one.
        StorageError: storage or network failed.
    """
    if model.kind in ("tiny", "directory"):
        folder = tiny_folder() if model.kind == "tiny" else model.location
        if (found := folder_identity(folder, model.within)) != model.identity:
            raise ModelError(
                f"{folder} on this node holds another model ({found[:12]}) than on the node that started the run "
                f"({model.identity[:12]}); put the model on shared storage, or give its URL"
            )
    elif model.kind == "url":
        folder = _cached(model, lambda folder: _fill_from_url(model, folder))
    else:
        folder = _cached(model, lambda folder: hub.fill(model.location, model.identity, folder, model.within))
    return os.path.join(folder, model.within) if model.within else folder


def _fill_from_url(model: ResolvedModel, folder: str) -> None:
    for leftover in Path(folder).rglob(".tmp-*"):
        leftover.unlink()
    try:
        files, identity = url_files(model.location, model.within)
        if identity != model.identity:
            raise ModelError(f"the model at {model.location} has changed since the run was started; start it again")

        def download(file: str) -> None:
            path = Path(folder, file)
            if not (path.exists() and path.stat().st_size == files[file]):
                storage.download(storage.join(model.location, file), str(path))

        with ThreadPoolExecutor(FILE_THREADS) as threads:
            list(threads.map(download, files))
    except (FileNotFoundError, PermissionError) as error:
        # The driver could read it, so this node is at fault.
        raise StorageError(f"this node cannot read the model at {model.location}: {error}") from error


def cache_folder() -> str:
    """Folder for what this node keeps for later runs: ``$VCF_BATCH_CACHE``, else ``~/.cache/vcf-batch``."""
    return os.path.abspath(os.path.expanduser(os.environ.get(CACHE_VARIABLE) or "~/.cache/vcf-batch"))


def _cached(model: ResolvedModel, fill: Callable[[str], None]) -> str:
    from filelock import FileLock

    cache = cache_folder()
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", storage.name(model.location))[:40]
    key = "\0".join(filter(None, (model.kind, model.location, model.identity, model.within)))
    unique = hashlib.sha256(key.encode()).hexdigest()[:16]
    folder = os.path.join(cache, "models", f"{readable}-{unique}")
    # The system releases the lock of a killed process; the next process completes its download.
    lock = FileLock(f"{folder}.lock")
    try:
        os.makedirs(folder, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise ModelError(
            f"cannot write to the model cache {cache}: {error}; set {CACHE_VARIABLE} to a folder"
        ) from error
    try:
        if not _is_complete(folder):
            fill(folder)
            files = select(folder, storage.list_tree(folder), model.within)
            refuse_code(folder, list(files), lambda file: Path(folder, file).read_bytes())
            storage.publish_bytes(os.path.join(folder, _MARKER), json.dumps(files, indent=2).encode())
        # URLs may have credentials. Versions before 0.2 named no model.
        if model.kind == "hub" and not os.path.exists(name := os.path.join(folder, _NAME)):
            storage.publish_bytes(name, json.dumps(dataclasses.asdict(model)).encode())
    finally:
        lock.release()
    return folder


def kept() -> Iterator[ResolvedModel]:
    """The models of the Hub that this node's cache has, each complete, in no order."""
    for file in Path(cache_folder(), "models").glob(f"*/{_NAME}"):
        if _is_complete(str(file.parent)):
            with contextlib.suppress(OSError, ValueError, TypeError):  # a file that somebody changed names no model
                yield ResolvedModel(**json.loads(file.read_bytes()))


def _is_complete(folder: str) -> bool:
    """Whether the marker exists, and every file in it still has its recorded size."""
    try:
        expected: dict[str, Any] = json.loads(storage.read_bytes(os.path.join(folder, _MARKER)))
        return expected == {file: os.path.getsize(os.path.join(folder, file)) for file in expected}
    except (FileNotFoundError, ValueError):
        return False
