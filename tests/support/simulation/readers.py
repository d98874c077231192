"""Programs beside the drivers of a simulated world: they verify the output, show it, and push it to another place."""

from typing import Any

from vcf_batch import storage
from vcf_batch.commands import push, verify
from vcf_batch.errors import DamageFound, VcfBatchError
from vcf_batch.output import receipts
from vcf_batch.output.output import Output
from vcf_batch.report import card, page
from vcf_batch.storage import local

ACTIONS = ("verify", "report", "push")


class Readers:
    """The readers of one world.

    Args:
        universe: the world.
    """

    def __init__(self, universe: Any) -> None:
        self._universe = universe
        self.ends: dict[str, str] = {}
        """How each reader ended, by its name."""

    def start(self, action: str) -> str:
        """Start one of :data:`ACTIONS`.

        Returns:
            Its name.
        """
        name = f"reader-{len(self.ends)}, to {action}"
        self.ends[name] = "killed"
        self._universe.scheduler.spawn(lambda: self._run(action, name), name, name)
        return name

    def _run(self, action: str, name: str) -> None:
        universe = self._universe
        try:
            self._act(action, name, Output(universe.output))
            self.ends[name] = "success"
        except DamageFound as error:
            raise universe.violation(f"{name}: {error}, though nothing is damaged") from error
        except VcfBatchError as error:
            self.ends[name] = f"{type(error).__name__}: {error}"
        universe.tell(f"{name} ends: {self.ends[name]}")

    def _act(self, action: str, name: str, output: Output) -> None:
        accused: Any = []
        if action == "verify":
            accused = [str(finding) for finding in verify.check(output) if finding.is_damage]
        elif action == "report":
            page.render(output)
        else:
            accused = push.push(output, self._universe.store.url("target")).damaged
        if accused:
            raise self._universe.violation(f"{name} accuses: {accused}")

    def check_ends(self) -> None:
        """Check that each reader ended as it may: the storage may have failed it, and there may be nothing to read."""
        for name, end in self.ends.items():
            if not end.startswith(("success", "killed", "StorageError", "UsageError")):
                raise self._universe.violation(f"{name} ended with {end}")

    def check_target(self) -> None:
        """Check that the target has the shards of the output, and nothing else.

        An unfinished file of a push that was killed stays in a local target for an hour.
        """
        objects = self._universe.store.objects
        ours, theirs = (
            {storage.name(key): data for key, data in objects.items() if storage.parent(key) == f"bucket/{folder}"}
            for folder in ("out", "target")
        )
        shards = {name: data for name, data in ours.items() if receipts.SHARD_FILE.fullmatch(name)}
        if {name: theirs.get(name) for name in shards} != shards:
            raise self._universe.violation("the target has not the shards of the output")
        if others := {name for name in theirs.keys() - ours.keys() if not name.startswith(local._TEMPORARY)}:
            raise self._universe.violation(f"the target has {sorted(others)}, which the output has not")

    @property
    def files(self) -> set[str]:
        """Names of the files that they write into the output."""
        return {card.CARD_NAME, page.PAGE_NAME} if any("push" in name for name in self.ends) else set()
