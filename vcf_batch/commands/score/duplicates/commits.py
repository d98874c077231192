"""The commits of a search: the files of each shard, with receipts that name the shards that were searched."""

import hashlib
import os
import socket
import time

from vcf_batch.commands.score.duplicates.searched_rows import SearchedRows
from vcf_batch.output.lease import Lease
from vcf_batch.output.scores.definition import ScoreDefinition
from vcf_batch.output.scores.receipt import ScoreReceipt
from vcf_batch.output.scores.store import ScoreStore, parquet_bytes
from vcf_batch.records import FileEntry, Shard


class SearchCommits:
    """The commits of a search."""

    def __init__(self, store: ScoreStore, definition: ScoreDefinition, held: Lease, searched: str) -> None:
        self._store, self._definition, self._held, self._searched = store, definition, held, searched
        self._begin = time.monotonic()

    def commit(self, shard: Shard, parquet_hash: str, found: SearchedRows) -> ScoreReceipt:
        """Commit the values of a shard's rows, and return their receipt."""
        keys, values = found.of(shard)
        data = parquet_bytes(self._definition, keys, values)
        without, reason = found.errors.get(shard.index, (0, None))
        receipt = ScoreReceipt(
            shard=shard,
            of=parquet_hash,
            fingerprint=self._definition.fingerprint,
            fields=self._definition.fields,
            parquet=FileEntry(len(data), hashlib.sha256(data).hexdigest()),
            counts={name: len(column) - column.count(None) for name, column in values.items()},
            means={},
            without=without,
            reason=reason,
            timings={
                "total": round(time.monotonic() - self._begin, 3),
                "worker": f"{socket.gethostname()}:{os.getpid()}",
            },
            among=self._searched,
        )
        self._held.confirm()
        self._store.commit(self._definition, data, receipt)
        return receipt
