"""Nodes that fail where others succeed."""

from collections import defaultdict
from typing import Literal

from vcf_batch.records import Shard

Work = Literal["load", "shard"]
"""Kind of work that a node does."""

FAILURES = 3
"""Number of different pieces of work that a node fails in a row, while another one succeeds, before it is left out."""


class Quarantine:
    """Count of each node's failures, and the nodes that get no more work."""

    def __init__(self) -> None:
        self.nodes: set[str] = set()
        """Nodes that get no more work."""
        self.reasons: dict[str, str] = {}
        """Reason of each node's last failure."""
        self._failed: dict[tuple[str, Work], set[object]] = defaultdict(set)
        self._outdone: set[tuple[str, Work]] = set()
        """Nodes that failed a kind of work while another node succeeded at it, each with that work."""

    def succeeded(self, node: str, work: Work) -> set[str]:
        """Record a success. Loading a model proves loading only; finishing a shard proves both.

        Returns:
            Nodes that are left out from now on.
        """
        proven: set[Work] = {"load", work}
        for each in proven:
            self._failed.pop((node, each), None)
            self._outdone.discard((node, each))
        self._outdone.update((other, each) for other, each in self._failed if each in proven)
        return self._judge()

    @property
    def failing(self) -> set[str]:
        """Nodes that have failed since they last succeeded."""
        return {node for node, _ in self._failed}

    def failed(self, node: str, shard: Shard | None, reason: str) -> set[str]:
        """Record a failure of a shard, or of loading if ``shard`` is None.

        A shard counts once, because it may itself be to blame.

        Returns:
            Nodes that are left out from now on.
        """
        self._failed[node, "shard" if shard else "load"].add(shard or object())
        self.reasons[node] = reason
        return self._judge()

    def lift(self) -> None:
        """Discard all failures, so that every node gets work again."""
        self.nodes.clear()
        self._failed.clear()
        self._outdone.clear()

    def _judge(self) -> set[str]:
        bad = {node for node, work in self._outdone if len(self._failed[node, work]) >= FAILURES} - self.nodes
        self.nodes |= bad
        return bad
