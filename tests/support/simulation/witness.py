"""Whoever sees every request of a simulated world, and says what does not hold."""

import hashlib
from collections.abc import Sequence
from typing import Any

from support.simulation.cluster import GONE
from support.simulation.object_store import Written
from vcf_batch import storage
from vcf_batch.output import commits, lease, receipts
from vcf_batch.output.receipts import RECEIPT_SUFFIX, SHARD_FILE, Receipt
from vcf_batch.setup.job import Job

OUT = "bucket/out"
"""Key of the output."""


class Witness:
    """What was seen of one world.

    Args:
        universe: the world.
    """

    def __init__(self, universe: Any) -> None:
        self._universe = universe
        self.tokens: dict[str, str] = {}
        """Token of each driver's lease."""
        self.done: set[int] = set()
        """Rows that have had a sample, and were not asked for again."""
        self._owned: dict[int, bool] = {}
        """Threads whose last look at the lease showed their own driver's."""
        self._stagers: dict[str, str] = {}
        """Workers by the staged files that they wrote: no two attempts share a name."""
        self._published: set[tuple[str, str]] = set()
        """Programs, each with the name of a shard's file that it has published."""
        self._writers: dict[str, int] = {}
        """Threads that have changed a shard's file last, by its key. Each may try again what it could not do."""

    def looked_at(self, key: str, data: bytes | None) -> None:
        """Note whether a program has found its own lease."""
        universe = self._universe
        if key.endswith(lease.LEASE_NAME):
            group, thread = universe.store.who()
            token = lease._parsed(data).get("token")
            self._owned[thread] = token is not None and self.tokens.get(token) == group

    def watch(self, written: Written) -> None:
        """Check a change of the store."""
        universe = self._universe
        name = storage.name(written.key)
        group = written.group
        if written.data is not None and name == lease.LEASE_NAME:
            self.tokens[str(lease._parsed(written.data).get("token"))] = group
        if f"/{commits.STAGING}/" in written.key and SHARD_FILE.fullmatch(name) and written.data is not None:
            stager = self._stagers.setdefault(written.key, group)
            if stager != group:
                raise universe.violation(f"{group} stages {name} under the name of {stager}'s attempt")
        if written.key.count("/") != 2 or (match := SHARD_FILE.fullmatch(name)) is None:
            return
        universe.tell(f"{group} {written.action}s {written.key.partition('/')[2]}")
        if written.data is not None:
            self._published.add((group, name))
        if universe.scheduler.current in universe.senders:
            return  # the lease was looked at when the request was sent
        is_output = written.key.startswith(f"{OUT}/")
        is_repeated = self._writers.get(written.key) == written.thread
        self._writers[written.key] = written.thread
        if is_output and group in universe.started and not is_repeated and not self._owned.get(written.thread):
            raise universe.violation(f"{group} changes {name} without having found its own lease first")
        stem = written.key.removesuffix(match[2])
        if universe.store.objects.get(stem + RECEIPT_SUFFIX):
            _, entries = self.read_shard(stem)
            if is_output and name.endswith(RECEIPT_SUFFIX):
                self._owned[written.thread] = False  # the next shard needs another look
                self.done |= {row for row, entry in entries.items() if entry["status"] == "success"}

    def read_shard(self, stem: str) -> tuple[Receipt, dict[int, Any]]:
        """Receipt and entries of a shard, by the begin of the keys of its files."""
        universe = self._universe
        objects = universe.store.objects
        receipt = Receipt.from_json(objects[stem + RECEIPT_SUFFIX])
        for kind, suffix in receipts.FILE_SUFFIXES.items():
            data, entry = objects.get(stem + suffix), receipt.files.get(kind)
            if (data and hashlib.sha256(data).hexdigest()) != (entry and entry.sha256):
                raise universe.violation(f"the receipt of shard {stem} stands beside another {kind}")
        return receipt, universe.form.entries(objects[f"{stem}.parquet"], receipt.shard)

    def check_good_end(self, group: str, job: Job, chosen: Sequence[str]) -> None:
        """Check that a driver that ends with success has left nothing undone.

        Args:
            chosen: names of the receipts that it had to replace.
        """
        universe = self._universe
        if kept := [name for name in chosen if (group, name) not in self._published]:
            raise universe.violation(f"{group} ends well, and has not replaced {kept}")
        ever = {name for _, name in self._published} | universe.store.objects.below.get(OUT, set())
        if missing := [shard.name for shard in job.shards if shard.name + RECEIPT_SUFFIX not in ever]:
            raise universe.violation(f"{group} ends well, and {missing} have never had a receipt")

    def check_end(self) -> None:
        """Check what was left after all has ended."""
        universe = self._universe
        objects = universe.store.objects
        names = {storage.name(key) for key in objects if storage.parent(key) == OUT}
        if left := [key for key in objects if key.startswith(f"{OUT}/{commits.STAGING}/")]:
            raise universe.violation(f"staged files are left: {left}")
        job, wanted = universe.job(), {"run.json", "_progress.json"}
        for shard in job.shards:
            if shard.name + RECEIPT_SUFFIX not in names:
                raise universe.violation(f"shard {shard.name} is missing")
            receipt, entries = self.read_shard(f"{OUT}/{shard.name}")
            wanted |= {
                shard.name + end for end in (RECEIPT_SUFFIX, *map(receipts.FILE_SUFFIXES.get, receipt.files)) if end
            }
            if [*entries] != [*range(shard.start, shard.stop)]:
                raise universe.violation(f"shard {shard.name} has the rows {[*entries]}")
            for row, entry in entries.items():
                self._check_row(row, entry, job)
        if names - universe.readers.files != wanted:
            raise universe.violation(f"the output has {sorted(names ^ wanted)} besides or without what it must have")
        universe.readers.check_ends()
        for group, code in universe.codes.items():
            error = universe.errors.get(group)
            if code == 4 and group not in universe.excused and "no longer owns" in str(error):
                raise universe.violation(f"{group} lost its lease although it was never suspended: {error}")
            if code == 1 and group not in universe.excused and "failed again and again" not in str(error):
                raise universe.violation(f"{group} ended with {code} although its storage was sound: {error}")
            if code not in (0, 1, 4, "killed"):
                raise universe.violation(f"{group} ended with {code}: {error}")

    def _check_row(self, row: int, entry: dict[str, Any], job: Job) -> None:
        universe = self._universe
        harm = universe.ways.rows.get(row)
        if entry["status"] == "success":
            digest = hashlib.sha256(f"{row} {job.config.seed}".encode()).hexdigest()[:12]
            if entry["told"] != digest or harm:
                raise universe.violation(f"row {row} has the sample {entry['told']}")
        elif entry["told"] == GONE:
            if row not in universe.ways.gone or row in self.done:
                raise universe.violation(f"row {row} had a sample, which is lost")
        elif not harm:
            raise universe.violation(f"row {row} is innocent and blamed: {entry['told']}")
