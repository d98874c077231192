"""The signature of a function that takes settings."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from vcf_batch.config.mapping import SETTLED

_Function = TypeVar("_Function", bound=Callable[..., Any])


def with_settings_of(kind: type, left_out: frozenset[str] = frozenset()) -> Callable[[_Function], _Function]:
    """Give a function with ``**settings`` the signature of a configuration, for ``help()`` and editors.

    Args:
        kind: the configuration, a dataclass.
        left_out: fields that the function decides itself.
    """

    def decorate(function: _Function) -> _Function:
        own = [each for each in inspect.signature(function).parameters.values() if each.kind is not each.VAR_KEYWORD]
        names = {each.name for each in own} | left_out | SETTLED
        settings = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
                annotation=field.type,
            )
            for field in dataclasses.fields(kind)
            if field.name not in names
        ]
        signature = inspect.signature(function).replace(parameters=[*own, *settings])
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return decorate
