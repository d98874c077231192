"""Simulate runs on many GPUs, with a clock of real costs: ``python benchmarks/scale.py run``.

The product's driver runs unchanged in a simulated world (``tests/support/simulation``): its loop, queue, ledger,
commits, lease and retries. Ray, the storage, the GPUs and time are replaced. Every cost is an input with a default.

``costs``: the costs, and where each comes from.

``run``: a table with a line for each scenario. ``--gpus 1000 --gpus 100`` gives two lines, and so do other options that
are given twice. ``--set request_seconds=0.03`` changes a cost.

``limits``: for how many GPUs one driver is enough, by the costs alone.

``storage``: what requests to a real S3 server on this machine cost a driver, in number and in processor time.
"""

import collections
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from plan import CONTENT, receipt_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.simulation.costs import Costs
from support.simulation.scale import ScaledRun, Scenario, simulate
from vcf_batch import sharding, storage
from vcf_batch.driver import commit_queue
from vcf_batch.manifest.references import MAX_REFERENCE_BYTES
from vcf_batch.output import commits, lease, receipts, run_file

COLUMNS = {
    "gpus": "GPUs",
    "rows": "rows",
    "shard_size": "rows in a shard",
    "image_seconds": "s an image",
    "lost_per_hour": "lost an hour",
    "hours": "hours",
    "idle": "GPU idle",
    "starting": "no worker yet",
    "waiting": "waits for work",
    "lost": "work lost",
    "end": "at the end",
    "rows_redone": "rows redone",
    "commit_seconds": "s a commit",
    "driver_requests": "requests/s, driver",
    "worker_requests": "requests/s, workers",
    "driver_busy": "driver's processor",
}
"""Names of a run's figures in the table, with their titles. Requests are shown with the most within a second."""


def figures(scenario: Scenario) -> dict[str, Any]:
    """Simulate a scenario: its settings and its figures, see :data:`COLUMNS`.

    Besides these: ``first_shards``, seconds from the start of each driver to its first shard; ``lost_nodes``;
    ``driver_peak`` and ``worker_peak``, the most requests within a second; ``requests``, numbers by sender and method;
    and ``own_ms``, milliseconds of processor time a shard that the product's code has taken in the driver here, without
    Ray and the client of S3.
    """
    run: ScaledRun = simulate(scenario)
    costs, wall = scenario.costs, run.ended
    shares = run.gpu_time.shares(run.lost_seconds)
    redone = run.lost_seconds / costs.image_seconds
    references = costs.reference_requests * (scenario.rows - scenario.finished * scenario.shard_size + redone)
    return {
        **{name: getattr(scenario, name) for name in ("gpus", "rows", "shard_size", "lost_per_hour", "killed_at")},
        "image_seconds": costs.image_seconds,
        "hours": wall / 3600,
        "idle": 1 - shares["sampling"],
        **{name: shares[name] for name in ("starting", "waiting", "lost", "end")},
        "rows_redone": round(redone),
        "commit_seconds": statistics.mean(run.commits),
        "driver_requests": run.requests.total("driver") / wall,
        "driver_peak": run.requests.peak("driver"),
        # References are not simulated one by one: they are read as evenly as images are sampled.
        "worker_requests": (run.requests.total("workers") + references) / wall,
        "worker_peak": run.requests.peak("workers")
        + round(costs.reference_requests * scenario.gpus / costs.image_seconds),
        "driver_busy": run.cpu_seconds / wall,
        "own_ms": 1000 * run.own_cpu_seconds / len(run.commits),
        "first_shards": run.first_shards,
        "lost_nodes": run.lost_nodes,
        "requests": {f"{sender} {method}": number for (sender, method), number in sorted(run.requests.counts.items())},
    }


def shown(name: str, found: Mapping[str, Any]) -> str:
    """A figure for a table."""
    value = found[name]
    if peak := {"driver_requests": "driver_peak", "worker_requests": "worker_peak"}.get(name):
        return f"{value:,.0f}; {found[peak]:,}"
    if name in ("idle", "starting", "waiting", "lost", "end", "driver_busy"):
        return f"{value:.1%}"
    if name == "lost_per_hour":
        return f"{value:.0%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


@click.group()
def main() -> None:
    """Simulate runs on many GPUs."""


@main.command("costs")
def show_costs() -> None:
    """Print the costs, with their sources."""
    click.echo("| cost | value | source |\n|---|---|---|")
    for field in dataclasses.fields(Costs):
        click.echo(f"| `{field.name}` | {field.default:g} | {field.metadata['source']} |")


def _costs(changes: Sequence[str]) -> Costs:
    kinds = {name: type(value) for name, value in dataclasses.asdict(Costs()).items()}
    values = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in kinds:
            raise click.UsageError(f"there is no cost {name!r}; there are {', '.join(kinds)}")
        values[name] = kinds[name](float(value))
    return Costs(**values)


@main.command()
@click.option("--gpus", "all_gpus", type=int, multiple=True, default=[1000], show_default=True)
@click.option("--rows", type=int, help="Rows of the manifest.  [default: 10,000 for each GPU]")
@click.option("--shard-size", "shard_sizes", type=int, multiple=True, default=[1000], show_default=True)
@click.option(
    "--lost-per-hour", "losses", type=float, multiple=True, default=[0.0], show_default=True, help="Share of the nodes."
)
@click.option("--image-seconds", "speeds", type=float, multiple=True, default=[Costs.image_seconds], show_default=True)
@click.option("--killed-at", type=float, help="Share of the shards after which the driver is killed.")
@click.option(
    "--finished", default=0, show_default=True, help="Shards that are finished by then in no time, besides the others."
)
@click.option(
    "--commits-at-once", default=commit_queue.COMMITS_AT_ONCE, show_default=True, help="Commits side by side, at most."
)
@click.option("--set", "changes", multiple=True, metavar="COST=VALUE", help="Change a cost.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each scenario, with all figures.")
def run(
    all_gpus: Sequence[int],
    rows: int | None,
    shard_sizes: Sequence[int],
    losses: Sequence[float],
    speeds: Sequence[float],
    killed_at: float | None,
    finished: int,
    commits_at_once: int,
    changes: Sequence[str],
    as_json: bool,
) -> None:
    """Simulate each scenario, and print its figures."""
    costs = _costs(changes)
    if not as_json:
        click.echo(f"| {' | '.join(COLUMNS.values())} |\n|{'---|' * len(COLUMNS)}")
    for gpus, shard_size, lost, speed in itertools.product(all_gpus, shard_sizes, losses, speeds):
        own = dataclasses.replace(costs, image_seconds=speed)
        begin = time.process_time()
        own_rows = (rows or 10_000 * gpus) + finished * shard_size
        found = figures(Scenario(gpus, own_rows, shard_size, lost, killed_at, finished, commits_at_once, own))
        if as_json:
            click.echo(json.dumps(found))
        else:
            click.echo(f"| {' | '.join(shown(name, found) for name in COLUMNS)} |")
            if killed_at is not None:
                first = ", ".join(f"{seconds:,.0f}" for seconds in found["first_shards"])
                click.echo(f"seconds from the start of each driver to its first shard: {first}", err=True)
        click.echo(f"simulated in {time.process_time() - begin:,.0f} s of a processor", err=True)


@main.command()
@click.option("--shard-size", "shard_sizes", type=int, multiple=True, default=[100, 250, 1000], show_default=True)
@click.option("--image-seconds", "speeds", type=float, multiple=True, default=[0.1, 0.45, 2.0], show_default=True)
@click.option("--set", "changes", multiple=True, metavar="COST=VALUE", help="Change a cost.")
def limits(shard_sizes: Sequence[int], speeds: Sequence[float], changes: Sequence[str]) -> None:
    """Print the GPUs for which one driver is enough: by its commits, with one and with all side by side, and by its
    processor."""
    costs, at_once = _costs(changes), commit_queue.COMMITS_AT_ONCE
    click.echo(
        f"| rows in a shard | s an image | requests a commit | s a commit | GPUs, 1 commit at once | {at_once} at once "
        "| the driver's processor |\n|---|---|---|---|---|---|---|"
    )
    for rows, speed in itertools.product(shard_sizes, speeds):
        number, seconds = costs.commit(rows)
        gpus = rows * speed / seconds
        of_a_shard = costs.dispatch_seconds + number * costs.request_cpu_seconds
        most = 1 / (costs.watch_seconds + of_a_shard / (rows * speed))
        click.echo(
            f"| {rows:,} | {speed} | {number} | {seconds:.1f} | {gpus:,.0f} | {at_once * gpus:,.0f} | {most:,.0f} |"
        )


@contextmanager
def s3_calls() -> Iterator[list[str]]:
    """A bucket ``s3://bucket`` on a real server. Yields the names of the requests, as s3fs sends them."""
    import fsspec.asyn
    import fsspec.config
    import pytest
    from s3fs import S3FileSystem

    from support import s3_server

    calls: list[str] = []
    send = S3FileSystem._call_s3

    async def counted(self: Any, method: str, *given: Any, **options: Any) -> Any:
        calls.append(method)
        return await send(self, method, *given, **options)

    with s3_server.running() as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsspec.config.conf, "s3", s3_server.options(endpoint))
        S3FileSystem(**s3_server.options(endpoint)).mkdir("bucket")
        patch.setattr(S3FileSystem, "_call_s3", counted)
        patch.setattr(S3FileSystem, "call_s3", fsspec.asyn.sync_wrapper(counted))
        yield calls


@main.command("storage")
@click.option("--shards", "num_shards", default=300, show_default=True)
@click.option("--threads", default=8, show_default=True)
def measure_storage(num_shards: int, threads: int) -> None:
    """Print the requests of a commit, a receipt and a reference, and the processor time for a request."""
    output = "s3://bucket/out"
    click.echo("| work | number | requests of one | processor, ms a request |\n|---|---|---|---|")
    with s3_calls() as calls:
        run_file.write(output, run_file.document({}, {}), replaces=False, confirm=lambda: None)
        name = run_file.read_document(output)["fingerprint"]  # type: ignore[index]
        held = lease.Lease(output)
        held.acquire()  # Without heartbeats, whose requests would count.

        def commit(index: int) -> None:
            held.confirm()
            run_file.check_stays(output, name)
            commits.commit(output, found[index], staged[index])

        found = [receipt_of(shard) for shard in sharding.ShardPlan(num_shards, 1)]
        staged = [
            {
                kind: f"{commits.STAGING}/{index}/{receipt.shard.name}{suffix}"
                for kind, suffix in receipts.FILE_SUFFIXES.items()
            }
            for index, receipt in enumerate(found)
        ]
        for paths in staged:
            for path in paths.values():
                storage.publish_bytes(storage.join(output, path), CONTENT)

        def commit_all() -> None:
            with ThreadPoolExecutor(threads) as pool:
                collections.deque(pool.map(commit, range(num_shards)), 0)

        def resume() -> None:
            collections.deque(receipts.read(output), 0)

        def read_references() -> None:
            for receipt in found:
                url = storage.join(output, f"{receipt.shard.name}.tar")
                storage.read_bytes(url, MAX_REFERENCE_BYTES + 1)

        for what, work in (("commit", commit_all), ("resume", resume), ("reference", read_references)):
            calls.clear()
            begin = time.process_time()
            work()
            used = time.process_time() - begin
            number = len(calls)
            click.echo(f"| {what} | {num_shards:,} | {number / num_shards:.1f} | {1000 * used / number:.2f} |")


if __name__ == "__main__":
    main()
