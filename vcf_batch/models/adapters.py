"""The published files of an IP-Adapter: one file of weights, and the image encoder beside it."""

import dataclasses
import re
from pathlib import PurePosixPath

from vcf_batch import storage
from vcf_batch.errors import ModelError
from vcf_batch.models import resolution
from vcf_batch.models.model_files import WEIGHTS
from vcf_batch.models.names import ADAPTERS, ADAPTERS_ID
from vcf_batch.models.resolution import ResolvedModel

ENCODER = "image_encoder"
"""Folder of the image encoder beside the weights, as ``h94/IP-Adapter`` has it."""

# The colon of a scheme has two slashes behind it, and that of a port only a host before it.
_WITH_FILE = re.compile(rf"(.+):(?!//)([^:]+(?:{'|'.join(map(re.escape, WEIGHTS))}))")
_HOST = re.compile(r"\w+://[^/]*")


def resolve_adapter(name: str, revision: str | None = None) -> ResolvedModel:
    """Find the weights of an IP-Adapter, in exactly one version.

    Args:
        name: a name of :data:`vcf_batch.models.names.ADAPTERS`; or a Hub id, folder or URL, followed by ``:`` and the
            path of the file in it; or the path or URL of the file; or a folder or URL with one such file.
        revision: branch, tag or commit of a repository on the Hub; None is its main branch.

    Raises:
        ModelError: there is no such file, or several, or the hub cannot be reached.
        StorageError: the storage failed.
    """
    is_here = storage.is_local(name) and storage.exists(storage.absolute(name))
    if name in ADAPTERS and not is_here:
        published = resolution.resolve(ADAPTERS_ID, revision, within=ADAPTERS[name].file)
        return dataclasses.replace(published, name=name)
    found = None if is_here else _WITH_FILE.fullmatch(name)
    if found and not _HOST.fullmatch(found[1]):
        return resolution.resolve(found[1], revision, within=found[2])
    if name.endswith(WEIGHTS):
        return resolution.resolve(storage.parent(name) or ".", revision, within=storage.name(name))
    if storage.is_local(name) and not is_here:
        example, first = next(iter(ADAPTERS.items()))
        raise ModelError(
            f"the IP-Adapter {name!r} is no file and no folder here; for a model on the Hub, name the file too, as in "
            f"{ADAPTERS_ID}:{first.file}, or give a name that 'vcf-batch model list' has, such as {example}"
        )
    files = [file for file in storage.list_tree(storage.absolute(name)) if _is_adapter(file)]
    if len(files) != 1:
        shown = ", ".join(sorted(files)[:5]) or "none"
        raise ModelError(
            f"{name} holds {len(files)} files of weights ({shown}); name the one of the IP-Adapter, as in {name}:FILE"
        )
    return resolution.resolve(name, revision, within=files[0])


def _is_adapter(file: str) -> bool:
    return file.endswith(WEIGHTS) and ENCODER not in PurePosixPath(file).parts


def _encoder_folder(adapter: ResolvedModel) -> str:
    """Path of the folder with the image encoder of an adapter, within its location."""
    published = (each.encoder for each in ADAPTERS.values() if each.file == adapter.within)
    beside = str(PurePosixPath(adapter.within).parent / ENCODER)
    return next(published, beside) if adapter.location == ADAPTERS_ID else beside


def encoder_beside(adapter: ResolvedModel) -> ResolvedModel:
    """The image encoder beside an adapter's weights.

    Raises:
        ModelError: there is none.
        StorageError: the storage failed.
    """
    folder = _encoder_folder(adapter)
    revision = adapter.identity if adapter.kind == "hub" else None
    try:
        return resolution.resolve(adapter.location, revision, within=folder)
    except ModelError as error:
        raise ModelError(
            f"the IP-Adapter {adapter.name} has no usable folder {folder} with the image encoder that it was trained "
            f"with ({error}); name the encoder with --image-encoder"
        ) from error
