"""A search for duplicates in an output: its rows are read, compared, and its values committed shard by shard.

The search goes over all finished shards in one process. Each receipt names the shards that were searched. So values
count as absent once one of these has changed or one more is finished, and a call that was interrupted searches again
and commits what is missing.
"""

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from vcf_batch.commands.score.duplicates.commits import SearchCommits
from vcf_batch.commands.score.duplicates.embedding_reader import EmbeddingReader
from vcf_batch.commands.score.duplicates.hash_reader import HashReader
from vcf_batch.commands.score.duplicates.search import Search
from vcf_batch.commands.score.duplicates.searched_rows import SearchedRows
from vcf_batch.commands.score.scoring import Added, refuse_repeated
from vcf_batch.driver.progress import steps
from vcf_batch.errors import UsageError
from vcf_batch.output import lease, shards
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Damaged
from vcf_batch.output.scores.definition import ScoreDefinition
from vcf_batch.output.scores.receipt import ScoreReceipt, among
from vcf_batch.output.scores.store import ScoreStore
from vcf_batch.output.shards import side_by_side
from vcf_batch.pool.signals import Signals
from vcf_batch.records import Shard


def is_complete(output: Output, search: Search, embedding: ScoreDefinition | None = None) -> bool:
    """Whether every finished shard has its values of a search, so that :func:`add` has nothing to do.

    Raises:
        UsageError, RefusedError, DamageFound, StorageError: see :func:`add`.
    """
    begun = _Begun(output, search, embedding, Added([]))
    return all(begun.receipt(*each) for each in begun.finished)


def add(output: Output, search: Search, embedding: ScoreDefinition | None = None) -> Added:
    """Search the finished shards of an output for duplicates, and commit the files of those that lack the score.

    Memory is about 170 bytes a row, with keys of nine digits, and 200 for each different reference. For embeddings see
    :mod:`vcf_batch.commands.score.duplicates.near_embeddings`.

    Args:
        output: the output. No byte of its own files changes.
        search: how duplicates are searched.
        embedding: the score with the embeddings that are compared; None by ``phash``.

    Raises:
        UsageError: a column has the name of another one, or the manifest, which names the references, is not there.
        RefusedError: a score of this name is there by other settings, or another run owns the output.
        Unfinished: a shard lacks its embeddings.
        DamageFound: a parquet or the definition of a score is damaged.
        StorageError: the storage failed; what is finished is kept.
        Interrupted: Ctrl-C or SIGTERM. Rerunning goes on.
    """
    with Signals() as signals:
        signals.hold()
        with lease.hold(output.url) as held:
            added = Added([])
            begun = _Begun(output, search, embedding, added)
            definition, finished = begun.definition, begun.finished
            counts: Counter[str] = Counter()
            lacking = []
            for each in finished:
                if receipt := begun.receipt(*each):
                    counts.update(receipt.counts)
                else:
                    lacking.append(each)
            committing = SearchCommits(begun.store, definition, held, begun.searched)
            if lacking:
                found = begun.rows()
                read = side_by_side(begun.reader.read, (shard for shard, _ in finished))
                for shard, part in steps(read, "reading", len(finished), "shard"):
                    signals.check()
                    found.add(shard, part)
                found.search()
                begun.store.claim(definition)
                for shard, parquet_hash in lacking:
                    signals.check()
                    counts.update(committing.commit(shard, parquet_hash, found).counts)
                added.scored, added.without, added.reason = len(lacking), found.without, found.reason
            added.scores, added.notes = [definition], [_told(definition, counts)]
    return added


class _Begun:
    """A search, with what is there of it.

    Args:
        output: the output.
        search: how duplicates are searched.
        embedding: see :func:`add`.
        added: takes the numbers of shards.

    Raises:
        UsageError, RefusedError, DamageFound, StorageError: see :func:`add`.
    """

    def __init__(self, output: Output, search: Search, embedding: ScoreDefinition | None, added: Added) -> None:
        self.store, self._output, self._embedding = ScoreStore(output.url), output, embedding
        self.finished = [*_finished(output, added)]
        self._columns = _columns(output, self.finished)
        self.definition = self.store.claim(search.definition(self._columns, embedding), publish=False)
        refuse_repeated(output, self.store, [self.definition])
        self.searched = among((shard.name, parquet_hash) for shard, parquet_hash in self.finished)

    @functools.cached_property
    def reader(self) -> HashReader | EmbeddingReader:
        """The reader of what is compared."""
        if self._embedding:
            return EmbeddingReader(self._output, self.definition, self._embedding, dict(self.finished))
        return HashReader(self._output, self.definition, self._columns)

    def rows(self) -> SearchedRows:
        """No row yet, and what compares them."""
        return SearchedRows(self.reader.comparisons())

    def receipt(self, shard: Shard, parquet_hash: str) -> ScoreReceipt | None:
        """The receipt of a shard's values of this very search; None without."""
        found = self.store.found(self.definition, shard, parquet_hash)
        return found if isinstance(found, ScoreReceipt) and found.among == self.searched else None


def _told(definition: ScoreDefinition, counts: Mapping[str, int]) -> str:
    """What was found, in words."""
    images, references = (counts[column.name] for column in definition.columns)
    if definition.fields["by"] == "clip":
        return (
            f"{images:,} images and {references:,} references are near-duplicates of an earlier one, by a CLIP with a "
            f"cosine of {definition.fields['cosine']:g} or more"
        )
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
