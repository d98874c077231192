"""Nodes that fail where others succeed. No Ray here."""

from collections import defaultdict
from collections.abc import Hashable

FAILURES = 3
"""Different pieces of work in a row that a node fails, while another one succeeds, before it is left out."""


class Quarantine:
    """Keeps count of what each node fails, and names those that get no more work."""

    def __init__(self) -> None:
        self.nodes: set[str] = set()
        self.reasons: dict[str, str] = {}
        """Why each node failed the last time."""
        self._failed: dict[str, set[Hashable]] = defaultdict(set)
        self._outdone: set[str] = set()
        """Nodes that have failed since they last succeeded, while another one succeeded."""

    def succeeded(self, node: str) -> set[str]:
        """A node has loaded a model or finished a shard.

        Returns:
            Nodes that are left out from now on.
        """
        self._failed.pop(node, None)
        self._outdone.discard(node)
        self._outdone.update(self._failed)
        return self._judge()

    @property
    def failing(self) -> set[str]:
        """Nodes that have failed since they last succeeded."""
        return {*self._failed}

    def failed(self, node: str, work: Hashable, reason: str) -> set[str]:
        """A node has failed a piece of work; the same piece counts once, as it may be to blame itself.

        Returns:
            Nodes that are left out from now on.
        """
        self._failed[node].add(work)
        self.reasons[node] = reason
        return self._judge()

    def lift(self) -> None:
        """Give every node another chance."""
        self.nodes.clear()
        self._failed.clear()
        self._outdone.clear()

    def _judge(self) -> set[str]:
        bad = {node for node in self._outdone if len(self._failed[node]) >= FAILURES} - self.nodes
        self.nodes |= bad
        return bad
