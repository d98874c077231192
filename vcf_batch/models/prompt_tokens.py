"""The tokens of prompts, counted as the text encoder of a model gets them."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vcf_batch.config.limits import MAX_WINDOWS
from vcf_batch.config.row_settings import settings_of
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import ModelError
from vcf_batch.models.loading import load_errors
from vcf_batch.models.resolution import ResolvedModel, read_file
from vcf_batch.records import Row
from vcf_batch.storage import scratch

_ENDS = 2
"""Tokens of a window that are no words: its begin and its end."""
_TOKENIZER = "tokenizer"
_SECOND_TOKENIZER = "tokenizer_2"
"""That of Stable Diffusion XL's second text encoder."""
_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.json", "vocab.json", "merges.txt"),
)
_MAX_BYTES = 1 << 26
_LACKING = (
    "its folder {} is missing, empty or cut short; copy it, with vocab.json and merges.txt, from the model that this "
    "one was made of"
)


class TextLengths(NamedTuple):
    """Numbers of tokens of the texts of a row, begin and end included."""

    prompt: int
    negative_prompt: int

    def excess(self, most: int) -> str | None:
        """What is too long for a text encoder that takes ``most`` tokens, in words; None if nothing is."""
        for name, count in self._asdict().items():
            if count > most:
                return (
                    f"the {name.replace('_', ' ')} has {count} tokens, and the text encoder takes {most}: shorten it, "
                    "leave --long-prompts at truncate, or set it to chunk"
                )
        return None

    def windows(self, most: int, long_prompts: str) -> int:
        """Number of windows that the longer text is encoded in: 1 unless ``long_prompts`` is ``chunk``.

        Each window has a begin and an end of its own. For the arguments see :meth:`error`.
        """
        needed = (math.ceil((count - _ENDS) / (most - _ENDS)) for count in self)
        return max(1, *needed) if long_prompts == "chunk" else 1

    def error(self, most: int, long_prompts: str) -> str | None:
        """Why a row fails whose texts have these lengths, in words; None if it does not.

        Args:
            most: see :meth:`excess`.
            long_prompts: one of :data:`vcf_batch.config.limits.LONG_PROMPTS`.
        """
        if long_prompts == "refuse":
            return self.excess(most)
        if (windows := self.windows(most, long_prompts)) > MAX_WINDOWS:
            return (
                f"the longer text of the row has {max(self)} tokens, or {windows} windows of the text encoder, and "
                f"{MAX_WINDOWS} are the most: shorten it, or leave --long-prompts at truncate"
            )
        return None


def text_lengths(tokenizers: Sequence[Any], rows: Sequence[Row], config: RunConfig) -> list[TextLengths]:
    """The lengths of the texts of each row.

    Args:
        tokenizers: each ``CLIPTokenizer`` of a model, whose text encoders take ``model_max_length`` tokens. The longest
            length of a text counts: those of Stable Diffusion XL have different tokens for ``!!``.
        rows: any number; equal texts are counted once.
        config: the run, with every default settled.
    """
    pairs = [(row.prompt, settings_of(row, config)["negative_prompt"]) for row in rows]
    texts = [*dict.fromkeys(itertools.chain.from_iterable(pairs))]
    counts = [
        map(len, tokenizer(texts, truncation=False, padding=False)["input_ids"]) for tokenizer in tokenizers if texts
    ]
    lengths = dict(zip(texts, map(max, zip(*counts, strict=True)), strict=True))
    return [TextLengths(lengths[prompt], lengths[negative]) for prompt, negative in pairs]


def windows_of(tokenizers: Sequence[Any], rows: Sequence[Row], config: RunConfig) -> list[int]:
    """Number of windows that the texts of each row are encoded in; for the arguments see :func:`text_lengths`."""
    most, lengths = int(tokenizers[0].model_max_length), text_lengths(tokenizers, rows, config)
    return [found.windows(most, config.long_prompts) for found in lengths]


def refuse_without_words(tokenizer: Any, folder: str = _TOKENIZER) -> None:
    """Refuse a tokenizer that knows its special tokens alone, to which all prompts would be equal.

    Args:
        tokenizer: a ``CLIPTokenizer``.
        folder: where in the model it is, for the message.

    Raises:
        ModelError: it is such a tokenizer, as transformers makes of a folder that is empty or missing.
    """
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        lacking = _LACKING.format(folder)
        raise ModelError(f"the model's tokenizer knows {len(tokenizer)} tokens and no word, as {lacking}")


def require_vocabulary(model: ResolvedModel, folders: Sequence[str] = (_TOKENIZER,)) -> None:
    """Refuse a model without a vocabulary, without loading its tokenizers.

    Args:
        model: a Stable Diffusion.
        folders: those of its tokenizers.

    Raises:
        ModelError: there is none, or the hub cannot be reached.
        StorageError: the storage failed.
    """
    for folder in folders:
        if not any(read_file(model, f"{folder}/{name}", _MAX_BYTES) for name in ("vocab.json", "tokenizer.json")):
            raise ModelError(f"{model.name} has no vocabulary: {_LACKING.format(folder)}")


def read_tokenizers(model: ResolvedModel) -> list[Any]:
    """Each ``CLIPTokenizer`` of a model, without fetching its weights.

    Raises:
        ModelError: the model has no readable tokenizer, or the hub cannot be reached.
        StorageError: the storage failed.
    """
    from transformers import CLIPTokenizer, logging  # takes a second, which nobody else should wait for

    logging.set_verbosity_error()  # that a prompt is long is what it is asked for
    return [
        tokenizer
        for place in (_TOKENIZER, _SECOND_TOKENIZER)
        if (tokenizer := _read_one(model, place, CLIPTokenizer)) is not None
    ]


def _read_one(model: ResolvedModel, place: str, kind: Any) -> Any:
    with scratch.temporary("a tokenizer") as folder:
        for name in _FILES:
            if (data := read_file(model, f"{place}/{name}", _MAX_BYTES)) is not None:
                Path(folder, name).write_bytes(data)
        if place == _SECOND_TOKENIZER and not [*Path(folder).iterdir()]:
            return None
        with load_errors(f"the {place} of the model {model.name}"):
            tokenizer = kind.from_pretrained(folder, local_files_only=True)
        refuse_without_words(tokenizer, place)
        return tokenizer
