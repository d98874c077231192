"""The published files of an IP-Adapter: one file of weights, and the image encoder beside it."""

import re
from pathlib import PurePosixPath

from vcf_batch import storage
from vcf_batch.errors import ModelError
from vcf_batch.models import resolution
from vcf_batch.models.model_files import WEIGHTS
from vcf_batch.models.resolution import ResolvedModel

ENCODER = "image_encoder"
"""Folder of the image encoder beside the weights, as ``h94/IP-Adapter`` has it."""

EXAMPLE = "h94/IP-Adapter:models/ip-adapter_sd15.safetensors"

_WITH_FILE = re.compile(rf"(.+):([^:]+(?:{'|'.join(map(re.escape, WEIGHTS))}))")
_HOST = re.compile(r"\w+://[^/]*")


def resolve_adapter(name: str) -> ResolvedModel:
    """Find the weights of an IP-Adapter, in exactly one version.

    Args:
        name: Hub id, folder or URL, followed by ``:`` and the path of the file in it; or the path or URL of the file;
            or a folder or URL with one such file.

    Raises:
        ModelError: there is no such file, or several, or the hub cannot be reached.
        StorageError: the storage failed.
    """
    found = _WITH_FILE.fullmatch(name)
    if found and not _HOST.fullmatch(found[1]):
        return resolution.resolve(found[1], within=found[2])
    if name.endswith(WEIGHTS):
        return resolution.resolve(storage.parent(name) or ".", within=storage.name(name))
    if storage.is_local(name) and not storage.exists(storage.absolute(name)):
        raise ModelError(
            f"the IP-Adapter {name!r} is no file and no folder here; for a model on the Hub, name the file too, as in "
            f"{EXAMPLE}"
        )
    files = [file for file in storage.list_tree(storage.absolute(name)) if _is_adapter(file)]
    if len(files) != 1:
        shown = ", ".join(sorted(files)[:5]) or "none"
        raise ModelError(
            f"{name} holds {len(files)} files of weights ({shown}); name the one of the IP-Adapter, as in {name}:FILE"
        )
    return resolution.resolve(name, within=files[0])


def _is_adapter(file: str) -> bool:
    return file.endswith(WEIGHTS) and ENCODER not in PurePosixPath(file).parts


def encoder_beside(adapter: ResolvedModel) -> ResolvedModel:
    """The image encoder beside an adapter's weights.

    Raises:
        ModelError: there is none.
        StorageError: the storage failed.
    """
    folder = str(PurePosixPath(adapter.within).parent / ENCODER)
    revision = adapter.identity if adapter.kind == "hub" else None
    try:
        return resolution.resolve(adapter.location, revision, within=folder)
    except ModelError as error:
        raise ModelError(
            f"the IP-Adapter {adapter.name} has no usable folder {folder} with the image encoder that it was trained "
            f"with ({error}); name the encoder with --image-encoder"
        ) from error
