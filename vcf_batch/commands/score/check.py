"""Check the scores of an output: definitions, receipts and files against one another and the shards."""

import functools
from collections.abc import Iterator, Set

import pyarrow as pa

from vcf_batch import storage
from vcf_batch.commands.verify import Finding
from vcf_batch.driver.progress import plural, steps
from vcf_batch.errors import DamageFound
from vcf_batch.output import shards
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Damaged, Receipt
from vcf_batch.output.scores.definition import SCORES_FOLDER, ScoreDefinition
from vcf_batch.output.scores.store import PARQUET, ScoreStore
from vcf_batch.output.shards import side_by_side


def check_scores(output: Output, chosen: Set[int] | None = None) -> Iterator[Finding]:
    """Read every file of scores again and yield what is wrong with it. A shard without a score is a note.

    Args:
        output: the output.
        chosen: indices of the shards whose scores are read; None reads all.

    Raises:
        StorageError: the storage failed.
    """
    store = ScoreStore(output.url)
    try:
        definitions = store.definitions()
    except DamageFound as fault:
        yield Finding(SCORES_FOLDER, str(fault))
        return
    for score in definitions:
        lacking = 0
        whole = (
            found
            for found in output.examine()
            if isinstance(found, Receipt) and (chosen is None or found.shard.index in chosen)
        )
        read = side_by_side(functools.partial(_fault, output, store, score), whole)
        count = len(output.plan) if chosen is None else len(chosen)
        for receipt, cause in steps(read, f"reading {score.name}", count, "shard"):
            if cause is None:
                lacking += 1
            elif cause:
                yield Finding(f"{SCORES_FOLDER}/{score.name}/{receipt.shard.name}", cause)
        if lacking:
            cause = f"{plural(lacking, 'finished shard')} without it, or replaced since; rerun 'vcf-batch score'"
            yield Finding(f"{SCORES_FOLDER}/{score.name}", cause, kind="note")


def _fault(output: Output, store: ScoreStore, score: ScoreDefinition, receipt: Receipt) -> str | None:
    """What is wrong with a shard's scores; empty if nothing is, None if there are none."""
    found = store.found(score, receipt.shard, receipt.parquet_hash)
    if found is None or isinstance(found, Damaged):
        return found and found.reason
    place = f"{SCORES_FOLDER}/{score.name}/{receipt.shard.name}{PARQUET}"
    try:
        with storage.refusals_as_storage_errors():
            hashed = storage.digest(storage.join(output.url, place)).sha256
        if hashed != found.parquet.sha256:
            return f"{place} has the sha256 {hashed}, its receipt says {found.parquet.sha256}"
        table = store.read(score, receipt.shard)
        with shards.open_parquet(shards.file_url(output.url, receipt.shard, "parquet")) as parquet:
            if table["key"].combine_chunks() != parquet.read(["key"], use_threads=False)["key"].combine_chunks():
                return f"{place} has other keys than the shard"
    except DamageFound as fault:
        return str(fault)
    except FileNotFoundError as error:
        return f"a file went away while it was read: {error}"
    except (pa.ArrowException, OSError):
        return ""  # of the shard itself, which its own check reports
    counts = {column.name: table.num_rows - table[column.name].null_count for column in score.columns}
    if found.counts and counts != found.counts:
        return f"{place} has values {counts}, its receipt says {dict(found.counts)}"
    return ""
