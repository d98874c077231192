"""A score by a function of the user's own."""

import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vcf_batch.errors import UsageError
from vcf_batch.metrics.shown import Part, Seen, Shown

_PART = re.compile(r"[a-z][a-z0-9_]*")


class OwnFunction:
    """Scorer by a function from images and rows to named numbers.

    The function takes a list of RGB images and the list of their rows, each a dictionary of the output's columns. It
    returns a dictionary from a name to one number for each image; None and what is not finite is no value. The same
    names come each time. What it gives may depend on anything, so there is no promise of identical bytes.

    Args:
        name: the function as ``module:function``.
        call: the function.
    """

    def __init__(self, name: str, call: Callable[[list[Image.Image], list[Mapping[str, Any]]], Any]) -> None:
        self._name, self._call = name, call
        self.parts: Mapping[str, Part] = {}

    @classmethod
    def load(cls, name: str, folder: str) -> "OwnFunction":
        """Import the function.

        Args:
            name: ``module:function``.
            folder: where modules are looked for before Python's own places.

        Raises:
            UsageError: there is no such module, or no such function in it.
        """
        module, _, function = name.partition(":")
        if folder not in sys.path:
            sys.path.insert(0, folder)
        try:
            call = getattr(importlib.import_module(module), function)
        except Exception as error:  # whatever the module raises
            raise UsageError(
                f"the function {name} cannot be imported: {type(error).__name__}: {error}; give module:function of a "
                f"module in {folder}, or one that is installed on every node"
            ) from error
        if not callable(call):
            raise UsageError(f"{name} is a {type(call).__name__}; give a function of images and rows")
        return cls(name, call)

    def prepare(self, picture: NDArray[np.uint8]) -> Image.Image:
        """The picture as an image."""
        return Image.fromarray(picture)

    def score(
        self, shown: Sequence[Shown], prepared: Sequence[Image.Image], seen: Seen
    ) -> Mapping[str, Sequence[float | None]]:
        """See :class:`vcf_batch.metrics.shown.ImageScorer`.

        Raises:
            UsageError: the function fails, or gives something else.
        """
        try:
            given = self._call([*prepared], [each.row for each in shown])
        except Exception as error:  # whatever the function raises
            raise UsageError(f"the function {self._name} fails: {type(error).__name__}: {error}") from error
        try:
            found = {str(name): [_number(value) for value in values] for name, values in given.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise UsageError(
                f"the function {self._name} gives {given!r:.100}; it has to give a dictionary from names to one number "
                "for each image"
            ) from error
        for name, values in found.items():
            if not _PART.fullmatch(name) or len(values) != len(shown):
                raise UsageError(
                    f"the function {self._name} gives {len(values)} values named {name!r} for {len(shown)} images; a "
                    "name has small letters, digits and _, and each image one number"
                )
        if not found or (self.parts and {*found} != {*self.parts}):
            raise UsageError(
                f"the function {self._name} gives {', '.join(found) or 'nothing'}"
                + (f", and gave {', '.join(self.parts)} before; it has to give the same names" if self.parts else "")
            )
        self.parts = {name: Part(f"By {self._name}.") for name in sorted(found)}
        return found


def _number(value: Any) -> float | None:
    number = None if value is None else float(value)
    return number if number is not None and math.isfinite(number) else None
