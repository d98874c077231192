"""The builder of manifests: prompts x references in, Parquet out."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vcf_batch import storage
from vcf_batch.errors import UsageError
from vcf_batch.manifest.pairing import pairs
from vcf_batch.storage import scratch

_BUILD_ROWS = 65_536
_BUILD_BYTES = 64 << 20
"""Most bytes of prompts in a row group, from the longest prompt."""
_COLUMNS = pa.schema([("prompt", pa.string()), ("reference", pa.string())])
_SEED = pa.field("seed", pa.int64())


@dataclass(frozen=True, slots=True)
class Built:
    """A manifest that was written, in numbers."""

    rows: int
    prompts: int
    """Prompts that were paired; with ``keep_duplicates``, duplicates among them."""
    duplicates: int
    """Prompts that are equal to an earlier one."""
    blank: int
    """Lines or values without a prompt, which are left out."""
    seeds: int | None
    """Number of seeds that are written for each pair; None if the manifest has no column of seeds."""


def build(
    prompts: Iterable[str],
    references: Sequence[str],
    out: str,
    *,
    pairing: str = "cross",
    rows: int | None = None,
    seeds: int | None = None,
    pairing_seed: int = 0,
    keep_duplicates: bool = False,
) -> Built:
    """Write a manifest that pairs prompts with references, streamed.

    A pair has one row, or ``seeds`` consecutive ones. In the pairing ``cross``, ``seeds`` writes the seeds 0 to
    ``seeds - 1`` into them, so that all pairs start from the same noises. In every other case there is no column of
    seeds, and each row's seed derives from its key and the seed of the run.

    Args:
        prompts: any number; surrounding white space is removed, and blank ones are left out.
        references: URIs, or paths relative to the folder of ``out``; none means text only.
        out: file to write; a path or any fsspec URL. One that is there is replaced.
        pairing: see :func:`vcf_batch.manifest.pairing.pairs`.
        rows: number of rows to write; None writes every pair.
        seeds: number of images of each pair; None is one.
        pairing_seed: seed of the pairings ``random`` and ``balanced``.
        keep_duplicates: whether a prompt that is equal to an earlier one is paired too.

    Raises:
        UsageError: there are no prompts, ``seeds`` is below 1, or ``rows`` is out of range.
        StorageError: the storage failed.
    """
    images = 1 if seeds is None else seeds
    if images < 1:
        raise UsageError(f"seeds is {images}; it must be at least 1")
    has_seeds = seeds is not None and pairing == "cross"
    texts, blank = _texts(prompts)
    if not len(texts):
        raise UsageError("there are no prompts: every line is blank")
    different = texts.unique()
    duplicates = len(texts) - len(different)
    if not keep_duplicates:
        texts = different
    choices = pa.array(references, pa.string()) if references else pa.nulls(1, pa.string())
    most = len(texts) * len(choices) * images
    rows = most if rows is None else rows
    if not 1 <= rows <= most:
        left_out = f" ({duplicates:,} duplicates left out)" if duplicates and not keep_duplicates else ""
        per_pair = f" with {images:,} seeds each" if images > 1 else ""
        raise UsageError(
            f"rows is {rows:,}; {len(texts):,} prompts{left_out} and {len(choices):,} references{per_pair} make "
            f"{most:,} different rows: give a number from 1 to {most:,}, or leave it out for all of them"
        )
    pairs_at = pairs(pairing, len(texts), len(choices), pairing_seed)
    schema = _COLUMNS.append(_SEED) if has_seeds else _COLUMNS
    step = max(min(_BUILD_ROWS, _BUILD_BYTES // pc.max(pc.binary_length(texts)).as_py()), 1)
    with scratch.temporary(f"a manifest of {rows:,} rows") as folder:
        path = Path(folder) / "manifest.parquet"
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for start in range(0, rows, step):
                pair, seed = np.divmod(np.arange(start, min(start + step, rows)), images)
                prompt, reference = pairs_at(pair)
                columns = [texts.take(pa.array(prompt)).cast(pa.string()), choices.take(pa.array(reference))]
                columns += [pa.array(seed)] if has_seeds else []
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        storage.upload(str(path), out)
    return Built(rows, len(texts), duplicates, blank, seeds if has_seeds else None)


def _texts(prompts: Iterable[str]) -> tuple[pa.LargeStringArray, int]:
    """The prompts without surrounding white space, and the number of blank ones, which are left out."""
    blank, chunks = 0, [pa.array([], pa.large_string())]
    remaining: Iterator[str] = map(str.strip, prompts)
    while some := list(islice(remaining, _BUILD_ROWS)):
        chunks.append(pa.array(filter(None, some), pa.large_string()))
        blank += len(some) - len(chunks[-1])
    return pa.concat_arrays(chunks), blank
