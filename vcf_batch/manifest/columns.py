"""The names of a manifest's columns: those that a run reads, and those that may have been meant for them."""

import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from vcf_batch.config.run_config import COLUMN_SETTINGS
from vcf_batch.errors import redact
from vcf_batch.records import OVERRIDES

MANIFEST_COLUMNS = ("prompt", "reference", "reference_masks", "negative_reference", "sample_id", "seed", *OVERRIDES)
"""Columns with a meaning for the run; every other column is carried through to the outputs."""

LIMITS = ("reference_roles", "reference_masks")
"""Columns that limit where references act."""

HASH_COLUMNS = {"reference_sha256": "reference", "negative_reference_sha256": "negative_reference"}
"""Columns with the hashes of the images in another column. They are carried through, too."""

OPTIONS = {name: f"--{setting.replace('_', '-')}" for name, setting in COLUMN_SETTINGS.items()}
"""Options that name the column to read in place of one of the run's."""

OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("text", "caption", "captions", "description"),
    "reference": (
        "image", "images", "img", "url", "urls", "uri", "image_url", "image_path", "image_uri", "file_name",
        "references", "reference.path", "reference.url", "reference.bytes", "reference_path", "reference_url",
        "reference_uri", "reference_image", "conditioning_image",
    ),
    "negative_reference": ("negative_image", "negative_reference_path", "negative_reference_url"),
    "seed": ("seeds", "random_seed", "noise_seed"),
    "negative_prompt": ("neg_prompt", "negative", "negative_text"),
    "guidance_scale": ("cfg", "cfg_scale", "guidance"),
}  # fmt: skip
"""Names that others give to columns of the run. A column with such a name, in any spelling, is refused where the column
meant is absent."""


def _spelling(name: str) -> str:
    """What variants of a name have in common: neither case, nor blanks, ``_`` and ``-``, nor what nobody sees."""
    return re.sub(r"[\s_\u200b\ufeff-]+", "", name).casefold()


_KNOWN = {_spelling(name): name for name in (*MANIFEST_COLUMNS, *HASH_COLUMNS)}
_OTHERS = {_spelling(other): name for name, others in OTHER_NAMES.items() for other in others}


def variant_of(name: str) -> str | None:
    """The column of the run that ``name`` is another spelling of; None if it is none, or the column itself."""
    known = _KNOWN.get(_spelling(name))
    return None if name in _KNOWN.values() else known


def other_name_of(name: str) -> str | None:
    """The column of the run that others call ``name``, by :data:`OTHER_NAMES`; None if there is none."""
    return None if name in _KNOWN.values() else _OTHERS.get(_spelling(name))


def problems(names: Sequence[str], mapped: Mapping[str, str], carry: Collection[str]) -> Iterator[str]:
    """Yield what is wrong with the names of one file's columns, in words.

    Args:
        names: names of the file's columns.
        mapped: name of the column that is read in place of one of :data:`OPTIONS`.
        carry: columns to carry through though their names suggest another meaning.
    """
    read = {mapped.get(name, name) for name in MANIFEST_COLUMNS}
    for name, column in mapped.items():
        if column not in names:
            yield f"column {shown(column)} of {OPTIONS[name]} is missing; the file has: {listed(names)}"
    for name in carry:
        if name not in names:
            yield f"column {shown(name)} of --carry is missing; the file has: {listed(names)}"
        elif name in read or name in MANIFEST_COLUMNS:
            yield (
                f"column {shown(name)} of --carry has the name of a column that the outputs have already; rename it, "
                "or leave out the option"
            )
    without_prompt = "prompt" not in mapped and "prompt" not in names
    if without_prompt:
        alike = [name for name in names if variant_of(name) == "prompt"]
        meant = [*alike, *(name for name in names if other_name_of(name) == "prompt")]
        found = f"rename {alike[0]!r}" if alike else f"the file has: {listed(names)}"
        hint = f"; if {shown(meant[0])} is meant, give --prompt-column {shlex.quote(meant[0])}" if meant else ""
        yield f"column 'prompt' is missing; {found}{hint}"
    for name in dict.fromkeys(names):
        known, other = variant_of(name), other_name_of(name)
        if name in read or name in carry or (without_prompt and "prompt" in (known, other)):
            continue
        if known:
            yield f"column {shown(name)} is not read: if {known!r} is meant, {_remedy(known, name)}"
        elif other and mapped.get(other, other) not in names:
            yield f"column {shown(name)} is not read, and there is no {other!r}: if it is meant, {_remedy(other, name)}"


def listed(names: Sequence[str]) -> str:
    """Names of columns for a message, cut where they are very many."""
    return cut(", ".join(names)) or "no columns"


def shown(value: Any) -> str:
    """A value as error messages show it: redacted, and at most 60 characters."""
    return cut(redact(repr(value.decode(errors="replace") if isinstance(value, bytes) else value)), 60)


def cut(text: str, length: int = 200) -> str:
    """The beginning of a text that is longer than ``length``."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _remedy(meant: str, name: str) -> str:
    option = f" or give {OPTIONS[meant]} {shlex.quote(name)}" if meant in OPTIONS else ""
    return f"rename it to {meant!r}{option}; else carry it through with --carry {shlex.quote(name)}"
