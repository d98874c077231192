"""The settings of an export, checked; and the fields that name it."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from vcf_batch.errors import UsageError
from vcf_batch.records import TRIPLET

EXPORT_FORMATS = ("webdataset", "parquet", "energon")
"""``webdataset`` and ``energon`` are tars with a parquet of rows beside each, ``parquet`` has images in the rows."""

REFERENCE_FORMS = ("relative", "copy")
"""What is handed on of references: names without paths of this machine, or the images too."""

SPLIT_BY = ("key", "prompt", "reference", "prompt,reference")
"""Columns whose equal values stay in one split."""

WHOLE: Mapping[str, Fraction] = {"train": Fraction(1)}
"""The shares where no split is asked for."""

DEFAULT_SHARD_BYTES = 512 * 10**6
LEAST_SHARD_BYTES = 1000

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What is selected, and the form that it is handed on in.

    Raises:
        UsageError: a value is none that it can have.
    """

    where: str | None = None
    """Condition on the rows, see :class:`vcf_batch.report.condition.Condition`; None selects all."""
    exclude: frozenset[str] = frozenset()
    """Keys that are left out."""
    shares: Mapping[str, Fraction] = field(default_factory=lambda: WHOLE)
    """Share of the rows of each split, by its name, see :func:`vcf_batch.commands.export.split.parse`."""
    split_by: str = "key"
    format: str = "webdataset"
    images: tuple[str, ...] = ()
    """Those of :data:`vcf_batch.records.TRIPLET` that go along."""
    references: str = "relative"
    shard_bytes: int = DEFAULT_SHARD_BYTES
    """Bytes after which a shard is closed. A row that is larger has a shard of its own."""
    partial: bool = False
    """Whether shards that are damaged or not generated yet are left out."""

    def __post_init__(self) -> None:
        for option, value, choices in (
            ("--format", self.format, EXPORT_FORMATS),
            ("--references", self.references, REFERENCE_FORMS),
            ("--split-by", self.split_by, SPLIT_BY),
        ):
            if value not in choices:
                raise UsageError(f"{option} is {value!r}; it must be one of {', '.join(choices)}")
        if unknown := [name for name in self.images if name not in TRIPLET]:
            raise UsageError(f"--images names {unknown[0]!r}; it takes {','.join(TRIPLET)}, or one of the two")
        if self.shard_bytes < LEAST_SHARD_BYTES:
            raise UsageError(f"--shard-bytes is {self.shard_bytes}; it must be at least {LEAST_SHARD_BYTES:,}")

    def fields(self) -> dict[str, Any]:
        """The settings as plain JSON types, without ``partial``: what is left out is told by the sources."""
        excluded = "\n".join(sorted(self.exclude)).encode()
        return {
            "where": self.where,
            "exclude_sha256": hashlib.sha256(excluded).hexdigest() if self.exclude else None,
            "split": {name: str(share) for name, share in self.shares.items()},
            "split_by": self.split_by,
            "format": self.format,
            "images": list(self.images),
            "references": self.references,
            "shard_bytes": self.shard_bytes,
        }


def parse_images(text: str) -> tuple[str, ...]:
    """The names in ``content,style``: those of :data:`vcf_batch.records.TRIPLET` in order, then what is unknown."""
    names = {name.strip() for name in text.split(",") if name.strip()}
    return (*(name for name in TRIPLET if name in names), *sorted(names - {*TRIPLET}))


def parse_bytes(text: str) -> int:
    """A number of bytes such as ``500MB``, ``1.5GB`` or ``256MiB``.

    Raises:
        UsageError: the text is something else.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(f"--shard-bytes is {text!r}; give a number of bytes, such as 500MB or 1GiB")
    return int(Fraction(match[1]) * _UNITS[match[2].lower()])
