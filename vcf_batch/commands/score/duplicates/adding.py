"""A search for duplicates in an output: its rows are read, compared, and its values committed shard by shard.

The search goes over all finished shards in one process. Each receipt names the shards that were searched. So values
count as absent once one of these has changed or one more is finished, and a call that was interrupted searches again
and commits what is missing.
"""

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from vcf_batch.commands.score.duplicates.commits import SearchCommits
from vcf_batch.commands.score.duplicates.reading import HashReader
from vcf_batch.commands.score.duplicates.search import Search
from vcf_batch.commands.score.duplicates.searched_rows import SearchedRows
from vcf_batch.commands.score.scoring import Added, refuse_repeated
from vcf_batch.errors import UsageError
from vcf_batch.output import lease, shards
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Damaged
from vcf_batch.output.scores.definition import ScoreDefinition
from vcf_batch.output.scores.receipt import among
from vcf_batch.output.scores.store import ScoreStore
from vcf_batch.output.shards import side_by_side
from vcf_batch.pool.signals import Signals
from vcf_batch.records import Shard


def add(output: Output, search: Search) -> Added:
    """Search the finished shards of an output for duplicates, and commit the files of those that lack the score.

    Memory is about 170 bytes a row, with keys of nine digits, and 200 for each different reference.

    Args:
        output: the output. No byte of its own files changes.
        search: how duplicates are searched.

    Raises:
        UsageError: a column has the name of another one, or the manifest, which names the references, is not there.
        RefusedError: a score of this name is there by other settings, or another run owns the output.
        DamageFound: a parquet or the definition of a score is damaged.
        StorageError: the storage failed; what is finished is kept.
        Interrupted: Ctrl-C or SIGTERM. Rerunning goes on.
    """
    with Signals() as signals:
        signals.hold()
        with lease.hold(output.url) as held:
            store, added = ScoreStore(output.url), Added([])
            finished = [*_finished(output, added)]
            columns = _columns(output, finished)
            definition = store.claim(search.definition(columns), publish=False)
            refuse_repeated(output, store, [definition])
            added.scores = [definition]
            searched = among((shard.name, parquet_hash) for shard, parquet_hash in finished)
            committing = SearchCommits(store, definition, held, searched)
            if lacking := [each for each in finished if not committing.has(*each)]:
                reader = HashReader(output, definition, columns)
                found = SearchedRows(reader.comparisons())
                for shard, part in side_by_side(reader.read, (shard for shard, _ in finished)):
                    signals.check()
                    found.add(shard, part)
                found.search()
                store.claim(definition)
                for shard, parquet_hash in lacking:
                    signals.check()
                    committing.commit(shard, parquet_hash, found)
                added.scored, added.without, added.reason = len(lacking), found.without, found.reason
            added.notes = [_told(definition, committing.counts)]
    return added


def _told(definition: ScoreDefinition, counts: Mapping[str, int]) -> str:
    """What was found, in words."""
    images, references = (counts[column.name] for column in definition.columns)
    near = f"by phash within {definition.fields['distance']} bits"
    same = near if definition.fields["references"] == "phash" else "by SHA-256, so exactly"
    return (
        f"{images:,} images are near-duplicates of an earlier one, {near}; {references:,} rows have the reference of "
        f"an earlier one, {same}"
    )


def _finished(output: Output, added: Added) -> Iterator[tuple[Shard, str]]:
    """The finished shards, each with the hash of its parquet; the others are counted."""
    for found in output.examine():
        if isinstance(found, Damaged):
            added.damaged += 1
        else:
            added.shards += 1
            yield found.shard, found.parquet_hash
    added.unfinished = len(output.plan) - added.shards - added.damaged


def _columns(output: Output, finished: Sequence[tuple[Shard, str]]) -> dict[str, pa.DataType]:
    """The columns of the output's parquets, with their types."""
    if not finished:
        raise UsageError(f"{output.url} has no finished shard to score; generate into it first")
    with shards.open_parquet(shards.file_url(output.url, finished[0][0], "parquet")) as parquet:
        return {field.name: field.type for field in parquet.schema_arrow}
