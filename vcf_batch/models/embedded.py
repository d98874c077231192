"""The embedded model ``tiny`` in words: what it is, what it can draw, and which runs used it."""

import functools
import re
from collections.abc import Mapping
from typing import Any

from vcf_batch.models.resolution import TINY, folder_identity, tiny_folder

EMBEDDED = "embedded test model"
"""What ``tiny`` is called wherever its images are shown."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond", "crescent", "arrow")
"""The shapes of the world that ``tiny`` was trained on. It draws nothing else."""

_WORDS = frozenset(word for shape in SHAPES for word in (shape, f"{shape}es" if shape.endswith("s") else f"{shape}s"))
_WORD = re.compile(r"[^\W\d_]+")


def can_draw(prompt: str) -> bool:
    """Whether ``tiny`` can draw a prompt: one of its words is one of :data:`SHAPES`, in singular or plural."""
    return not _WORDS.isdisjoint(_WORD.findall(prompt.lower()))


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


def told(model: Mapping[str, Any]) -> str:
    """The name of a model of ``run.json``, for people; of the embedded one with what it is."""
    name = str(model.get("name"))
    return f"{name} ({EMBEDDED})" if is_embedded(model) else name
