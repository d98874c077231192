"""Models on the Hugging Face Hub. The Hub's client is imported only by the functions that use it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from vcf_batch.errors import ModelError, StorageError
from vcf_batch.models.model_files import WEIGHTS, refuse_code, select
from vcf_batch.storage import room, scratch


def commit_of(name: str, revision: str | None, within: str = "") -> str:
    """The commit of a model's revision; revision None is its main branch.

    Args:
        name: the Hub id.
        revision: branch, tag or commit.
        within: a folder or file of the repository that alone counts; empty for all.

    Raises:
        ModelError: there is no such model, it may not be loaded, or the hub cannot be reached.
    """
    with _errors(_asked(name, within), revision, ModelError):
        from huggingface_hub import HfApi

        info = HfApi().model_info(name, revision=revision)
    commit = info.sha
    assert commit, "the hub names the commit of every model"
    where = f"{name} on the Hub"
    selected = select(where, {file.rfilename: 0 for file in info.siblings or []}, within)
    refuse_code(where, list(selected), lambda file: read(name, commit, file))
    return commit


def read(name: str, commit: str, file: str) -> bytes:
    """One small file of a Hub model, without leaving a copy behind.

    Raises:
        FileNotFoundError: the model has no such file.
        ModelError: the hub cannot be reached.
    """
    with _errors(name, commit, ModelError), scratch.temporary(file) as folder:
        from huggingface_hub import errors, hf_hub_download

        try:
            return Path(hf_hub_download(name, file, revision=commit, local_dir=folder)).read_bytes()
        except errors.RemoteEntryNotFoundError as error:
            raise FileNotFoundError(file) from error


def tensor_shapes(name: str, commit: str, file: str) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a safetensors file of a Hub model, by its name. Only the file's header is sent.

    Raises:
        ModelError: the file is no safetensors file, or the hub cannot be reached.
    """
    with _errors(f"{name}:{file}", commit, ModelError):
        from huggingface_hub import HfApi

        found = HfApi().parse_safetensors_file_metadata(name, file, revision=commit)
    return {tensor: tuple(info.shape) for tensor, info in found.tensors.items()}


def fill(name: str, commit: str, folder: str, within: str = "") -> None:
    """Download the files of a model; files that are in the folder already stay, unless their size is wrong.

    Raises:
        StorageError: the hub cannot be reached, or the disk is full.
        ModelError: the hub no longer offers the model.
    """
    with _errors(_asked(name, within), commit, StorageError):
        from huggingface_hub import HfApi, snapshot_download

        info = HfApi().model_info(name, revision=commit, files_metadata=True)
        files = select(name, {file.rfilename: file.size or 0 for file in info.siblings or []}, within)
        for file, size in files.items():
            path = Path(folder, file)
            if path.exists() and size and path.stat().st_size != size:
                path.unlink()  # the client takes it for the file that it once downloaded
        try:
            snapshot_download(name, revision=commit, local_dir=folder, allow_patterns=list(files))
        except OSError as error:
            if not room.is_full(error):
                raise
            raise StorageError(
                f"cannot download {name}: {room.told(folder, None)}. Make room there, or set VCF_BATCH_CACHE to a "
                "folder on a larger disk."
            ) from error


def _asked(name: str, within: str) -> str:
    """The name of a model, or of a part of it."""
    return f"{name}:{within}" if within else name


def _fetched(asked: str) -> str:
    """What to fetch to have it: the image encoder of an IP-Adapter comes with the adapter."""
    name, _, within = asked.partition(":")
    return asked if not within or within.endswith(WEIGHTS) else f"{name}:WEIGHTS"


@contextlib.contextmanager
def _errors(name: str, revision: str | None, unreachable: type[ModelError] | type[StorageError]) -> Iterator[None]:
    """Turn errors of the hub's client into errors with a remedy; a failure that may pass becomes ``unreachable``."""
    from huggingface_hub import constants, errors

    try:
        yield
    except (ModelError, StorageError, ImportError, FileNotFoundError):
        raise
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its terms on {constants.ENDPOINT}/{name.partition(':')[0]}, then set HF_TOKEN on "
            "every node"
        ) from error
    except errors.RepositoryNotFoundError as error:
        repository = name.partition(":")[0]
        raise ModelError(
            f"there is no model {repository!r} on {constants.ENDPOINT}, or it is private: check the name, or set "
            f"HF_TOKEN; a folder of that name does not exist here either ({os.path.abspath(repository)})"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision!r}; give a branch, tag or commit that it has") from error
    # The client passes on errors of its HTTP library, and that library differs between the client's versions.
    except Exception as error:
        raise unreachable(
            f"cannot get {name} from the model hub {constants.ENDPOINT} ({type(error).__name__}: {error}). A proxy is "
            "named by HTTPS_PROXY, a mirror of the hub by HF_ENDPOINT. Without either, run 'vcf-batch model fetch "
            f"{_fetched(name)} --to URL' on a machine that has access, with a folder or bucket that the nodes see, and "
            "give that instead of the name"
        ) from error
