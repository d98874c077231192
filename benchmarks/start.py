"""Measure what commands take to start, beside another version: ``python benchmarks/start.py --other CHECKOUT``.

Each command is a process of its own; the two versions take turns. The manifest has one batch of rows without references
on the model ``tiny``, and Ray is a new local one with one worker. The first sample counts from when the receipt of its
shard is there: it is sampled in ten steps, scored and committed.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 8
HERE = Path(__file__).parents[1]
WORKS = ("--help", "plan", "first sample", "whole run", "nothing left to do", "refused")


def start(tree: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start the command of a checkout."""
    return subprocess.Popen(
        [sys.executable, "-m", "vcf_batch", *arguments],
        cwd="/",  # in a checkout, Ray's workers would import that one's package
        env=os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def seconds(tree: Path, *arguments: str, code: int = 0) -> float:
    """Seconds that a command takes, which has to end with an exit code."""
    begin = time.perf_counter()
    process = start(tree, *arguments)
    _, told = process.communicate()
    assert process.returncode == code, told.decode()
    return time.perf_counter() - begin


def measure(tree: Path, manifest: str, output: Path) -> Mapping[str, float]:
    """Seconds of each work, by a checkout; the output is new."""
    settings = (manifest, str(output), "--batch-size", str(ROWS), "--steps", "10")
    run = ("generate", *settings, "--num-workers", "1", "--address", "local")
    found = {"--help": seconds(tree, "--help"), "plan": seconds(tree, "plan", *settings)}
    begin, process = time.perf_counter(), start(tree, *run)
    while not (output / "00000_stats.json").exists():
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.01)
    found["first sample"] = time.perf_counter() - begin
    _, told = process.communicate()
    assert process.returncode == 0, told.decode()
    found["whole run"] = time.perf_counter() - begin
    found["nothing left to do"] = seconds(tree, *run)
    return found | {"refused": seconds(tree, *run, "--seed", "1", code=4)}


@click.command()
@click.option(
    "--other", required=True, type=click.Path(exists=True, path_type=Path), help="Checkout of another version."
)
@click.option("--rounds", default=3, show_default=True)
def main(other: Path, rounds: int) -> None:
    """Print the median seconds of both versions, and their ratios."""
    trees = {"other": other.resolve(strict=True), "this": HERE}
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory(prefix="vcf-batch-start-") as folder:
        manifest = str(Path(folder) / "manifest.parquet")
        pq.write_table(pa.table({"prompt": [f"a red circle {number}" for number in range(ROWS)]}), manifest)
        for number in range(rounds + 1):
            for name, tree in trees.items():
                taken = measure(tree, manifest, Path(folder) / f"{name}-{number}")
                click.echo(f"{name}: " + ", ".join(f"{work} {taken[work]:.2f}" for work in WORKS), err=True)
                if number:  # The first round warms up.
                    found[name].append(taken)
    click.echo("| work | other, s | this, s | this / other |\n|---|---|---|---|")
    for work in WORKS:
        there, here = (statistics.median(taken[work] for taken in found[name]) for name in ("other", "this"))
        click.echo(f"| {work} | {there:.2f} | {here:.2f} | {here / there:.2f} |")


if __name__ == "__main__":
    main()
