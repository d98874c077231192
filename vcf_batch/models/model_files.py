"""Selection of a model's files, and refusal of models that would run code.

Only ``.safetensors``, ``.json`` and ``.txt`` files belong to a model, and ``.bin`` files if there is no safetensors:
loaders read them with ``weights_only``. Code in a pickle or in a repository never runs.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vcf_batch import storage
from vcf_batch.errors import ModelError
from vcf_batch.storage import scratch

FETCH_RECORD = "vcf_batch_model.json"
"""File beside a model that ``model fetch --to`` has copied: where it is from, and each file's SHA-256."""

WEIGHTS = (".safetensors", ".bin")
_SUFFIXES = (*WEIGHTS, ".json", ".txt")
PICKLES = (".pt", ".pth", ".ckpt", ".pkl")
_HEADER_START = 1 << 16
"""Number of bytes at a file's start that are read at once. They have the header of most models."""
_MAX_HEADER_BYTES = 100_000_000
"""Size of the largest header that the format of safetensors allows."""
_CONFIGS = ("config.json", "model_index.json")
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion", "vcf_batch.vcf.aligner")
"""Libraries and modules allowed for the parts of a pipeline."""
_PARTS = frozenset(
    {
        *("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
        *("feature_extractor", "image_encoder", "safety_checker", "aligner", "judge", "probe"),
    }
)
"""Folders of a pipeline. Published ones have more beside them: another VAE, and parts for OpenVINO and ONNX."""
_VARIANT = re.compile(r"\.(fp16|bf16|non_ema)(?=[.-])")
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.)|\.index\.json$")


def chosen(files: Sequence[str]) -> list[str]:
    """The relative paths that make up a folder's model, sorted.

    These are left out: other kinds of files, hidden files, names that would leave the folder, READMEs, the record of a
    fetch, half-precision or training variants beside the plain weights, ``.bin`` beside safetensors, single-file
    checkpoints and other folders beside the parts of a diffusers folder, weights for OpenVINO, and the second copy of
    the weights in OpenCLIP's repositories.
    """
    plain = [
        file
        for file in files
        if file.endswith(_SUFFIXES)
        and not any(part.startswith((".", "/")) for part in PurePosixPath(file).parts)
        and not PurePosixPath(file).name.upper().startswith("README")
        and not PurePosixPath(file).name.startswith(("open_clip_", "openvino_"))
        and file != FETCH_RECORD
    ]
    whole = {_SHARD.sub("", file) for file in plain if not _VARIANT.search(file)}
    safe = {PurePosixPath(file).parent for file in plain if file.endswith(".safetensors")}
    is_pipeline = "model_index.json" in plain
    return sorted(
        file
        for file in plain
        # One of the two may be in shards, and the other in one file.
        if not (_VARIANT.search(file) and _SHARD.sub("", _VARIANT.sub("", file)) in whole)
        and not (file.endswith(".bin") and PurePosixPath(file).parent in safe)
        and not (is_pipeline and "/" not in file and file.endswith(WEIGHTS))
        and not (is_pipeline and "/" in file and PurePosixPath(file).parts[0] not in _PARTS)
    )


def lone_variant(folder: str) -> str | None:
    """The variant, such as ``fp16``, of which alone a local folder has weights; None if it has plain ones, or none.

    Loaders of diffusers and transformers look for plain weights unless a variant is named.
    """
    files = chosen(os.listdir(folder)) if os.path.isdir(folder) else []
    found = (_VARIANT.search(file) for file in files if file.endswith(WEIGHTS))
    return next((variant[1] for variant in found if variant), None)


@contextlib.contextmanager
def loadable(folder: str, given: Container[str] = ()) -> Iterator[tuple[str, str | None]]:
    """A model's folder as loaders of diffusers can load it, and the variant to name to them.

    Beside one part that a folder has in a variant alone, another part may have both. The plain weights are that part's
    own, so the loader is shown the chosen files alone: links in a temporary folder, which the block's end deletes.

    Args:
        folder: a local folder; anything else is given back as it is.
        given: names of parts that are not loaded from the folder.
    """
    files = chosen([*storage.list_tree(folder)]) if os.path.isdir(folder) else []
    parts = {str(PurePosixPath(file).parent) for file in files if file.count("/") == 1}
    own = [part for part in parts if part not in given]
    variants = {each for part in own if (each := lone_variant(os.path.join(folder, part)))}
    if not variants:
        yield folder, None
        return
    with scratch.temporary("the names of a model's files") as view:
        for file in files:
            os.makedirs(os.path.dirname(os.path.join(view, file)), exist_ok=True)
            os.symlink(os.path.abspath(os.path.join(folder, file)), os.path.join(view, file))
        yield view, min(variants)


def select(where: str, files: Mapping[str, int], within: str = "") -> dict[str, int]:
    """The model's files (path to size) among all ``files`` of a folder or repository.

    Args:
        where: the folder or repository, for messages.
        files: all files.
        within: a folder that alone counts, or a single file of weights; empty for all.

    Raises:
        ModelError: the weights are missing, or exist only as pickles; or there is no ``within``.
    """
    if within:
        found = sorted(file for file in files if file.endswith(WEIGHTS))
        files = {file: size for file, size in files.items() if f"{file}/".startswith(f"{within}/")}
        if not files:
            raise ModelError(f"{where} has no {within}; the weights that it has are {', '.join(found[:5]) or 'none'}")
        if list(files) == [within]:
            return dict(files)
    selected = chosen(list(files))
    weights = {str(PurePosixPath(file).parent) for file in selected if file.endswith(WEIGHTS)}
    components = {str(PurePosixPath(file).parent) for file in selected if PurePosixPath(file).name == "config.json"}
    pickles = sorted(file for file in files if file.endswith(PICKLES))
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


def refuse_code(where: str, files: Sequence[str], read: Callable[[str], bytes]) -> None:
    """Refuse a model whose configuration names code to run.

    Raises:
        ModelError: a configuration names code to run, or is not JSON.
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


def read_header(url: str) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a safetensors file, by its name. Only the file's header is read.

    Raises:
        ValueError: the file is cut short, or no safetensors file; with the reason.
        FileNotFoundError, PermissionError, StorageError: see :mod:`vcf_batch.storage`.
    """
    size, start = storage.size(url), storage.read_start(url, _HEADER_START)
    count = int.from_bytes(start[:8], "little")
    if not 0 < count <= min(size - 8, _MAX_HEADER_BYTES):
        if len(start) > 8 and start[8:9] == b"{":
            raise ValueError(f"it is cut short: its header has {count:,} bytes, and the file has {size:,}")
        raise ValueError(
            f"it begins with {start[:16]!r}, as no safetensors file does; it may be a web page, or a pointer of Git LFS"
        )
    header = (start if count + 8 <= len(start) else storage.read_start(url, 8 + count))[8 : 8 + count]
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        whole = 8 + count + max((each["data_offsets"][1] for each in tensors.values()), default=0)
        shapes = {name: tuple(map(int, each["shape"])) for name, each in tensors.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is damaged: {error}") from error
    if whole != size:
        raise ValueError(f"it must have {whole:,} bytes, and it has {size:,}")
    return shapes


def forget_paths(folder: Path) -> None:
    """Delete the paths of the machine that saved a model from the model's configuration files."""
    for file in (*folder.glob("*.json"), *folder.glob("*/config.json")):
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _code_named_in(config: Any, is_index: bool) -> Iterator[str]:
    """Yield the settings, at any depth, that name a module of the model's own, a kernel or another library."""
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
