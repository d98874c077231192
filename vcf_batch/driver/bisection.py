"""Which row kills the workers that generate it? Found by bisecting a shard on trial.

A trial generates some rows of a shard, each in its own batch and place, and throws them away
(:meth:`vcf_batch.worker.worker.Worker.trial`). Halving the suspects leaves one row; what kills three more workers that
generate nothing else is not bad luck. The verdict counts only once the rest of the shard has been generated without it.
"""

from collections.abc import Sequence

REPEATS = 3
"""How often the last suspect has to kill its worker alone. A single survival clears it."""


class Bisection:
    """Looks for one row that kills its workers: at most ``log2(len(suspects)) + 1 + REPEATS`` trials.

    Args:
        suspects: rows of which a shard was generated that killed its worker.
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
        """The row that has killed its worker often enough."""
        return self._suspects[0] if self._deaths == REPEATS else None

    @property
    def in_vain(self) -> bool:
        """Whether nobody is left to suspect: what happened to the shard came from elsewhere, or from several rows
        together."""
        return not self._suspects

    def died(self) -> None:
        """The trial killed its worker."""
        if len(self._suspects) == 1:
            self._deaths += 1
        self._suspects = self._half

    def survived(self) -> None:
        """The trial did not."""
        self._suspects = self._suspects[len(self._half) :]

    @property
    def _half(self) -> Sequence[int]:
        return self._suspects[: (len(self._suspects) + 1) // 2]
