"""Measure what commands take with an output of very many shards: ``python benchmarks/many_shards.py``.

The benchmark writes an output as a run leaves it behind, without a model: shards of few rows, all with the same small
image, in a scratch folder. Then each work is done in a process of its own. ``--shards 1000000`` takes hours and 40 GB
to build; use ``--scratch`` to keep what is built. With ``--linked`` it takes minutes and 4 GB: every shard's files are
links to those of one of the first hundred, and only works that do not compare keys can be measured.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from plan import peak_memory

from vcf_batch.config.row_settings import settings_of
from vcf_batch.output.shards import ShardFiles, ShardWriter
from vcf_batch.records import Sample, Scores, Shard
from vcf_batch.setup.job import Job, schema_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

FAILED_SHARDS = 100
"""In every shard with such a number one row has failed."""
ROWS_AT_ONCE = 1000
LINKED_WORKS = (
    "resume: compare the files with the driver's counts",
    "resume without these: read the receipts",
    "status while a driver is at work",
    "repair --trust-receipts: the same",
)


def build(folder: Path, shards: int, shard_size: int, linked: bool) -> None:
    """Write a manifest of ``shard_size`` rows for each shard, and the output of its run."""
    from support import runs
    from vcf_batch.output import progress_file
    from vcf_batch.output.receipts import RECEIPT_SUFFIX, Receipt

    (folder / "in").mkdir(parents=True)
    rows = shards * shard_size
    prompts = pa.array([f"a photograph of thing {number}" for number in range(1000)])
    with pq.ParquetWriter(
        folder / "in/manifest.parquet", pa.schema({"prompt": pa.string(), "label": pa.int64()})
    ) as to:
        for first in range(0, rows, ROWS_AT_ONCE):
            numbers = pa.array(range(first, min(first + ROWS_AT_ONCE, rows)), pa.int64())
            to.write_table(pa.table({"prompt": prompts.take(pc.subtract(numbers, first)), "label": numbers}))
    output = folder / "out"
    job = runs.begin_output(folder / "in/manifest.parquet", output, shard_size)
    staged = folder / "staged"
    staged.mkdir()
    written: dict[int, ShardFiles] = {}
    told = progress_file.Told(job.fingerprint)
    for shard in job.shards:
        files = written.get(shard.index % FAILED_SHARDS)
        if files is None:
            files = write_shard(job, shard, staged)
            for path in (files.tar, files.parquet):
                os.replace(path, output / os.path.basename(path))
            if linked:
                written[shard.index] = files
        else:
            for path in (files.tar, files.parquet):
                os.link(output / os.path.basename(path), output / (shard.name + os.path.splitext(path)[1]))
        receipt = Receipt(
            shard, job.fingerprint, 1, files.counts, files.entries, {}, {}, files.means, sampled=files.sampled
        )
        size = (output / f"{shard.name}{RECEIPT_SUFFIX}").write_bytes(receipt.to_json())
        told.add(receipt, size)
    progress_file.publish(str(output), told)


def write_shard(job: Job, shard: Shard, folder: Path) -> ShardFiles:
    """Write the files of a shard, whose first row has failed in every hundredth shard."""
    from support import runs

    image = runs.png(0, 32)
    with ShardWriter(str(folder), shard, "png", schema_of(job.config, job.manifest)) as writer:
        for row in job.manifest.iter_rows(shard.start, shard.stop, 0):
            used = settings_of(row, job.config)
            if shard.index % FAILED_SHARDS == 0 and row.number == shard.start:
                writer.add(Sample(row, "failed", used, error_message="no"))
            else:
                writer.add(Sample(row, "success", used, image, 32, 32, Scores(row.number % 97 / 97, None, None)))
        return writer.finish()


def resume(folder: Path) -> str:
    """Find what is finished, as a driver does when it resumes a run."""
    from vcf_batch.output import progress_file
    from vcf_batch.output.output import Output

    output = Output(folder / "out")
    told = progress_file.look(output.url, output.fingerprints, output.plan)
    return f"{len(told.totals.done):,} shards"


def resume_by_receipts(folder: Path) -> str:
    """The same where the file with the driver's counts is missing."""
    from vcf_batch.output.progress_file import PROGRESS_NAME

    there, aside = folder / "out" / PROGRESS_NAME, folder / PROGRESS_NAME
    os.replace(there, aside)
    try:
        return resume(folder)
    finally:
        os.replace(aside, there)


def status_at_work(folder: Path) -> str:
    """Look at the run while this process holds its lease."""
    from vcf_batch.output import lease

    with lease.hold(str(folder / "out")):
        return command("status", "{out}")(folder)


def choose(folder: Path, **given: Any) -> str:
    from vcf_batch.commands.repair import Repair
    from vcf_batch.output.output import Output

    redo = Repair(Output(folder / "out"), "status = 'failed'", **given).rows(lambda line: None)
    return f"{sum(mask.count(True) for mask in redo.values()):,} rows"


def command(*arguments: str) -> Callable[[Path], str]:
    """A command, whose arguments may name ``{out}`` and a new ``{target}``."""

    def call(folder: Path) -> str:
        from click.testing import CliRunner

        from vcf_batch.cli import main as cli

        with tempfile.TemporaryDirectory(dir=folder) as target:
            places = {"out": folder / "out", "target": os.path.join(target, "t")}
            result = CliRunner().invoke(cli, [argument.format(**places) for argument in arguments])
        if result.exit_code:
            raise SystemExit(result.output)
        return ""

    return call


WORKS: dict[str, Callable[[Path], str]] = {
    "resume: compare the files with the driver's counts": resume,
    "resume without these: read the receipts": resume_by_receipts,
    "status": command("status", "{out}"),
    "status while a driver is at work": status_at_work,
    "verify": command("verify", "{out}"),
    "verify --sample 0.01": command("verify", "{out}", "--sample", "0.01"),
    "repair: choose the failed rows": choose,
    "repair --trust-receipts: the same": lambda folder: choose(folder, trust_receipts=True),
    "export": command("export", "{out}", "{target}"),
    "report": command("report", "{out}", "--out", "{target}.html"),
}


@click.command()
@click.option("--shards", type=click.IntRange(1, 5_000_000), default=10_000, show_default=True)
@click.option("--shard-size", default=10, show_default=True, help="Rows in a shard.")
@click.option("--linked", is_flag=True, help="Link the files of most shards to those of a few.")
@click.option("--scratch", type=click.Path(path_type=Path, file_okay=False), help="Folder to use and keep.")
@click.option("--work", "works", type=click.Choice([*WORKS]), multiple=True, help="[default: all]")
@click.option("--only", type=click.Choice([*WORKS]), hidden=True)
def main(
    shards: int, shard_size: int, linked: bool, scratch: Path | None, works: tuple[str, ...], only: str | None
) -> None:
    """Measure commands with an output of many shards."""
    if only is not None:
        assert scratch is not None
        begin, used = time.perf_counter(), time.process_time()
        done = WORKS[only](scratch)
        figures = (time.perf_counter() - begin, time.process_time() - used, peak_memory() / (1 << 30))
        click.echo(json.dumps([done, *figures]))
        return
    with tempfile.TemporaryDirectory(prefix="vcf-batch-shards-") as temporary:
        folder = scratch or Path(temporary)
        begin = time.perf_counter()
        if not (folder / "out").exists():
            build(folder, shards, shard_size, linked)
            click.echo(f"built in {time.perf_counter() - begin:,.0f} s", err=True)
        click.echo("| work | found | seconds | of a processor | peak memory, GiB |\n|---|---|---|---|---|")
        for name in works or (LINKED_WORKS if linked else WORKS):
            call = [sys.executable, __file__, "--only", name, "--scratch", str(folder)]
            found = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout
            done, seconds, processor, gib = json.loads(found.splitlines()[-1])
            click.echo(f"| {name} | {done} | {seconds:.1f} | {processor:.1f} | {gib:.2f} |")


if __name__ == "__main__":
    main()
