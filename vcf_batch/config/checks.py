"""Checks of single values: a choice, a number between limits, a type."""

import math
import reprlib
from types import UnionType
from typing import Any, get_args, get_origin

from vcf_batch.errors import UsageError

SHORT = reprlib.Repr()
"""Shows a value in a message. Aliases can make a few lines of YAML very deep and wide."""
SHORT.maxlevel = 2
SHORT.maxstring = 1000


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Check that the value of a setting is one of those that are allowed.

    Raises:
        UsageError: it is not.
    """
    if value not in allowed:
        raise UsageError(f"{name} is {SHORT.repr(value)}; it must be one of {', '.join(allowed)}")


def check_between(name: str, value: float | None, low: float, high: float | None) -> None:
    """Check that the value of a setting is finite and within its limits, both included. None is not checked.

    Args:
        high: None is no limit.

    Raises:
        UsageError: it is not.
    """
    if value is None:
        return
    if not math.isfinite(value) or value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UsageError(f"{name} is {value}; it must be {limit}")


def is_a(value: Any, annotation: Any) -> bool:
    """Whether ``value`` fits an annotation of a configuration, such as ``int | None``."""
    if isinstance(annotation, UnionType):
        return any(is_a(value, kind) for kind in get_args(annotation))
    if get_origin(annotation) is dict:
        return isinstance(value, dict) and all(is_a(name, str) and is_a(item, float) for name, item in value.items())
    if get_origin(annotation) is tuple:
        return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool):
        return annotation is bool
    return isinstance(value, (int, float) if annotation is float else annotation)


def in_words(annotation: Any) -> str:
    """An annotation in words, for messages: ``int | None`` is "a whole number or null"."""
    if isinstance(annotation, UnionType):
        return " or ".join(in_words(kind) for kind in get_args(annotation))
    if get_origin(annotation) is dict:
        return "a mapping of texts to numbers"
    if get_origin(annotation) is tuple:
        return "a list of texts"
    return {str: "a text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}[
        annotation
    ]
