"""Chaos: a run that is struck by a hundred faults has the bytes of a run that nothing happened to.

    python tests/support/chaos.py --seed 1 [--faults 100] [--output URL | --s3]

Two nodes of a Ray cluster on this machine, and one driver. Workers are killed, frozen and made to hang, in every phase
and at any moment; the driver is killed, within commits too, stopped and interrupted, and started again each time;
storage fails; nodes go and others come. The schedule is drawn from the seed. Shards get as many attempts as it takes:
where every worker dies after seconds, rows would be blamed for it.

A worker needs a ticket to hand in a shard, and until the last fault has struck there are fewer tickets than shards: all
faults strike one run.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "faulty"))  # for an --output faulty://...
os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[-1], os.environ.get("PYTHONPATH", "")])
sys.path.append(str(Path(__file__).parents[1]))
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
os.environ.setdefault("FAULTY", '{"every": 10, "pause": 0.02}')

import fsspec.config
from ray.cluster_utils import Cluster

from support import faults, runs, s3_server
from vcf_batch import storage
from vcf_batch.commands import verify
from vcf_batch.errors import redact
from vcf_batch.output import receipts
from vcf_batch.output.output import Output

BATCH_SIZE = 4
HANG_SECONDS = 15.0
"""Without progress, until a worker is taken to hang."""
PATIENCE_SECONDS = 600.0
"""For anything that has to happen."""

BEFORE_A_TICKET = faults.WORKER_PHASES[: faults.WORKER_PHASES.index("stage")]
TAKING_A_TICKET = ("staged", *faults.DRIVER_PHASES)
"""Phases that come after a shard is handed in."""
PASSING = (0, 3, 130, 143, -signal.SIGKILL)
"""Codes that a driver may end with while it is struck."""


class Chaos:
    """One run, and what strikes it.

    Args:
        cluster: a head without CPUs, and two nodes of one.
        folder: local, for the manifest, the model and the orders.
        output: of the run.
        rows: of the manifest.
        num_shards: of the run.
        seed: draws the faults.
    """

    def __init__(self, cluster: Cluster, folder: Path, output: str, rows: int, num_shards: int, seed: int) -> None:
        self.cluster, self.output, self.num_shards = cluster, output, num_shards
        self.random = random.Random(seed)
        self.manifest = runs.write_manifest(folder / "in", rows)
        self.model = runs.save_model(folder / "model")
        self.orders = faults.orders(str(self.manifest))
        self.options = {
            "model": self.model,
            "address": cluster.address,
            "shard-size": rows // num_shards,
            "batch-size": BATCH_SIZE,
            **runs.SIZE,
            "steps": 4,
            "num-workers": 2,
            "gpus-per-worker": 0,
            "stall-timeout": HANG_SECONDS,
        }
        self.driver: subprocess.Popen[str] | None = None
        self.ends: Counter[int] = Counter()
        """How often a driver ended with each code."""
        self.struck: Counter[str] = Counter()
        """How often each kind of fault has struck."""

    # The run

    def start(self, output: str) -> subprocess.Popen[str]:
        arguments = [str(part) for name, value in self.options.items() for part in (f"--{name}", value)]
        return subprocess.Popen(
            [sys.executable, faults.__file__, "generate", str(self.manifest), output, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=(self.orders.parent / "driver.log").open("a"),
            text=True,
        )

    def undisturbed(self, output: str) -> None:
        """The same run, without any fault."""
        assert self.start(output).wait(PATIENCE_SECONDS) == 0

    def keep_running(self) -> None:
        """Start the command again once it has ended: rerunning it is the resume."""
        if self.driver is not None and (code := self.driver.poll()) is not None:
            self.ends[code] += 1
            assert code in PASSING, f"a driver ended with {code}"
            self.driver = None
        if self.driver is None and not self.ends[0]:
            self.driver = self.start(self.output)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        def look() -> bool:
            self.keep_running()
            return condition()

        runs.wait_for(look, PATIENCE_SECONDS)

    def committed(self) -> int:
        return sum(name.endswith(receipts.RECEIPT_SUFFIX) for name in storage.list_files(self.output))

    def hand_in(self) -> None:
        """Let a worker hand in a shard."""
        faults.give(self.orders, "ticket")

    def go_on_to(self, count: int) -> None:
        """Let the run go on until so many shards are committed."""
        while self.committed() < count:
            self.hand_in()
            self.wait_for(lambda: not (self.orders / "ticket").exists())
            # The ticket is lost where the shard's attempt is.
            with contextlib.suppress(AssertionError):
                runs.wait_for(lambda: self.committed() >= count, 5)

    # The faults: each returns once it has struck

    def order(self, phase: str, action: str) -> str:
        """Let a worker or the driver do something in its next passage through a phase."""
        name = f"{phase}.{action}"
        faults.give(self.orders, name)
        # Where all workers wait for tickets, one has to come again for a phase before that.
        again = "wait.kill" if phase == "load" else "wait.storage"
        given = 0.0

        def struck() -> bool:
            nonlocal given
            if phase in TAKING_A_TICKET:
                self.hand_in()
            # Now and then: a shard that comes again may first have to wait for another one of its worker.
            if phase in BEFORE_A_TICKET and time.monotonic() > given + 5:
                faults.give(self.orders, again)
                given = time.monotonic()
            return not (self.orders / name).exists()

        self.wait_for(struck)
        for left in ("ticket", again):
            (self.orders / left).unlink(missing_ok=True)
        return name

    def worker_dies_in_a_phase(self) -> str:
        return self.order(self.random.choice(faults.WORKER_PHASES), "kill")

    def worker_dies_at_any_moment(self) -> str:
        self.wait_for(lambda: bool(faults.workers(self.orders)))
        time.sleep(self.random.random())
        workers = faults.workers(self.orders)
        if workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.random.choice(workers), signal.SIGKILL)
        return "SIGKILL"

    def worker_hangs(self) -> str:
        return self.order(self.random.choice(("sample", "score", "tar")), self.random.choice(("hang", "stop")))

    def storage_fails(self) -> str:
        return self.order(self.random.choice((*faults.WORKER_PHASES[1:], *faults.DRIVER_PHASES[:3])), "storage")

    def driver_dies_within_a_commit(self) -> str:
        return self.order(self.random.choice(faults.DRIVER_PHASES), "kill")

    def driver_is_killed(self) -> str:
        self.keep_running()
        time.sleep(self.random.uniform(0, 10))
        return self.signal_driver(signal.SIGKILL, 1)

    def driver_is_stopped(self) -> str:
        """As a cluster or a person stops it, once or twice."""

        def at_work() -> bool:
            file = self.orders.parent / "driving"
            return self.driver is not None and file.exists() and file.read_text() == str(self.driver.pid)

        self.wait_for(at_work)
        time.sleep(self.random.uniform(0, 5))
        return self.signal_driver(self.random.choice((signal.SIGTERM, signal.SIGINT)), self.random.choice((1, 2)))

    def signal_driver(self, number: signal.Signals, times: int) -> str:
        assert self.driver is not None
        for _ in range(times):
            self.driver.send_signal(number)
            time.sleep(0.3)
        self.driver.wait(PATIENCE_SECONDS)
        return f"{number.name} x {times}"

    def node_is_lost(self) -> str:
        node = self.random.choice(sorted(self.cluster.worker_nodes, key=lambda node: node.node_id))
        self.cluster.remove_node(node)
        self.cluster.add_node(num_cpus=1)
        return "and another one joins"

    KINDS = (
        *[worker_dies_in_a_phase] * 8,
        *[worker_dies_at_any_moment] * 4,
        *[storage_fails] * 4,
        *[driver_dies_within_a_commit] * 3,
        *[driver_is_stopped] * 2,
        worker_hangs,
        driver_is_killed,
        node_is_lost,
    )

    def strike(self, count: int) -> None:
        """Run the command while so many faults strike it, every kind at least once if there are enough, to its end."""
        kinds = [*dict.fromkeys(self.KINDS)]
        schedule = [*kinds, *self.random.choices(self.KINDS, k=max(count - len(kinds), 0))]
        self.random.shuffle(schedule)
        (self.orders / "pids").mkdir(exist_ok=True)
        faults.give(self.orders, "tickets-only")
        begin = time.monotonic()
        for number, kind in enumerate(schedule[:count]):
            self.go_on_to(number * (self.num_shards - 2) // count)
            what = kind(self)
            name = kind.__name__.replace("_", " ")
            self.struck[name] += 1
            print(f"{time.monotonic() - begin:5.0f} s, {self.committed()} shards: {name} ({what})", flush=True)
        assert self.committed() < self.num_shards, "the run ended before the faults did"
        (self.orders / "tickets-only").unlink()
        while self.ends[0] == 0:
            self.keep_running()
            time.sleep(0.1)

    # The audit

    def audit(self, undisturbed: str) -> None:
        """Compare the outputs, and look for what should not be there."""
        assert digests(self.output) == digests(undisturbed)
        names = {*digests(undisturbed), *(f"{shard:05d}{receipts.RECEIPT_SUFFIX}" for shard in range(self.num_shards))}
        for output in (self.output, undisturbed):
            assert set(storage.list_tree(output)) == names | {"run.json", "_progress.json"}
            if storage.is_local(output):
                assert not [
                    path for path in Path(output).rglob("*") if path.name not in names | {"run.json", "_progress.json"}
                ]
            assert [str(finding) for finding in verify.check(Output(output))] == []
        found, expected = runs.read_receipts(self.output), runs.read_receipts(undisturbed)
        for number in range(self.num_shards):
            for field in ("shard", "fingerprint", "counts", "files", "device", "means", "sampled_at_once"):
                assert getattr(found[number], field) == getattr(expected[number], field)


def digests(output: str) -> dict[str, str]:
    """Name to SHA-256 of a run's tars and parquets."""
    return {
        name: storage.digest(storage.join(output, name)).sha256
        for name in storage.list_files(output)
        if name.endswith((".tar", ".parquet"))
    }


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, for the driver, and two nodes of one."""
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp", ignore_cleanup_errors=True) as folder:
        nodes = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "temp_dir": folder}
        )
        try:
            nodes.add_node(num_cpus=1)
            nodes.add_node(num_cpus=1)
            yield nodes
        finally:
            nodes.shutdown()


@contextlib.contextmanager
def on_s3() -> Iterator[str]:
    """A folder on an S3 server, for this process and those that it starts."""
    with s3_server.running() as endpoint:
        options = s3_server.options(endpoint)
        fsspec.config.conf["s3"] = options
        os.environ["FSSPEC_S3"] = json.dumps(options)
        yield "s3://chaos/out"


def run(seed: int, count: int, output: str | None, rows: int, num_shards: int) -> None:
    """Strike a run with faults and audit it.

    Raises:
        AssertionError: what is there is not what it has to be.
    """
    with tempfile.TemporaryDirectory(prefix="vcf-batch-chaos-") as folder:
        # Killed workers leave their scratch there. (Ray expects a folder in it.)
        os.environ["TMPDIR"] = folder
        Path(folder, "ray").mkdir()
        with cluster() as nodes:
            output = output or f"{folder}/chaos"
            chaos = Chaos(nodes, Path(folder), output, rows, num_shards, seed)
            begin = time.monotonic()
            chaos.undisturbed(f"{folder}/undisturbed")
            plain = time.monotonic() - begin
            try:
                chaos.strike(count)
                chaos.audit(f"{folder}/undisturbed")
            finally:
                if chaos.driver is not None:
                    chaos.driver.kill()
            for name, times in chaos.struck.most_common():
                print(f"{times:5} x {name}")
            ends = ", ".join(f"{times} with {code}" for code, times in sorted(chaos.ends.items()))
            print(
                f"seed {seed}, {redact(output)}: {count} faults, {rows} rows in {num_shards} shards: identical "
                f"to the undisturbed run; drivers ended: {ends}; {time.monotonic() - begin - plain:.0f} s, undisturbed "
                f"{plain:.0f} s"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Strike a run with faults; exit with 0 if its bytes are those of another."
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=100)
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--output", help="URL of an empty folder.  [default: a temporary one]")
    place.add_argument("--s3", action="store_true", help="write to a real S3 server, started on this machine")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--shards", type=int, default=32)
    options = parser.parse_args()
    with on_s3() if options.s3 else contextlib.nullcontext(options.output) as output:
        run(options.seed, options.faults, output, options.rows, options.shards)
