"""The embedded model ``tiny`` in words: what it is, what it can draw, and which runs used it."""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vcf_batch.models.resolution import TINY, folder_identity, tiny_folder

EMBEDDED = "embedded test model"
"""What ``tiny`` is called wherever its images are shown."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond", "crescent", "arrow")
"""The shapes of the world that ``tiny`` was trained on. It draws nothing else."""

_WORD = re.compile(r"[^\W\d_]+")


def can_draw(prompt: str) -> bool:
    """Whether ``tiny`` can draw a prompt: it names one of :data:`SHAPES`, and ``tiny`` has learnt all of its words."""
    words = {*_WORD.findall(prompt.lower())}
    return not words.isdisjoint(SHAPES) and words <= _learnt()


@functools.cache
def _learnt() -> frozenset[str]:
    """The words of the captions that ``tiny`` was trained on. Its tokenizer has a token for each."""
    tokenizer = json.loads(Path(tiny_folder(), "tokenizer", "tokenizer.json").read_bytes())
    end = tokenizer["model"]["end_of_word_suffix"]
    return frozenset(token.removesuffix(end) for token in tokenizer["model"]["vocab"] if token.endswith(end))


def is_embedded(model: Mapping[str, Any]) -> bool:
    """Whether a model is ``tiny``, by its name or by its files.

    Args:
        model: its ``name`` and ``identity``, as ``run.json`` has them.
    """
    return model.get("name") == TINY or model.get("identity") == _identity(tiny_folder())


@functools.cache
def _identity(folder: str) -> str:
    """The identity of the embedded model. Its weights are hashed once in a process."""
    return folder_identity(folder)


def label(model: Mapping[str, Any]) -> str:
    """The name of a model of ``run.json``, for people; of the embedded one with what it is."""
    name = str(model.get("name"))
    return f"{name} ({EMBEDDED})" if is_embedded(model) else name
