"""Scores added to an output: what is asked for is claimed, and the shards that lack it are scored and committed."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vcf_batch.config.run_config import RunConfig
from vcf_batch.driver.progress import configure_log
from vcf_batch.errors import RefusedError, UsageError
from vcf_batch.output import lease, shards
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Damaged, Receipt
from vcf_batch.output.scores.definition import ScoreDefinition
from vcf_batch.output.scores.receipt import ScoreReceipt
from vcf_batch.output.scores.store import ScoreStore
from vcf_batch.output.shards import side_by_side
from vcf_batch.pool import scoring as pool_scoring
from vcf_batch.pool.signals import Signals
from vcf_batch.records import Shard
from vcf_batch.setup.storage_check import is_seen
from vcf_batch.worker.scoring.job import ScoredShard, ScoreJob, needs
from vcf_batch.worker.scoring.resolved_score import ResolvedScore


@dataclass
class Added:
    """What a call of ``score`` has found and done."""

    scores: Sequence[ScoreDefinition]
    shards: int = 0
    """Number of shards that are finished."""
    scored: int = 0
    """Number of shards that this call has scored; the others had their scores."""
    without: int = 0
    """Number of rows with an image that this call could not score."""
    reason: str | None = None
    """Why the first of them could not."""
    damaged: int = 0
    unfinished: int = 0
    """Number of shards of the run that are damaged, and that are not generated yet."""
    notes: Sequence[str] = ()
    """Lines on what was found."""


def add(output: Output, scores: tuple[ResolvedScore, ...], config: RunConfig) -> Added:
    """Score the finished shards of an output that lack a score, and commit the files.

    Args:
        output: the output. No byte of its own files changes.
        scores: the scores that it is to have.
        config: the settings of workers.

    Raises:
        UsageError: a column has the name of another one, or a function of the user's fails.
        RefusedError: a score is there by other models or settings, or another run owns the output.
        DamageFound: the definition of a score is damaged.
        StorageError, VcfBatchError: the storage failed, or shards failed again and again; what is finished is kept.
        Interrupted: Ctrl-C or SIGTERM. Rerunning goes on.
    """
    store = ScoreStore(output.url)
    configure_log(config.log_format, config.verbosity)
    with Signals() as signals:
        signals.hold()
        with lease.hold(output.url) as held:
            added = Added([store.claim(score.definition, publish=False) for score in scores])
            refuse_repeated(output, store, added.scores)
            if lacking := [*_lacking(output, store, added)]:
                roots = tuple(filter(is_seen, config.reference_root)) if needs(scores, "reference") else ()
                job = ScoreJob(output, config, scores, held.token, roots)
                pool_scoring.score(job, lacking, held, _Committing(output, store, added), signals)
            added.scores = [store.claim(each, publish=False) for each in added.scores]
    return added


class _Committing:
    """The commits of scored shards. Several may be under way, but one looks at the definitions at a time."""

    def __init__(self, output: Output, store: ScoreStore, added: Added) -> None:
        self._output, self._store, self._added = output, store, added
        self._lock = threading.Lock()
        self._claimed: dict[str, ScoreDefinition] = {}

    def __call__(self, scored: Sequence[ScoredShard]) -> None:
        for each in scored:
            with self._lock:
                self._claim(each.definition)
            self._store.commit(each.definition, each.parquet, each.receipt)
        with self._lock:
            self._added.scored += 1
            self._added.without += max((each.receipt.without for each in scored), default=0)
            reasons = (each.receipt.reason for each in scored)
            self._added.reason = self._added.reason or next(filter(None, reasons), None)

    def _claim(self, definition: ScoreDefinition) -> None:
        """Publish the definition of a score before its first shard is committed, or find that it is there."""
        if self._claimed.get(definition.name) != definition:
            try:
                refuse_repeated(self._output, self._store, [definition])
            except UsageError as error:  # Of a function, whose columns nobody knew before. It ends the whole call.
                raise RefusedError(str(error)) from error
            self._claimed[definition.name] = self._store.claim(definition)


def _lacking(output: Output, store: ScoreStore, added: Added) -> Iterator[Shard]:
    """The finished shards that lack a score; others are counted."""

    def lacks(receipt: Receipt) -> bool:
        own = receipt.shard, receipt.parquet_hash
        return not all(isinstance(store.found(score, *own), ScoreReceipt) for score in added.scores)

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


def require_manifest(output: Output) -> None:
    """Refuse an output whose manifest, which names the references, is not there.

    Raises:
        UsageError: it cannot be read any more, or has changed.
    """
    if output.manifest is None:
        raise UsageError(
            f"the manifest of {output.url} is needed to find references, and cannot be read: {output.manifest_error}. "
            "Name its new place with --manifest"
        )


def refuse_repeated(output: Output, store: ScoreStore, scores: Sequence[ScoreDefinition]) -> None:
    """Refuse scores whose columns have the names of the output's columns, or of those of another score.

    Raises:
        UsageError: there is such a column.
        DamageFound, StorageError: the output cannot be read.
    """
    # In SQL, names that differ in the case of letters are one name.
    taken = {name.lower(): f"of {output.url} itself" for name in _columns(output)}
    names = {score.name for score in scores}
    for score in [*(each for each in store.definitions() if each.name not in names), *scores]:
        for column in score.columns:
            if where := taken.get(column.name.lower()):
                kind = score.fields["kind"]
                raise UsageError(
                    f"the score {score.name!r} has a column {column.name!r}, which is also one {where}: give it "
                    f"another name, as in --with {kind}:NAME=..."
                )
            taken[column.name.lower()] = f"of the score {score.name!r}"


def _columns(output: Output) -> list[str]:
    """The columns of the output's parquets."""
    first = next((found for found in output.examine() if isinstance(found, Receipt)), None)
    if first is None:
        raise UsageError(f"{output.url} has no finished shard to score; generate into it first")
    with shards.open_parquet(shards.file_url(output.url, first.shard, "parquet")) as parquet:
        return list(parquet.schema_arrow.names)
