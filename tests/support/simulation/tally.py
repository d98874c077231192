"""What GPUs and requests add up to in a simulation at scale."""

from collections import Counter
from collections.abc import Callable, Iterable

SAMPLING, READY = "sampling", "ready"


class GpuTime:
    """Seconds of all GPUs by what they do, before and after the last shard was handed out.

    Args:
        now: reads the clock.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._states: Counter[str] = Counter()
        self._since = 0.0
        self._seconds: Counter[tuple[str, bool]] = Counter()
        self._all_given = False

    def add(self, state: str, number: int) -> None:
        """Let ``number`` more GPUs be in a state; fewer if it is negative. Every GPU that is there is in ``all``."""
        self._pass()
        self._states[state] += number

    def all_given(self) -> None:
        """No shard is left to be handed out."""
        self._pass()
        self._all_given = True

    def shares(self, lost_seconds: float) -> dict[str, float]:
        """Share of the GPU time by use: what is kept, and what is lost, for each reason.

        Args:
            lost_seconds: seconds of sampling whose shard was sampled again.
        """
        self._pass()
        seconds = self._seconds
        total = seconds["all", False] + seconds["all", True]
        sampled = seconds[SAMPLING, False] + seconds[SAMPLING, True]
        found = {
            "sampling": sampled - lost_seconds,
            "lost": lost_seconds,
            "starting": seconds["all", False] - seconds[SAMPLING, False] - seconds[READY, False],
            "waiting": seconds[READY, False],
            "end": seconds["all", True] - seconds[SAMPLING, True],
        }
        return {name: value / total for name, value in found.items()}

    def _pass(self) -> None:
        passed, self._since = self._now() - self._since, self._now()
        for state, number in self._states.items():
            self._seconds[state, self._all_given] += number * passed  # type: ignore[assignment]


class Requests:
    """Requests to the storage, by sender and method, and the most within a second."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._by_second: dict[str, Counter[int]] = {}

    def add(self, sender: str, methods: Iterable[str], at: float) -> None:
        """Count requests that begin about some time."""
        number = 0
        for method in methods:
            self.counts[sender, method] += 1
            number += 1
        self._by_second.setdefault(sender, Counter())[int(at)] += number

    def total(self, sender: str) -> int:
        """All requests of a sender."""
        return sum(number for (own, _), number in self.counts.items() if own == sender)

    def peak(self, sender: str) -> int:
        """The most requests of a sender within a second."""
        return max(self._by_second.get(sender, Counter()).values(), default=0)
