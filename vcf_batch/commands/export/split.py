"""The split of each row: a pure function of its key, its prompt or its references.

No random number and no count is involved. So a row stays in its split when other rows come or go, on every machine.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from vcf_batch.errors import UsageError

_BITS = 64
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_TAKEN = ("references",)
"""Names of other folders of an export."""
_EXAMPLE = "such as train=0.98,validation=0.02"


def parse(text: str) -> dict[str, Fraction]:
    """The shares in ``train=0.98,validation=0.02``, exactly as they are written.

    Raises:
        UsageError: the text is something else, or the shares do not sum to 1.
    """
    shares: dict[str, Fraction] = {}
    for part in text.split(","):
        name, equals, value = (each.strip() for each in part.partition("="))
        if not equals or not _NAME.fullmatch(name):
            raise UsageError(
                f"--split has {part.strip()!r}; give each split a name of letters, digits and _ and a share, {_EXAMPLE}"
            )
        if name in shares or name in _TAKEN:
            reason = "is named twice" if name in shares else "is the folder of references"
            raise UsageError(f"--split: {name!r} {reason}; give each split a name of its own")
        try:
            number = Decimal(value)
            shares[name] = Fraction(number) if number.is_finite() else Fraction(0)
        except InvalidOperation:
            raise UsageError(f"--split: the share of {name} is {value!r}; give a number, {_EXAMPLE}") from None
        if not 0 < shares[name] <= 1:
            raise UsageError(f"--split: the share of {name} is {value}; it must be above 0 and at most 1")
    if (total := sum(shares.values())) != 1:
        raise UsageError(f"--split sums to {float(total):.12g}; the shares must sum to 1, {_EXAMPLE}")
    return shares


class Split:
    """The assignment of rows to splits.

    By ``prompt,reference``, a row is kept only if its prompt and all its references are of the same split. Where both
    are independent, a split of which a part p of the prompts and of the references is taken keeps p * p of the rows. So
    the parts are taken as the square roots of the shares: of the rows that are kept, each split has its share.

    Args:
        shares: share of each split by name; they sum to 1.
        by: ``key``, ``prompt``, ``reference`` or ``prompt,reference``.
    """

    def __init__(self, shares: Mapping[str, Fraction], by: str) -> None:
        self._by = by.split(",")
        self._names = [*shares]
        parts = [*shares.values()]
        if len(self._by) > 1:
            # Integer square roots: the same on every machine.
            roots = [math.isqrt((part.numerator << 256) // part.denominator) for part in parts]
            parts = [Fraction(root, sum(roots)) for root in roots]
        self._ends = [math.floor(end * (1 << _BITS)) for end in itertools.accumulate(parts)]

    def of(self, key: str, prompt: str, references: Sequence[str]) -> str | None:
        """The split of a row; None if the row straddles splits.

        Args:
            key: its key.
            prompt: its prompt.
            references: names of its references. A row without references goes by its prompt.
        """
        found = set()
        for column in self._by:
            if column == "reference" and references:
                found |= {self._place("reference", name) for name in references}
            elif column == "key":
                found.add(self._place("key", key))
            else:
                found.add(self._place("prompt", prompt))
        return found.pop() if len(found) == 1 else None

    def _place(self, column: str, value: str) -> str:
        data = f"{column}:{value}".encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(data, digest_size=_BITS // 8, person=b"vcf-batch split").digest()
        number = int.from_bytes(digest, "big")
        return next(name for name, end in zip(self._names, self._ends, strict=True) if number < end)
