"""The tokens of prompts, counted as the text encoder of a model gets them."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vcf_batch.models.loading import load_errors
from vcf_batch.models.resolution import ResolvedModel, read_file

_TOKENIZER = "tokenizer"
_FILES = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "vocab.json", "merges.txt")
_MAX_BYTES = 1 << 26


def count_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Number of tokens of each prompt, begin and end included.

    Args:
        tokenizer: the ``CLIPTokenizer`` of a model, whose text encoder takes ``tokenizer.model_max_length`` tokens.
        prompts: any number; equal ones are counted once.
    """
    distinct = [*dict.fromkeys(prompts)]
    if not distinct:
        return []
    tokens = tokenizer(distinct, truncation=False, padding=False)["input_ids"]
    lengths = dict(zip(distinct, map(len, tokens), strict=True))
    return [lengths[prompt] for prompt in prompts]


def read_tokenizer(model: ResolvedModel) -> Any:
    """The ``CLIPTokenizer`` of a model, without fetching its weights.

    Raises:
        ModelError: the model has no readable tokenizer, or the hub cannot be reached.
        StorageError: the storage failed.
    """
    from transformers import CLIPTokenizer, logging  # takes a second, which nobody else should wait for

    logging.set_verbosity_error()  # that a prompt is long is what it is asked for
    with tempfile.TemporaryDirectory(prefix="vcf-batch-") as folder:
        for name in _FILES:
            if (data := read_file(model, f"{_TOKENIZER}/{name}", _MAX_BYTES)) is not None:
                Path(folder, name).write_bytes(data)
        with load_errors(f"the tokenizer of the model {model.name}"):
            return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
