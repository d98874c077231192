"""Scores added to an output: what is asked for is claimed, and the shards that lack it are scored and committed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from vcf_batch.errors import UsageError
from vcf_batch.output import lease, shards
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Damaged, Receipt
from vcf_batch.output.scores.definition import ScoreDefinition
from vcf_batch.output.scores.receipt import ScoreReceipt
from vcf_batch.output.scores.store import ScoreStore
from vcf_batch.output.shards import side_by_side
from vcf_batch.records import Shard
from vcf_batch.worker.scoring.resolved_score import ResolvedScore
from vcf_batch.worker.scoring.worker import ScoredShard

ScoreShards = Callable[[Iterable[Shard]], Iterator[Sequence[ScoredShard]]]
"""Function that scores shards, in any order."""


@dataclass
class Added:
    """What a call of ``score`` has found and done."""

    scores: Sequence[ScoreDefinition]
    shards: int = 0
    """Number of shards that are finished."""
    scored: int = 0
    """Number of shards that this call has scored; the others had their scores."""
    without: int = 0
    """Number of rows with an image that this call could not score, by some score."""
    reason: str | None = None
    """Why the first of them could not."""
    damaged: int = 0
    unfinished: int = 0
    """Number of shards of the run that are damaged, and that are not generated yet."""


def add(output: Output, scores: Sequence[ResolvedScore], work: ScoreShards, show: Callable[[str], object]) -> Added:
    """Score the finished shards of an output that lack a score, and commit the files.

    Args:
        output: the output. No byte of its own files changes.
        scores: the scores that it is to have.
        work: scores shards.
        show: called with a line for each shard that is scored.

    Raises:
        UsageError: a column has the name of another one.
        RefusedError: a score is there by other models or settings, or another run owns the output.
        DamageFound: the definition of a score is damaged.
        StorageError: the storage failed.
    """
    store = ScoreStore(output.url)
    with lease.hold(output.url) as held:
        added = Added([store.claim(score.definition, publish=False) for score in scores])
        _refuse_repeated(output, store, added.scores)
        for scored in work(_lacking(output, store, added)):
            held.confirm()
            for each in scored:
                definition = store.claim(each.definition)
                _refuse_repeated(output, store, [definition])
                store.commit(definition, each.parquet, each.receipt)
                added.without += each.receipt.without
                added.reason = added.reason or each.receipt.reason
            added.scored += 1
            if scored:
                shard = scored[0].receipt.shard
                show(f"shard {shard.name}: {len(shard):,} rows, {', '.join(each.definition.name for each in scored)}")
        added.scores = [store.claim(each, publish=False) for each in added.scores]
    return added


def _lacking(output: Output, store: ScoreStore, added: Added) -> Iterator[Shard]:
    """The finished shards that lack a score; others are counted."""

    def lacks(receipt: Receipt) -> bool:
        return not all(isinstance(store.found(score, receipt), ScoreReceipt) for score in added.scores)

    def whole() -> Iterator[Receipt]:
        for found in output.examine():
            if isinstance(found, Damaged):
                added.damaged += 1
            else:
                added.shards += 1
                yield found

    for receipt, is_lacking in side_by_side(lacks, whole()):
        if is_lacking:
            yield receipt.shard
    added.unfinished = len(output.plan) - added.shards - added.damaged


def _refuse_repeated(output: Output, store: ScoreStore, scores: Sequence[ScoreDefinition]) -> None:
    """Refuse scores whose columns have the names of the output's columns, or of those of another score.

    Raises:
        UsageError: there is such a column.
        DamageFound, StorageError: the output cannot be read.
    """
    taken = dict.fromkeys(_columns(output), f"of {output.url} itself")
    names = {score.name for score in scores}
    for score in [*(each for each in store.definitions() if each.name not in names), *scores]:
        for column in score.columns:
            if where := taken.get(column.name):
                kind = score.fields["kind"]
                raise UsageError(
                    f"the score {score.name!r} has a column {column.name!r}, which is also one {where}: give it "
                    f"another name, as in --with {kind}:NAME=..."
                )
            taken[column.name] = f"of the score {score.name!r}"


def _columns(output: Output) -> list[str]:
    """The columns of the output's parquets."""
    first = next((found for found in output.examine() if isinstance(found, Receipt)), None)
    if first is None:
        raise UsageError(f"{output.url} has no finished shard to score; generate into it first")
    with shards.open_parquet(shards.file_url(output.url, first.shard, "parquet")) as parquet:
        return list(parquet.schema_arrow.names)
