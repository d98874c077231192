"""The outputs that an export is made of, read as one sequence of rows.

A row has a *position*: its number among the rows of all outputs, in the order in which they are named. Positions count
rows that are missing, too, so they do not change with what is finished.
"""

import bisect
import contextlib
import functools
import hashlib
import json
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from vcf_batch import storage
from vcf_batch.commands.score.duplicates.search import options_of
from vcf_batch.driver.progress import plural, plural_are
from vcf_batch.errors import DamageFound, RefusedError, Unfinished, UsageError, VcfBatchError, redact
from vcf_batch.output import receipts, shards
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Damaged
from vcf_batch.output.scores.definition import SCORES_FOLDER, ScoreDefinition
from vcf_batch.output.scores.joined import JoinedScores
from vcf_batch.output.scores.store import ScoreStore
from vcf_batch.records import Shard

RUN = "run_fingerprint"
"""Column that names the run of a row."""
REFERENCE_HASH = "reference_sha256"
"""Column with the hash of a row's reference, which a manifest may have; a list where ``reference`` is one."""

MOST_NAMED = 3
"""Shards that are named of those that are left out."""


@dataclass(frozen=True, slots=True)
class Source:
    """One of the outputs."""

    output: Output
    index: int
    start: int
    """Position of its first row."""
    scores: JoinedScores
    """The scores that were added to it."""

    @property
    def stop(self) -> int:
        """Position behind its last row."""
        return self.start + self.output.plan.num_rows

    @property
    def name(self) -> str:
        """Last part of the output's address: the rest is of this machine."""
        return storage.name(self.output.url)


@dataclass(frozen=True, slots=True)
class SourceShard:
    """A committed shard of one of the outputs."""

    source: Source
    shard: Shard
    fingerprint: str
    """That of the run that has made it."""
    hashes: Mapping[str, str]
    """Hex SHA-256 of each file by its receipt, by kind."""

    @property
    def start(self) -> int:
        """Position of its first row."""
        return self.source.start + self.shard.start - self.source.output.plan.first_row

    def __str__(self) -> str:
        return f"shard {self.shard.name} of {self.source.output.url}"


class _Committed(NamedTuple):
    """What is kept of a receipt. There may be millions, so this is small."""

    shard_index: int
    fingerprint: str
    hashes: str
    """Hex SHA-256 of each file in the order of their kinds, with spaces between."""


@dataclass(frozen=True)
class Survey:
    """What the receipts of the outputs say. It takes 300 bytes of memory a shard."""

    committed: tuple[Sequence[_Committed], ...]
    """The committed shards of each output, in order."""

    digests: tuple[str, ...]
    """Hex SHA-256 over the committed shards of each output. A repair changes it, and so do more shards and scores."""
    damaged: tuple[int, ...]
    """Number of damaged shards of each output."""
    unfinished: tuple[int, ...]
    """Number of shards of each output that are not generated yet."""
    left_out: tuple[str, ...]
    """Lines that name what is left out."""
    unscored: tuple[str, ...] = ()
    """Lines that name the scores that finished shards lack, searches for duplicates aside."""
    unsearched: tuple[str, ...] = ()
    """Lines that name these searches, each with the command that searches again."""


class Sources:
    """The outputs, opened.

    Args:
        urls: the outputs, in order.

    Raises:
        UsageError: one is no output, or is named twice, or two have different scores of the same name.
        RefusedError: another version of vcf-batch wrote it.
        DamageFound: its ``run.json`` is missing or damaged.
        StorageError: the storage failed.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        found: list[Source] = []
        for index, output in enumerate(map(Output, urls)):
            if output.url in (each.output.url for each in found):
                raise UsageError(f"{output.url} is named twice; name each output once")
            found.append(Source(output, index, found[-1].stop if found else 0, JoinedScores(output.url)))
        self.all = tuple(found)
        self.scores = _scores(self.all)
        """The scores that were added to any of the outputs, by their names."""

    @property
    def rows(self) -> int:
        """Number of rows of all outputs, finished or not."""
        return self.all[-1].stop

    def count(self, start: int = 0) -> int:
        """Number of the shards that :meth:`shards` gives."""
        return sum(len(committed) for _, committed in self._from(start))

    def _from(self, start: int) -> Iterator[tuple[Source, Sequence[_Committed]]]:
        """The committed shards of each output, from the one with the row at position ``start`` on."""
        for source, committed in zip(self.all, self.survey.committed, strict=True):
            plan = source.output.plan
            row = start - source.start + plan.first_row
            # They are in the order of their rows, so those before are found without opening each.
            yield source, committed[bisect.bisect_right(committed, row, key=lambda each: plan[each.shard_index].stop) :]

    @functools.cached_property
    def survey(self) -> Survey:
        """What the receipts say. They are read when this is first asked for.

        Raises:
            StorageError: the storage failed.
        """
        return self._read()

    def have_changed(self) -> bool:
        """Whether the receipts say something else now than in :attr:`survey`. They are read again.

        Raises:
            StorageError: the storage failed.
        """
        return self._read().digests != self.survey.digests

    def _read(self) -> Survey:
        committed: list[Sequence[_Committed]] = []
        digests: list[str] = []
        damaged: list[int] = []
        unfinished: list[int] = []
        lines: list[str] = []
        unscored: list[str] = []
        unsearched: list[str] = []
        for source in self.all:
            digest = hashlib.sha256()
            lacking: Counter[str] = Counter()
            broken = left = 0
            missing: list[str] = []
            kept: list[_Committed] = []
            for shard, found in source.output.each_shard():
                if found is None:
                    left += 1
                    missing += [shard.name][: MOST_NAMED - len(missing)]
                elif isinstance(found, Damaged):
                    broken += 1
                    lines += [f"{found.name} of {source.output.url} is damaged: {found.reason}"][: broken <= MOST_NAMED]
                else:
                    hashes = [entry.sha256 for _, entry in sorted(found.files.items())]
                    digest.update(f"{shard.name} {found.fingerprint} {''.join(hashes)}\n".encode())
                    if source.scores.definitions:
                        digest.update("\n".join(source.scores.entries(found)).encode())
                        lacking.update(source.scores.lacking(found))
                    # Interned, as all shards of an output have one of few fingerprints.
                    kept.append(_Committed(shard.index, sys.intern(found.fingerprint), " ".join(hashes)))
            committed.append(kept)
            digests.append(digest.hexdigest())
            told = {
                name: f"{plural(count, 'finished shard')} of {source.output.url} without the score {name!r}"
                for name, count in sorted(lacking.items())
            }
            searches = {each.name: each for each in source.scores.definitions if each.is_search}
            unscored += [line for name, line in told.items() if name not in searches]
            command = f"vcf-batch score {redact(source.output.url)}"
            unsearched += [
                f"{line}: {command} {options_of(searches[name])}" for name, line in told.items() if name in searches
            ]
            damaged.append(broken)
            unfinished.append(left)
            if left:
                named = ", ".join(missing) + (", ..." if left > MOST_NAMED else "")
                lines.append(f"{plural(left, 'shard')} of {source.output.url} not generated yet: {named}")
        words = tuple(lines), tuple(unscored), tuple(unsearched)
        return Survey(tuple(committed), tuple(digests), tuple(damaged), tuple(unfinished), *words)

    def shards(self, start: int = 0) -> Iterator[SourceShard]:
        """The committed shards in order, from the one with the row at position ``start`` on.

        Raises:
            StorageError: the storage failed.
        """
        for source, committed in self._from(start):
            yield from map(functools.partial(_opened, source), committed)

    def schema(self) -> pa.Schema:
        """The columns of all outputs, and :data:`RUN` behind the key. A column that an output lacks is null there.

        Columns of scores are behind those of the rows.

        Raises:
            UsageError: outputs have a column of the same name with different types, or one that an export adds.
            DamageFound: a parquet cannot be read.
            StorageError: the storage failed.
        """
        merged: pa.Schema | None = None
        for source, committed in zip(self.all, self.survey.committed, strict=True):
            if not committed:
                continue
            shard = _opened(source, committed[0])
            with reading(shard), shards.open_parquet(_parquet(shard)) as parquet:
                own = source.scores.schema(parquet.schema_arrow.remove_metadata())
            if RUN in own.names:
                raise UsageError(
                    f"{source.output.url} has a column {RUN!r}, which an export adds: rename it for a new run"
                )
            for field in own:
                there = field if merged is None or field.name not in merged.names else merged.field(field.name)
                if there.type != field.type and pa.null() not in (there.type, field.type):
                    raise UsageError(
                        f"column {field.name!r} is {field.type} in {source.output.url} and {there.type} in the outputs "
                        "before it; export them apart"
                    )
            merged = own if merged is None else pa.unify_schemas([merged, own])
        if merged is None:
            raise UsageError(f"none of {', '.join(each.output.url for each in self.all)} has a finished shard")
        return merged.insert(merged.get_field_index("key") + 1, pa.field(RUN, pa.string()))

    def batches(
        self, shard: SourceShard, schema: pa.Schema, columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """The rows of a shard, :data:`vcf_batch.output.shards.ROWS_AT_ONCE` at once. Columns come from here alone.

        Args:
            shard: one of :meth:`shards`.
            schema: see :meth:`schema`.
            columns: those that are read; None reads all.

        Raises:
            DamageFound: the parquet cannot be read, or has other columns.
            StorageError: the storage failed.
        """
        wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
        with reading(shard), shards.open_parquet(_parquet(shard)) as parquet:
            there = set(parquet.schema_arrow.names)
            if unknown := sorted(there - {*schema.names}):
                raise DamageFound(
                    f"{shard} has a column {unknown[0]!r} that others do not have; see 'vcf-batch verify'"
                )
            read = [name for name in wanted.names if name in there]
            batches = parquet.iter_batches(shards.ROWS_AT_ONCE, columns=read, use_threads=False)
            if any(field.name in wanted.names for field in shard.source.scores.fields):
                batches = shard.source.scores.batches(batches, shard.shard, shard.hashes["parquet"])
            for batch in batches:
                yield pa.RecordBatch.from_arrays(
                    [_column(batch, field, shard.fingerprint) for field in wanted], schema=wanted
                )

    def check_hash(self, shard: SourceShard, kind: str) -> None:
        """Compare a file of a shard with its receipt.

        Raises:
            DamageFound: it has another hash, or is missing.
            RefusedError: its receipt is another one by now.
            StorageError: the storage failed.
        """
        name, said = shards.file_name(shard.shard, kind), shard.hashes[kind]
        with reading(shard), storage.refusals_as_storage_errors():
            found = storage.digest(shards.file_url(shard.source.output.url, shard.shard, kind)).sha256
        if found != said:
            url = shard.source.output.url
            now = receipts.read_one(url, shard.shard)
            if now is None or now.files.get(kind) is None or now.files[kind].sha256 != said:
                raise RefusedError(f"{shard} has changed while it was exported, by a repair; rerun this command")
            raise DamageFound(
                f"{name} of {url} has the sha256 {found}, its receipt says {said}; mend it with 'vcf-batch repair "
                f"{url}'"
            )


def _scores(sources: Sequence[Source]) -> Mapping[str, ScoreDefinition]:
    found: dict[str, tuple[str, ScoreDefinition]] = {}
    for source in sources:
        for score in source.scores.definitions:
            url, first = found.setdefault(score.name, (source.output.url, score))
            if first.fingerprint == score.fingerprint or not ScoreStore(source.output.url).count(score.name):
                continue
            if not ScoreStore(url).count(score.name):  # no shard has it
                found[score.name] = source.output.url, score
                continue
            names = sorted(first.fields.keys() | score.fields.keys())
            name = next(name for name in names if first.fields.get(name) != score.fields.get(name))
            raise UsageError(
                f"the score {score.name!r} of {source.output.url} is another than that of {url}: {name} is "
                f"{json.dumps(score.fields.get(name))}, and {json.dumps(first.fields.get(name))} there; delete "
                f"{SCORES_FOLDER}/{score.name} and {SCORES_FOLDER}/{score.name}.json of one of them and score it under "
                "another name, or export them apart"
            )
    return {name: score for name, (_, score) in found.items()}


def refuse_gaps(survey: Survey, sources: Sources) -> None:
    """Refuse outputs with shards that would be left out.

    Raises:
        DamageFound: shards are damaged.
        Unfinished: shards are not generated yet.
    """
    lines = "\n".join(survey.left_out)
    if any(survey.damaged):
        first = next(each for each, count in zip(sources.all, survey.damaged, strict=True) if count)
        raise DamageFound(
            f"{plural_are(sum(survey.damaged), 'shard')} damaged, and nothing is exported:\n{lines}\n"
            f"Mend them with 'vcf-batch repair {first.output.url}', or leave them out with --partial."
        )
    if any(survey.unfinished):
        raise Unfinished(
            f"{plural_are(sum(survey.unfinished), 'shard')} not generated yet, and nothing is exported:\n{lines}\n"
            "Rerun the command of the run, or leave them out with --partial."
        )
    if survey.unscored:
        told = "\n".join(survey.unscored)
        raise Unfinished(
            f"shards lack scores that others have, and nothing is exported:\n{told}\n"
            "Rerun 'vcf-batch score', or give --partial, which leaves these values null."
        )


def refuse_old_searches(survey: Survey) -> None:
    """Refuse outputs whose duplicates were searched before shards came or changed, so that ``duplicate_of`` is null.

    Raises:
        Unfinished: there is such an output.
    """
    if survey.unsearched:
        told = "\n".join(survey.unsearched)
        raise Unfinished(
            "duplicates were searched before shards were finished or changed, and nothing is exported. Search again:\n"
            f"{told}"
        )


def _opened(source: Source, kept: _Committed) -> SourceShard:
    # A shard without a sample has no tar.
    hashes = dict(zip(sorted(receipts.FILE_SUFFIXES), kept.hashes.split(), strict=False))
    return SourceShard(source, source.output.plan[kept.shard_index], kept.fingerprint, hashes)


def _column(batch: pa.RecordBatch, field: pa.Field, fingerprint: str) -> pa.Array:
    if field.name == RUN:
        return pa.array([fingerprint] * batch.num_rows, field.type)
    if field.name not in batch.schema.names:
        return pa.nulls(batch.num_rows, field.type)
    column = batch.column(field.name)
    return column if column.type == field.type else column.cast(field.type)


def _parquet(shard: SourceShard) -> str:
    return shards.file_url(shard.source.output.url, shard.shard, "parquet")


@contextlib.contextmanager
def reading(shard: SourceShard) -> Iterator[None]:
    """Tell of damage in the block by the name of the shard that is read.

    Raises:
        DamageFound: a file is missing, or is not what a run writes.
    """
    try:
        yield
    except VcfBatchError:
        raise
    # A damaged file may hold anything.
    except (pa.ArrowException, tarfile.TarError, OSError, ValueError, LookupError, OverflowError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamageFound(f"{shard} cannot be read: {told}; see 'vcf-batch verify'") from error
