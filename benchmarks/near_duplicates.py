"""Measure the search for near-duplicates: ``python benchmarks/near_duplicates.py``.

``random`` are independent hashes. ``clusters`` are groups of ten, each a random hash and nine that differ from it in up
to three bits. ``ball`` has a tenth of all rows around a single hash, from which they differ in up to five bits, and
else random hashes. Each search runs in a process of its own, on one core, with keys of nine digits.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from plan import peak_memory

from vcf_batch.commands.score.duplicates import near_hashes

ROWS_AT_ONCE = 100_000
_BITS = 64


def flipped(hashes: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Hashes with up to ``most`` random bits of each flipped."""
    for number in range(most):
        bits = np.uint64(1) << rng.integers(0, _BITS, len(hashes), dtype=np.uint64)
        hashes = np.where(rng.integers(0, most + 1, len(hashes)) > number, hashes ^ bits, hashes)
    return hashes


def hashes_of(kind: str, rows: int) -> np.ndarray:
    """``[rows]`` uint64 hashes of a kind, see the top of the file, in random order."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**_BITS, rows, dtype=np.uint64)
    if kind == "clusters":
        hashes = flipped(np.resize(hashes[: rows // 10], rows), 3, rng)
    elif kind == "ball":
        hashes[: rows // 10] = flipped(np.full(rows // 10, hashes[0]), 5, rng)
    rng.shuffle(hashes)
    return hashes


def search(kind: str, rows: int, distance: int) -> dict[str, float]:
    """Find the near-duplicates among hashes of a kind: seconds, memory and what was found."""
    hashes = hashes_of(kind, rows)
    before = peak_memory()
    begin, used = time.perf_counter(), time.process_time()

    def batches() -> Iterator[tuple[pa.Array, np.ndarray]]:
        for start in range(0, rows, ROWS_AT_ONCE):
            numbers = pa.array(np.arange(start, min(start + ROWS_AT_ONCE, rows))).cast(pa.string())
            yield pc.utf8_lpad(numbers, 9, "0"), hashes[start : start + ROWS_AT_ONCE]

    found = near_hashes.find(batches(), distance)
    return {
        "seconds": time.perf_counter() - begin,
        "processor": time.process_time() - used,
        "gib": peak_memory() / (1 << 30),
        "gib_before": before / (1 << 30),
        "duplicates": rows - found["duplicate_of"].null_count,
    }


@click.command()
@click.option("--rows", default=10_000_000, show_default=True)
@click.option("--distance", "distances", type=int, multiple=True, default=[4], show_default=True)
@click.option("--kind", "kinds", multiple=True, default=["random", "clusters", "ball"], show_default=True)
@click.option("--only", is_flag=True, hidden=True)
def main(rows: int, distances: tuple[int, ...], kinds: tuple[str, ...], only: bool) -> None:
    """Measure the search for near-duplicates."""
    if only:
        click.echo(json.dumps(search(kinds[0], rows, distances[0])))
        return
    click.echo("| hashes | rows | distance | seconds | of a processor | peak memory, GiB | duplicates |")
    click.echo("|---|---|---|---|---|---|---|")
    for kind in kinds:
        for distance in distances:
            given = ["--rows", str(rows), "--distance", str(distance), "--kind", kind, "--only"]
            result = subprocess.run([sys.executable, __file__, *given], check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(result.stdout)
            click.echo(
                f"| {kind} | {rows:,} | {distance} | {found['seconds']:.0f} | {found['processor']:.0f} | "
                f"{found['gib']:.2f} | {found['duplicates']:,} |"
            )


if __name__ == "__main__":
    main()
