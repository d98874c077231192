"""Measure whole commands beside other ways to make the same images: ``python benchmarks/peers.py``.

The same rows of prompts and seeds are sampled by ``vcf-batch generate`` and by the programs of
``benchmarks/peer_programs.py``, with the same weights, batches, steps, dtype and threads. Each contender is a command
of its own, measured from the start of its process to its end. They take turns. The pixels and scores of each row are
compared with those of the plain loop.

All processes of a contender are looked at every tenth of a second. What a process uses after the last look is not
counted. Memory that several processes map is counted once (PSS).
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from peer_programs import BATCH, FIRST, STEPS
from PIL import Image

COLORS = ("red", "blue", "green", "yellow", "orange", "white", "black", "pink")
SHAPES = ("circle", "star", "ring", "cross", "heart", "arrow", "square", "diamond")
LOOP, SAMPLING = "plain loop", "stock diffusers, samples alone"
LOOK_SECONDS, MEMORY_SECONDS = 0.1, 2.0
"""Time between two looks at the processor time of a contender's processes, and at their memory."""
BLOCK_ROWS = 4 * BATCH
"""Rows of a block where Ray Data's are repartitioned by hand."""

Command = Callable[[str, str], Sequence[str]]
"""The command line that samples a manifest into the folder of an output."""
Rows = Mapping[str, tuple[bytes, float]]
"""Pixels and score of each row, by key."""


@dataclass(frozen=True)
class Cost:
    """What one run of a contender took."""

    seconds: float
    """Wall clock from the start of the process to its end."""
    processor: float
    """Seconds of processor time of all its processes."""
    first: float
    """Seconds from the start until the first batch was sampled and, where scores are made, scored."""
    memory: float
    """Peak of the memory of all its processes, in MiB."""
    others: float
    """Processors that other work took on average. Unless it is near 0, ``processor`` alone means something."""


def program(name: str, *options: str) -> Command:
    """A command of ``benchmarks/peer_programs.py``."""
    path = str(Path(__file__).with_name("peer_programs.py"))
    return lambda manifest, output: (sys.executable, path, name, *options, manifest, output)


def ours(workers: int) -> Command:
    """The user's command with a number of workers."""
    options = ("--num-workers", str(workers), "--steps", str(STEPS), "--batch-size", str(BATCH), "--address", "local")
    return lambda manifest, output: (sys.executable, "-m", "vcf_batch", "generate", manifest, output, *options)


def contenders(rows: int) -> dict[str, Command]:
    """The commands that are compared, by name."""
    blocks = max(4, rows // BLOCK_ROWS)
    return {
        SAMPLING: program("sampling"),
        LOOP: program("loop"),
        "vcf-batch, 1 worker": ours(1),
        "vcf-batch, 2 workers": ours(2),
        "Ray Data, 2 actors, as documented": program("ray-data"),
        "Ray Data, 2 actors, repartitioned by hand": program("ray-data", "--blocks", str(blocks)),
    }


def write_manifest(path: Path, rows: int) -> None:
    """Write a manifest of rows without references, each with a prompt and a seed of its own."""
    prompts = [f"a {COLORS[row % 8]} {SHAPES[row // 8 % 8]}" for row in range(rows)]
    ids = [f"{row:06d}" for row in range(rows)]
    pq.write_table(pa.table({"sample_id": ids, "prompt": prompts, "seed": range(rows)}), path)


def is_begun(output: Path, scratch: Path) -> bool:
    """Whether the first batch is finished: a program says so, and a worker of vcf-batch has written to its tar."""
    return (output / FIRST).exists() or any(tar.stat().st_size for tar in scratch.glob("vcf-batch-scratch-*/**/*.tar"))


def busy_seconds() -> float:
    """Processor time that all processes of the machine have used since it started."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def run(command: Command, manifest: Path, folder: Path) -> Cost:
    """Run a contender in a folder, and watch its processes.

    Raises:
        ClickException: it failed.
    """
    output, scratch = folder / "out", folder / "scratch"
    for path in (output, scratch):
        path.mkdir(parents=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's workers otherwise give way to every other process, which a shared machine would charge to Ray alone.
        "RAY_worker_niceness": "0",
        "RAY_TMPDIR": tempfile.gettempdir(),
        "TMPDIR": str(scratch),
    }
    used: dict[psutil.Process, float] = {}
    begin, first, memory, looked, busy = time.monotonic(), 0.0, 0.0, 0.0, busy_seconds()
    with open(folder / "log", "w") as log:
        root = psutil.Popen(command(str(manifest), str(output)), env=environment, stdout=log, stderr=subprocess.STDOUT)
        while True:
            try:
                root.wait(LOOK_SECONDS)
                break
            except psutil.TimeoutExpired:
                passed = time.monotonic() - begin
            if not first and is_begun(output, scratch):
                first = passed
            mapped = 0.0
            for process in (root, *root.children(recursive=True)):
                try:
                    times = process.cpu_times()
                    used[process] = times.user + times.system
                    if passed - looked >= MEMORY_SECONDS:
                        mapped += process.memory_full_info().pss / 2**20
                except psutil.Error:  # it has ended
                    continue
            memory, looked = (max(memory, mapped), passed) if mapped else (memory, looked)
    if root.returncode or not first:
        raise click.ClickException(
            f"{' '.join(root.args)} ended with {root.returncode}:\n{(folder / 'log').read_text()[-4000:]}"
        )
    seconds, processor = time.monotonic() - begin, sum(used.values())
    others = max(0.0, busy_seconds() - busy - processor) / seconds
    return Cost(seconds, processor, first, memory, others)


def rows_of(output: Path) -> Rows:
    """The rows of all tars of an output."""
    found: defaultdict[str, dict[str, bytes]] = defaultdict(dict)
    for path in output.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content
                key, _, extension = member.name.partition(".")
                found[key][extension] = content.read()
    return {
        key: (np.asarray(Image.open(io.BytesIO(files["png"]))).tobytes(), json.loads(files["json"])["clip_score"])
        for key, files in found.items()
    }


def compare(name: str, found: Rows, expected: Rows, rows: int) -> str:
    """A row of the table of what is equal.

    Raises:
        ClickException: rows are missing, or were not asked for.
    """
    if len(expected) != rows or found.keys() != expected.keys():
        raise click.ClickException(f"{name} wrote {len(found)} rows, {LOOP} {len(expected)}; the manifest has {rows}")
    pixels, scores = (sum(found[key][part] == expected[key][part] for key in expected) for part in (0, 1))
    return f"| {rows:,} | {name} | {pixels:,} | {scores:,} |"


def table(rows: int, costs: Mapping[str, Sequence[Cost]]) -> list[str]:
    """The rows of the table of what the contenders took, with medians. Times are relative to the loop."""

    def columns(cost: Cost) -> tuple[float, ...]:
        rest = cost.seconds - cost.first
        return cost.seconds, cost.first, rest, cost.processor, cost.memory, cost.others

    medians = {
        name: [statistics.median(values) for values in zip(*map(columns, own), strict=True)]
        for name, own in costs.items()
    }
    lines = []
    for name, values in medians.items():
        *measured, memory, others = values
        ratios = " | ".join(f"{own / loop:.2f}" for own, loop in zip(measured, medians[LOOP], strict=False))
        lines.append(f"| {rows:,} | {name} | {ratios} | {memory:,.0f} | {others:.1f} |")
    return lines


@click.command()
@click.option("--rows", "sizes", default=(32, 256), show_default=True, multiple=True, help="Repeatable.")
@click.option("--rounds", default=2, show_default=True)
@click.option("--only", multiple=True, help="Part of the name of a contender besides the plain loop. Repeatable.")
def main(sizes: Sequence[int], rounds: int, only: Sequence[str]) -> None:
    """Print what each contender takes, relative to the plain loop, and what is equal to its rows."""
    taken, equal = [], []
    for rows in sizes:
        chosen = {
            name: command
            for name, command in contenders(rows).items()
            if not only or name == LOOP or any(part in name for part in only)
        }
        costs: dict[str, list[Cost]] = {name: [] for name in chosen}
        written: dict[str, Rows] = {}
        for number in range(rounds):
            for name, command in chosen.items():
                with tempfile.TemporaryDirectory(prefix="peers-", ignore_cleanup_errors=True) as folder:
                    manifest = Path(folder) / "manifest.parquet"
                    write_manifest(manifest, rows)
                    cost = run(command, manifest, Path(folder))
                    costs[name].append(cost)
                    click.echo(
                        f"{rows:,} rows, round {number + 1}, load {os.getloadavg()[0]:.1f}, {name}: {cost}", err=True
                    )
                    if name != SAMPLING:
                        written[name] = rows_of(Path(folder) / "out")
        taken += table(rows, costs)
        equal += [compare(name, found, written[LOOP], rows) for name, found in written.items()]
    print(f"`tiny`, text only, CLIP scores, {STEPS} steps, batches of {BATCH}, 1 thread a worker, rounds: {rounds}\n")
    print(
        "| rows | what | wall clock | first batch | after it | processor | peak memory, MiB | others' processors |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    print(*taken, sep="\n")
    print("\n| rows | what | images equal to the loop's, bit for bit | scores |\n|---|---|---|---|")
    print(*equal, sep="\n")


if __name__ == "__main__":
    main()
