"""The builder of manifests: prompts x references x seeds in, Parquet out."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vcf_batch import storage
from vcf_batch.errors import UsageError
from vcf_batch.manifest.pairing import pairs
from vcf_batch.storage import scratch

_BUILD_ROWS = 65_536
_BUILD_SCHEMA = pa.schema([("prompt", pa.string()), ("reference", pa.string()), ("seed", pa.int64())])


def build(
    prompts: Iterable[str],
    references: Sequence[str],
    out: str,
    *,
    pairing: str = "cross",
    rows: int | None = None,
    seeds: int = 1,
    pairing_seed: int = 0,
) -> int:
    """Write a manifest that pairs prompts with references, streamed.

    Each pair gets the seeds 0 to ``seeds - 1`` in consecutive rows, so that pairs can be compared. Blank prompts, as at
    the end of a text file, are skipped.

    Args:
        prompts: any number; surrounding white space is removed.
        references: URIs, or paths relative to the folder of ``out``; none means text only.
        out: file to write; a path or any fsspec URL.
        pairing: see :func:`vcf_batch.manifest.pairing.pairs`.
        rows: number of rows to write; None writes every pair with every seed.
        seeds: number of seeds for each pair.
        pairing_seed: seed of the pairings ``random`` and ``balanced``.

    Returns:
        The number of rows.

    Raises:
        UsageError: there are no prompts, ``seeds`` is below 1, or ``rows`` is out of range.
        StorageError: the storage failed.
    """
    if seeds < 1:
        raise UsageError(f"seeds is {seeds}; it must be at least 1")
    texts = pa.array(filter(None, map(str.strip, prompts)), pa.string())
    if not len(texts):
        raise UsageError("there are no prompts: every line is blank")
    choices = pa.array(references, pa.string()) if references else pa.nulls(1, pa.string())
    most = len(texts) * len(choices) * seeds
    rows = most if rows is None else rows
    if not 1 <= rows <= most:
        raise UsageError(
            f"rows is {rows}; {len(texts):,} prompts, {len(choices):,} references and {seeds:,} seeds make 1 to "
            f"{most:,} different rows"
        )
    pairs_at = pairs(pairing, len(texts), len(choices), pairing_seed)
    with scratch.temporary(f"a manifest of {rows:,} rows") as folder:
        path = Path(folder) / "manifest.parquet"
        with pq.ParquetWriter(path, _BUILD_SCHEMA, compression="zstd") as writer:
            for start in range(0, rows, _BUILD_ROWS):
                pair, seed = np.divmod(np.arange(start, min(start + _BUILD_ROWS, rows)), seeds)
                prompt, reference = pairs_at(pair)
                columns = [texts.take(pa.array(prompt)), choices.take(pa.array(reference)), pa.array(seed)]
                writer.write_table(pa.Table.from_arrays(columns, schema=_BUILD_SCHEMA))
        storage.upload(str(path), out)
    return rows
