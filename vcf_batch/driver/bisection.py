"""The search for a row that kills its workers, by bisecting a shard.

A trial generates some rows of a shard, each in its own batch and place, and discards them
(:meth:`vcf_batch.worker.worker.Worker.run`). Halving the suspects leaves one row. It is blamed if it kills
:data:`REPEATS` more workers that generate nothing else. The verdict counts only once the rest of the shard has been
generated without it.
"""

from collections.abc import Sequence

REPEATS = 3
"""Number of times that the last suspect has to kill its worker alone. A single survival clears it."""


class Bisection:
    """Search for one row that kills its workers, in at most ``log2(len(suspects)) + 1 + REPEATS`` trials.

    Args:
        suspects: rows that were generated when the shard killed its worker.
    """

    def __init__(self, suspects: Sequence[int]) -> None:
        self._suspects = suspects
        self._deaths = 0

    @property
    def trial(self) -> frozenset[int]:
        """Rows that the next trial generates: half of the suspects, or the last one."""
        return frozenset(self._half)

    @property
    def culprit(self) -> int | None:
        """Row that has killed its worker alone :data:`REPEATS` times; None as long as there is none."""
        return self._suspects[0] if self._deaths == REPEATS else None

    @property
    def in_vain(self) -> bool:
        """Whether no suspect is left: the cause lies elsewhere, or in several rows together."""
        return not self._suspects

    def died(self) -> None:
        """Take the death of the trial's worker."""
        if len(self._suspects) == 1:
            self._deaths += 1
        self._suspects = self._half

    def survived(self) -> None:
        """Take the survival of the trial's worker."""
        self._suspects = self._suspects[len(self._half) :]

    @property
    def _half(self) -> Sequence[int]:
        return self._suspects[: (len(self._suspects) + 1) // 2]
