"""Measure the start of a run before any model loads: ``python benchmarks/plan.py``.

The benchmark writes a manifest of 100 million rows in 100 files, and the receipts of 100,000 shards, into a scratch
folder. Then it measures three works, each in a process of its own: opening and planning the manifest, checking all its
prompts and ids, and finding the finished shards of a resumed run.
"""

import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vcf_batch import sharding
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.output import receipts
from vcf_batch.output.receipts import SCORE_STEP, Receipt
from vcf_batch.output.sums import RunSums
from vcf_batch.records import SCORES, FileEntry, Shard

FILES = 100
SHARD_SIZE = 1000
CONTENT = b"."
"""Content of every tar and parquet. One byte is enough, because a resume looks at their sizes only."""
BINS = 10
"""Number of bins with samples in each score's histogram."""


def write_manifest(folder: Path, rows: int) -> None:
    """Write a manifest with unique ids. Each prompt and each reference occurs many times, as in a cross product."""
    folder.mkdir(exist_ok=True)
    prompts = pa.array([f"a photograph of the {number}th thing that came to mind, in oil" for number in range(10_000)])
    references = pa.array([f"references/{number:05d}.jpg" for number in range(1000)])
    bounds = np.linspace(0, rows, FILES + 1, dtype=np.int64)
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        index = np.arange(start, stop)
        table = pa.table(
            {
                "sample_id": pc.utf8_lpad(pa.array(index).cast(pa.string()), 12, "0"),
                "prompt": prompts.take(pa.array(index // len(references) % len(prompts))),
                "reference": references.take(pa.array(index % len(references))),
            }
        )
        pq.write_table(table, folder / f"part-{number:03d}.parquet", compression="zstd", row_group_size=100_000)


def receipt_of(shard: Shard) -> Receipt:
    """A receipt of a finished shard, as long as the receipts of a run with all scores."""
    phases = ("read_manifest", "read_references", "wait_for_references", "sample", "score", "encode", "write", "stage")
    bins = {f"{number * SCORE_STEP:.2f}": len(shard) // BINS for number in range(BINS)}
    return Receipt(
        shard=shard,
        fingerprint="0" * 64,
        attempt=1,
        counts={"success": len(shard), "rejected": 0, "failed": 0},
        files=dict.fromkeys(receipts.FILE_SUFFIXES, FileEntry(len(CONTENT), hashlib.sha256(CONTENT).hexdigest())),
        device={
            "type": "NVIDIA H100 80GB HBM3",
            "dtype": "bfloat16",
            "versions": dict.fromkeys(("Pillow", "diffusers", "torch", "transformers", "vcf_batch"), "1.2.3"),
        },
        timings={
            **dict.fromkeys(phases, 123.456),
            "generated": len(shard),
            "model_loads": 1,
            "started": "2026-01-01T00:00:00+00:00",
            "ended": "2026-01-01T00:10:00+00:00",
            "total": 600.0,
            "worker": f"node:{shard.index % 1000}",
        },
        means=dict.fromkeys(SCORES, 0.25),
        histograms=dict.fromkeys(SCORES, bins),
    )


def write_receipts(folder: Path, count: int) -> None:
    """Write the files of a finished run of ``count`` shards."""
    folder.mkdir(exist_ok=True)
    for shard in sharding.ShardPlan(count * SHARD_SIZE, SHARD_SIZE):
        for suffix in receipts.FILE_SUFFIXES.values():
            (folder / f"{shard.name}{suffix}").write_bytes(CONTENT)
        (folder / f"{shard.name}{receipts.RECEIPT_SUFFIX}").write_bytes(receipt_of(shard).to_json())


def open_and_plan(folder: Path) -> str:
    """Read the footers, cut the rows into shards and walk through all of them."""
    manifest = Manifest.open(str(folder / "manifest"))
    shard_plan = sharding.ShardPlan(manifest.num_rows, SHARD_SIZE)
    return f"{manifest.num_rows:,} rows, {sum(1 for _ in sharding.remaining(shard_plan, set())):,} shards"


def check_ids(folder: Path) -> str:
    """Stream and check every prompt and every id, for empty, unsafe and repeated ones."""
    manifest = Manifest.open(str(folder / "manifest"))
    manifest.check()
    return f"{manifest.num_rows:,} rows"


def find_receipts(folder: Path) -> str:
    """List the output, read its receipts and add them up, as a driver does when it resumes a run."""
    totals = RunSums()
    for receipt in receipts.read(str(folder / "output")):
        totals.add(receipt)
    return f"{len(totals.done):,} receipts"


MEASURES: dict[str, Callable[[Path], str]] = {
    "open and plan": open_and_plan,
    "check prompts and ids": check_ids,
    "find finished shards": find_receipts,
}


def peak_memory() -> int:
    """Peak memory of this process in bytes. (getrusage may report the peak of its parent process instead.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def measure(name: str, folder: Path) -> tuple[str, float, float]:
    """Run one measure in a new process: its result, its seconds, and its peak memory in GiB."""
    command = [sys.executable, __file__, "--only", name, "--scratch", str(folder)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found["done"], found["seconds"], found["gib"]


@click.command()
@click.option("--rows", default=100_000_000, show_default=True, help="Rows of the manifest.")
@click.option("--receipts", default=100_000, show_default=True, help="Finished shards.")
@click.option("--scratch", type=click.Path(path_type=Path, file_okay=False), help="Folder to use and keep.")
@click.option("--only", type=click.Choice([*MEASURES]), hidden=True)
def main(rows: int, receipts: int, scratch: Path | None, only: str | None) -> None:
    """Measure the start of a run over a very large manifest."""
    if only is not None:
        assert scratch is not None
        begin = time.perf_counter()
        done = MEASURES[only](scratch)
        seconds = time.perf_counter() - begin
        click.echo(json.dumps({"done": done, "seconds": seconds, "gib": peak_memory() / (1 << 30)}))
        return
    with tempfile.TemporaryDirectory(prefix="vcf-batch-plan-") as temporary:
        folder = scratch or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder / "manifest", rows)
        write_receipts(folder / "output", receipts)
        click.echo("| measure | what | seconds | peak memory, GiB |\n|---|---|---|---|")
        for name in MEASURES:
            done, seconds, gib = measure(name, folder)
            click.echo(f"| {name} | {done} | {seconds:.1f} | {gib:.2f} |")


if __name__ == "__main__":
    main()
