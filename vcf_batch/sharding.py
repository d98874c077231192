"""Division of rows into shards and of a shard into batches, the shards left to do, and the seeds of rows.

Pure integer functions without I/O: the same arguments give the same plan on every machine, so a resumed run and an
undisturbed one do the same work.
"""

import hashlib
from collections.abc import Container, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from vcf_batch.records import Shard

MIN_DIGITS = 5
"""Smallest number of digits in a shard's name."""

MAX_SHARD_ROWS = 1000
SHARD_SECONDS = 600.0
SHARDS_WANTED = 16
"""Approximate number of shards for a small manifest, so that several workers have something to do."""


def shard_name(index: int, num_shards: int) -> str:
    """Name of shard ``index``: as many digits as the run's last index needs, and at least :data:`MIN_DIGITS`.

    Raises:
        ValueError: the run has no shard ``index``.
    """
    if not 0 <= index < num_shards:
        raise ValueError(f"shard index is {index}; it must be 0 to {num_shards - 1}")
    return f"{index:0{max(MIN_DIGITS, len(str(num_shards - 1)))}d}"


@dataclass(frozen=True, slots=True)
class ShardPlan(Sequence[Shard]):
    """The shards of a run: every row in exactly one shard, in manifest order. Only the last shard may be shorter.

    Shards are computed on access, so a plan takes the same memory for any number of rows.

    Args:
        num_rows: rows of the run, 0 or more.
        shard_size: rows in a shard, 1 or more.
        first_row: number of the run's first row in the manifest, 0 or more.

    Raises:
        ValueError: a size is out of range.
    """

    num_rows: int
    shard_size: int
    first_row: int = 0

    def __post_init__(self) -> None:
        if self.num_rows < 0:
            raise ValueError(f"num_rows is {self.num_rows}; it must be at least 0")
        if self.shard_size < 1:
            raise ValueError(f"shard_size is {self.shard_size}; it must be at least 1")
        if self.first_row < 0:
            raise ValueError(f"first_row is {self.first_row}; it must be at least 0")

    def __len__(self) -> int:
        return (self.num_rows + self.shard_size - 1) // self.shard_size

    @overload
    def __getitem__(self, index: int) -> Shard: ...

    @overload
    def __getitem__(self, index: slice) -> list[Shard]: ...

    def __getitem__(self, index: int | slice) -> Shard | list[Shard]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        start = position * self.shard_size
        stop = min(start + self.shard_size, self.num_rows)
        return Shard(position, self.first_row + start, self.first_row + stop, shard_name(position, len(self)))

    def index_of(self, row: int) -> int:
        """Index of the shard with a row, by the row's number in the manifest. The row may be none of the run."""
        return (row - self.first_row) // self.shard_size


def remaining(plan: Sequence[Shard], done: Container[int]) -> Iterator[Shard]:
    """The shards whose index is not in ``done``, in order."""
    return (shard for shard in plan if shard.index not in done)


def derive_seed(run_seed: int, key: str) -> int:
    """Seed of the sample ``key`` in a run with ``run_seed``: 0 to 2**63 - 1.

    It is a hash (BLAKE2b) of the two values alone: shard size, row order and added rows do not change it.
    """
    digest = hashlib.blake2b(f"{run_seed}:{key}".encode(), digest_size=8, person=b"vcf-batch seed").digest()
    return int.from_bytes(digest, "big") >> 1


def draw_seed(seed: int, draw: int) -> int:
    """Seed of one draw of a row, 0 to 2**63 - 1.

    Args:
        seed: the row's own, which draw 0 has; each later draw has one derived from it.
        draw: number of the draw, from 0.
    """
    # "attempt" is what draws were called at first: another word would change the bytes of every output.
    return seed if draw == 0 else derive_seed(seed, f"attempt {draw}")


def batches(group_keys: Sequence[Hashable], batch_size: int) -> list[list[int]]:
    """Cut a shard into batches of rows that can be computed together.

    Args:
        group_keys: one key per row of the shard; only rows with equal keys may share a batch.
        batch_size: largest number of rows in a batch, 1 or more.

    Returns:
        Positions in ``group_keys``, each exactly once: groups in order of first appearance, rows in order in a group.

    Raises:
        ValueError: ``batch_size`` is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    groups: dict[Hashable, list[int]] = {}
    for position, group_key in enumerate(group_keys):
        groups.setdefault(group_key, []).append(position)
    return [
        group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)
    ]


def default_shard_size(num_rows: int, batch_size: int, seconds_per_sample: float) -> int:
    """Shard size if none is given: at most ten minutes of a worker's time, and at most 1,000 rows.

    A shard has whole batches, unless a single batch takes longer. A small manifest gets smaller shards, but of at least
    two batches, so that scoring one batch overlaps with sampling the next. The number of workers has no influence, so
    any two runs of a command agree.
    """
    affordable = int(SHARD_SECONDS / seconds_per_sample)
    rows = min(MAX_SHARD_ROWS, affordable, max(num_rows // SHARDS_WANTED, 2 * batch_size))
    return max(rows if rows < batch_size else rows // batch_size * batch_size, 1)
