"""Nodes that fail where others succeed."""

from collections import defaultdict
from typing import Literal

from vcf_batch.records import Shard

Work = Literal["load", "shard"]
"""What a node is given to do."""

FAILURES = 3
"""Different pieces of work in a row that a node fails, while another one succeeds, before it is left out."""


class Quarantine:
    """Keeps count of what each node fails, and names those that get no more work."""

    def __init__(self) -> None:
        self.nodes: set[str] = set()
        self.reasons: dict[str, str] = {}
        """Why each node failed the last time."""
        self._failed: dict[tuple[str, Work], set[object]] = defaultdict(set)
        self._outdone: set[tuple[str, Work]] = set()
        """What nodes have failed since they last succeeded, while another one succeeded."""

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
        """Record a failure: of a shard, or of loading if ``shard`` is None. Each shard counts once, as it may be to
        blame itself.

        Returns:
            Nodes that are left out from now on.
        """
        self._failed[node, "shard" if shard else "load"].add(shard or object())
        self.reasons[node] = reason
        return self._judge()

    def lift(self) -> None:
        """Give every node another chance."""
        self.nodes.clear()
        self._failed.clear()
        self._outdone.clear()

    def _judge(self) -> set[str]:
        bad = {node for node, work in self._outdone if len(self._failed[node, work]) >= FAILURES} - self.nodes
        self.nodes |= bad
        return bad
