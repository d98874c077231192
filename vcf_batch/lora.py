"""LoRAs (Hu et al. 2021, arXiv 2106.09685) as runs and rows name them: a file of weights, and a scale."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from vcf_batch.errors import UsageError, redact_name

SUFFIX = ".safetensors"
MAX_LORA_SCALE = 10.0
"""Largest scale of a LoRA. The smallest is its negative."""
MAX_LORAS = 8
"""Largest number of LoRAs of a row."""
MAX_LORA_BYTES = 2 << 30
"""Largest file of a LoRA. Published ones of rank 128 for Stable Diffusion XL have about 900 MB."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NUMBER = re.compile(r"[+-]?[0-9]*\.?[0-9]+").fullmatch
_SHOWN = 200


class Lora(NamedTuple):
    """A LoRA and the scale that its weights are added with."""

    source: str
    """Name of one of the run's LoRAs, or the path or URL of a file."""
    scale: float | None
    """None where none is given: that of the run's LoRA, or 1."""

    @property
    def is_file(self) -> bool:
        """Whether the source is a file, rather than the name of one of the run's LoRAs."""
        return _is_file(self.source)

    def shown(self) -> str:
        """Source and scale as outputs show them, without secrets."""
        return f"{redact_name(self.source)}:{1.0 if self.scale is None else self.scale:.12g}"


def parse(text: str) -> Lora:
    """Take ``SOURCE[:SCALE]`` apart.

    Raises:
        UsageError: the source is neither a safetensors file nor a name, or the scale is no number or out of its limits.
    """
    source, scale = text, None
    head, _, tail = text.rpartition(":")
    # A colon in the query of an address may be its own.
    if not text.endswith(SUFFIX) and (_is_file(head) or _NAME.fullmatch(head)) and ("?" not in head or _NUMBER(tail)):
        source, scale = head, _scale(text, tail)
    if not _is_file(source) and not _NAME.fullmatch(source):
        shown = repr(redact_name(source)[:_SHOWN])
        raise UsageError(
            f"lora is {shown}, which is no {SUFFIX} file: name a file of that kind, and convert a pickle (.pt, .bin, "
            ".ckpt), which may run code, where you trust it"
        )
    return Lora(source, scale)


def parse_named(text: str) -> tuple[str, Lora]:
    """Take ``NAME=URL[:SCALE]`` apart, as ``--lora`` has it.

    Raises:
        UsageError: there is no such name, or see :func:`parse`.
    """
    name, equals, rest = text.partition("=")
    if not equals or not _NAME.fullmatch(name):
        raise UsageError(
            f"lora is {redact_name(text)[:_SHOWN]!r}; it must be NAME=URL[:SCALE], such as ink=ink.safetensors:0.8, "
            "with a name of 1 to 64 of the characters A-Z a-z 0-9 _ -"
        )
    lora = parse(rest)
    if not lora.is_file:
        raise UsageError(f"lora {name} is {lora.source!r}, which is no {SUFFIX} file: name the file after {name}=")
    return name, Lora(lora.source, 1.0 if lora.scale is None else lora.scale)


def named_loras(texts: tuple[str, ...]) -> dict[str, Lora]:
    """The LoRAs of a run by their names, in the order of these.

    Raises:
        UsageError: a name occurs twice, or see :func:`parse_named`.
    """
    named: dict[str, Lora] = {}
    for name, lora in map(parse_named, texts):
        if name in named:
            raise UsageError(f"lora {name} is named twice; give each LoRA a name of its own")
        named[name] = lora
    if len(named) > MAX_LORAS:
        raise UsageError(f"lora has {len(named)} values; the limit is {MAX_LORAS}")
    return dict(sorted(named.items()))


def settled(own: tuple[Lora, ...] | None, run: Mapping[str, Lora]) -> tuple[Lora, ...]:
    """The LoRAs that a row is generated with, in an order that does not depend on the row's.

    Args:
        own: the row's own; None for all of the run's, and empty for none.
        run: the run's LoRAs by name.
    """
    if own is None:
        return tuple(Lora(name, lora.scale) for name, lora in sorted(run.items()))
    default = {name: lora.scale for name, lora in run.items()}
    scaled = (lora._replace(scale=default.get(lora.source, 1.0)) if lora.scale is None else lora for lora in own)
    return tuple(sorted(scaled))


def _is_file(text: str) -> bool:
    return text.partition("?")[0].endswith(SUFFIX) and text.partition("?")[0] != SUFFIX


def _scale(text: str, number: str) -> float:
    try:
        scale = float(number)
    except ValueError:
        scale = math.nan
    if not abs(scale) <= MAX_LORA_SCALE:
        raise UsageError(
            f"the scale of lora {redact_name(text)[:_SHOWN]!r} is {number[:_SHOWN]!r}; it must be a number between "
            f"{-MAX_LORA_SCALE:g} and {MAX_LORA_SCALE:g}"
        )
    return scale + 0.0  # -0.0 and 0.0 are one scale
