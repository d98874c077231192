"""A run in a world that is drawn from one integer, from its first driver to the last, and what must hold of it.

Drivers are started, killed, suspended and started beside one another. Workers die, hang, lie and live on. Nodes go and
come. Requests to the storage fail, hang, or lose their answers. Rows kill their workers. Rows are appended, and rows
are generated again. At last the world heals, and one more driver has to end what is left.
"""

import contextlib
import io
import random
from collections.abc import Callable
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from support.simulated import fault
from support.simulation.cluster import HANGS, KILLS, RAISES, Nodes, SimulatedRay, Ways, place
from support.simulation.forms import Digests, Form, Pictures
from support.simulation.object_store import Store, Strike, Trouble
from support.simulation.processes import Process, Scheduler
from support.simulation.readers import ACTIONS, Readers
from support.simulation.replacements import Notes, replaced
from support.simulation.witness import Witness
from vcf_batch import storage
from vcf_batch.config.fingerprint import fingerprint_fields
from vcf_batch.config.run_config import RunConfig
from vcf_batch.driver.fault import Failure
from vcf_batch.driver.ledger import Ledger
from vcf_batch.errors import RefusedError, UsageError, VcfBatchError
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.models.resolution import ResolvedModel
from vcf_batch.output import lease, receipts
from vcf_batch.output.receipts import RECEIPT_SUFFIX
from vcf_batch.pool import launch
from vcf_batch.setup.job import Job
from vcf_batch.setup.run_models import Models

NODES = ("a", "b", "c")
CHANGES = ("put", "copy", "delete", "rename", "link")
"""Requests that change the store."""
BOUND_SECONDS = 10_000.0
"""Simulated time within which every run has to end: more than all pauses of all attempts together."""
AT_ONCE = 50
"""Seeds that a process takes at a time."""
HEALED_TRIES = 2
"""Drivers that may be needed after the world has healed. The first may be refused: the last owner seems to live."""


class Violation(AssertionError):
    """Something that must always hold does not."""


class Universe:
    """One seed's world.

    Args:
        seed: everything follows from it.
        trace: gets a line for whatever happens.
    """

    def __init__(self, seed: int, trace: Callable[[str], None] | None = None) -> None:
        self.seed, self._trace = seed, trace
        self.draw = draw = random.Random(seed)
        self.scheduler = Scheduler(draw, BOUND_SECONDS)
        self.store = self._store()
        self.fatal = 0
        """Number of changes of the store by drivers after which one is killed, before the change; 0 for none."""
        self.shard_size = draw.randint(1, 6)
        self.parts = [self._part()]
        """Rows of each file of the manifest."""
        self.ways = self._ways()
        fewest = 2 if self.ways.bad_nodes else 1
        self.nodes = Nodes({node: draw.randint(1, 3) for node in NODES[: draw.randint(fewest, 3)]})
        self.home = f"memory://simulation-{seed}"
        self.output = self.store.url("out")
        self.is_read = self._is_read()
        """Whether readers are at work beside the drivers. They need the files of real shards."""
        self.form: Form = Pictures() if self.is_read else Digests()
        self._write_part(0)
        self.senders: dict[Process, str] = {}
        """Senders of requests that have their effects late."""
        self.started: list[str] = []
        """Drivers in the order of their starts."""
        self.codes: dict[str, int | str] = {}
        """How each driver ended: its exit code, or ``killed``."""
        self.errors: dict[str, Exception] = {}
        self.excused: set[str] = set()
        """Drivers that may lose their lease: they were suspended, or the storage failed them."""
        self.chosen: dict[str, list[str]] = {}
        """Names of the shards that each driver has to generate again."""
        self.witness = self._witness()
        self.readers = Readers(self)
        self.store.watcher, self.store.looked_at = self.witness.watch, self.witness.looked_at
        self.store.numbered = self._count

    # The world

    def _is_read(self) -> bool:
        return self.draw.random() < 0.1

    def _part(self) -> int:
        """Rows of a file: whole shards, so that others may be appended."""
        return self.shard_size * self.draw.randint(2, max(2, 12 // self.shard_size))

    def _ways(self) -> Ways:
        draw = self.draw
        rows = sum(self.parts)
        # Where nothing can be generated, nothing shows that workers are healthy, and such a run is refused.
        harmful = {
            draw.randrange(1, rows): draw.choice((KILLS, RAISES, HANGS)) for _ in range(draw.choice((0, 0, 0, 1, 2)))
        }
        bad_nodes = {NODES[0]} if draw.random() < 0.15 else set()
        return Ways(
            # A fourth could be taken for the doing of the last row beside a culprit, as could any beside a bad node.
            deaths=0 if bad_nodes else draw.choice((0, 1, 2, 3)),
            dies=draw.choice((0.0, 0.1, 0.5)),
            troubled=draw.choice((0.0, 0.0, 0.05)),
            lies=draw.choice((0.0, 0.1, 0.4)),
            lives_on=draw.choice((0.0, 0.5, 1.0)),
            bad_nodes=bad_nodes,
            rows=harmful,
            greedy={draw.randrange(rows): 1} if draw.random() < 0.2 else {},
            slow_nodes={node for node in NODES if draw.random() < 0.2},
        )

    def _witness(self) -> Witness:
        return Witness(self)

    def _store(self) -> Store:
        given = self.draw, self.scheduler.sleep, lambda: self.scheduler.now, self._who, self._later
        stale = self.draw.choice((0.0, 0.0, 0.0, 0.0, 20.0))
        return Store(*given, if_match=self.draw.random() < 0.9, stale_seconds=stale)

    def tell(self, text: str) -> None:
        if self._trace:
            self._trace(f"{self.scheduler.now:9.2f}  {text}")

    def _who(self) -> tuple[str, int]:
        process = self.scheduler.current
        return self.senders.get(process, process.group), id(process)

    def _later(self, seconds: float, effect: Callable[[], None]) -> None:
        def land() -> None:
            self.scheduler.sleep(seconds)
            with contextlib.suppress(OSError):
                effect()

        sender, _ = self._who()
        self.senders[self.scheduler.spawn(land, "a late request", "network")] = sender

    # Drivers

    def job(self) -> Job:
        """The run with the manifest as it is now."""
        config = RunConfig(
            manifest=f"{self.home}/in",
            output=self.output,
            model="m",
            shard_size=self.shard_size,
            batch_size=4,
            num_workers=None,
            gpus_per_worker=0,
            stall_timeout=60.0,
            allow_smaller_batches=True,
            strength=1.0,
            steps=4,
            guidance_scale=5.0,
            dtype="float32",
            height=32,
            width=32,
        )
        models = Models(ResolvedModel("m", "hub", "m", "0" * 40), None, "none", "none")
        manifest = Manifest.open(config.manifest)
        fields = fingerprint_fields(
            config,
            manifest=manifest.identity,
            model="m",
            judge="m",
            lpips="none",
            pno_guide=None,
            safety_checker=None,
            ip_adapter=None,
        )
        return Job(config, manifest, models, fields)

    def start(self, redo: dict[int, bytes] | None = None) -> str:
        """Start a driver beside whatever is there."""
        group = f"driver-{len(self.started)}"
        self.started.append(group)
        if self.store.down or self.store.trouble != Trouble():
            self.excused.add(group)
        job = self.job()
        self.scheduler.spawn(lambda: self._drive(group, job, redo or {}), group, group)
        return group

    def _drive(self, group: str, job: Job, redo: dict[int, bytes]) -> None:
        self.tell(f"{group} starts" + (f", to generate again {redo}" if redo else ""))
        code: int | str = "killed"
        try:
            launch.generate_left(job, lambda: self._chosen(group, redo), lambda *given: self._loop(group, *given))
            code = 0
            self.witness.check_good_end(group, job, self.chosen.get(group, []))
        except (RefusedError, UsageError, VcfBatchError) as error:
            code = 4 if isinstance(error, RefusedError) else 2 if isinstance(error, UsageError) else 1
            self.errors[group] = error
        finally:
            self.codes[group] = code
            self.tell(f"{group} ends: {code} {self.errors.get(group, '')}")
            for worker in [*self.nodes.workers]:
                if worker.name.startswith(f"{group}-"):
                    worker.cluster.end(worker, fault(Failure.CRASH, worker.node, one_task=False))
            self.scheduler.kill(group)  # its threads end with it

    def _chosen(self, group: str, redo: dict[int, bytes]) -> dict[int, bytes]:
        """The rows to generate again: of shards that exist, as a repair finds them."""
        there = {receipt.shard.index: receipt.shard for receipt in receipts.read(self.output)}
        chosen = {index: mask for index, mask in redo.items() if index in there}
        self.chosen[group] = [there[index].name + RECEIPT_SUFFIX for index in chosen]
        for index, mask in chosen.items():
            shard = there[index]
            self.witness.done -= {row for row, again in zip(range(shard.start, shard.stop), mask, strict=True) if again}
        return chosen

    def _loop(self, group: str, job: Job, held: lease.Lease, ledger: Ledger) -> None:
        cluster = self._cluster(job, group)
        notes = Notes(job.manifest.num_rows, cluster.now, lambda text: self.tell(f"{group}: {text}"))
        launch.loop_on(cast(Any, cluster), job, held, ledger, notes).run()

    def _cluster(self, job: Job, group: str) -> SimulatedRay:
        return SimulatedRay(job, self.scheduler, self.nodes, self.ways, self.draw, self.form, group, self.tell)

    def _knows_dead(self, owner: dict[str, Any]) -> bool:
        """Whether the current driver knows that an owner is dead: half of the others run on the owner's machine."""
        group, asks = self.witness.tokens.get(str(owner.get("token"))), self.scheduler.current.group
        same = group is not None and (int(group[7:]) + int(asks[7:])) % 2 == 0
        return bool(same and not self.scheduler.is_alive(str(group)))

    # What is watched

    def _count(self, action: str, key: str) -> Strike | None:
        group, _ = self._who()
        if self.fatal and action in CHANGES and group in self.started and not key.endswith(".beat"):
            self.fatal -= 1
            if not self.fatal:
                self.tell(f"{group} is killed before it {action}s {storage.name(key)}")
                self.scheduler.kill(group)
        return None

    def violation(self, text: str) -> Violation:
        return Violation(f"seed {self.seed}, at {self.scheduler.now:.2f} s: {text}")

    # The story

    def run(self) -> None:
        """Let the story happen, and check what must hold.

        Raises:
            Violation: something does not.
        """
        with replaced(self.scheduler, self.draw, self._knows_dead), self.store.stands_in():
            self.scheduler.spawn(self._story, "story", "story")
            self.scheduler.run()
        try:
            for error in self.scheduler.errors:
                raise error
            if self.scheduler.ran_out:
                raise self.violation(f"after {BOUND_SECONDS:g} s the run has not ended")
            self.witness.check_end()
        finally:
            storage.remove_tree(self.home)

    def _story(self) -> None:
        draw, scheduler = self.draw, self.scheduler
        self.start()
        if draw.random() < 0.3:
            scheduler.wait(lambda: not self._alive(), 1000.0)
        for _ in range(draw.randint(0, 10)):
            scheduler.sleep(draw.expovariate(1 / draw.choice((1.0, 10.0, 60.0))))
            draw.choice(self._events())()
        self._end_well()

    def _end_well(self) -> None:
        """Heal the world, and let a driver end what is left."""
        scheduler = self.scheduler
        self._heal()
        for _ in range(HEALED_TRIES):
            # Late requests and workers that live on may leave something behind, which the next driver deletes.
            scheduler.wait(
                lambda: not (self._alive() or self.nodes.workers or scheduler.is_alive("network")), BOUND_SECONDS
            )
            last = self.start()
            scheduler.wait(lambda: not self._alive(), BOUND_SECONDS)
            if self.codes.get(last) == 0:
                break
            self.tell(f"the driver after the healing ended with {self.codes.get(last)}")
        else:
            raise self.violation(f"the healed run ends with {self.codes.get(last)}: {self.errors.get(last)}")
        if self.is_read:
            self.wait_for(self.readers.start("push"))
            self.readers.check_target()

    def wait_for(self, *groups: str) -> None:
        """Let the current process wait until these have ended."""
        self.scheduler.wait(lambda: not any(map(self.scheduler.is_alive, groups)), self.scheduler.now + BOUND_SECONDS)

    def _alive(self) -> list[str]:
        """Drivers that are at work."""
        return [group for group in self.started if group not in self.codes and self.scheduler.is_alive(group)]

    def _events(self) -> list[Callable[[], None]]:
        events = [
            self._start_another,
            self._start_another,
            self._kill,
            self._kill_within_a_change,
            self._kill_within_a_change,
            self._lose_node,
            self._add_node,
            self._append,
            self._repair,
            self._repair,
            self._bad_node,
        ]
        # Without If-Match, a driver that lives and loses its lease may harm the next one: the explorer strikes there.
        silences = [self._suspend, self._worsen, self._outage] if self.store.if_match else []
        return events + silences + [self._read, self._read, self._read] * self.is_read

    def _read(self) -> None:
        self.readers.start(self.draw.choice(ACTIONS))

    def _start_another(self) -> None:
        if not self._alive() or self.draw.random() < 0.3:
            self.start()

    def _kill(self) -> None:
        for group in self._alive()[:1]:
            self.tell(f"{group} is killed")
            self.scheduler.kill(group)

    def _kill_within_a_change(self) -> None:
        self.fatal = self.draw.randint(1, 40)

    def _suspend(self) -> None:
        for group in self._alive()[:1]:
            seconds = self.draw.choice((5.0, 40.0, 200.0))
            self.tell(f"{group} is suspended for {seconds:g} s")
            self.excused.add(group)
            self.scheduler.suspend(group, seconds)

    def _lose_node(self) -> None:
        # Where bad nodes alone are left, nobody could tell them from bad rows.
        good = self.nodes.room.keys() - self.ways.bad_nodes
        if self.nodes.room and (len(good) > 1 or not self.ways.bad_nodes):
            node = self.draw.choice([*self.nodes.room])
            self._end_node(node)

    def _end_node(self, node: str) -> None:
        self.tell(f"node {node} is lost")
        del self.nodes.room[node]
        end = fault(Failure.LOSS, node, node_died=True, one_task=False)
        for worker in [*self.nodes.workers]:
            if worker.node == node:
                worker.cluster.end(worker, end)

    def _add_node(self) -> None:
        node = self.draw.choice(NODES)
        if node not in self.nodes.room:
            self.tell(f"node {node} joins")
            self.nodes.room[node] = self.draw.randint(1, 2)
            place(self.nodes)

    def _bad_node(self) -> None:
        if len(self.nodes.room) > 1 and not self.ways.bad_nodes:
            node = self.draw.choice([*self.nodes.room])
            self.tell(f"node {node} is bad from now on")
            # Deaths by chance elsewhere beside those on a bad node would be proof against a row.
            self.ways.bad_nodes, self.ways.deaths = {node}, 0

    def _worsen(self) -> None:
        draw = self.draw
        self.excused.update(self._alive())
        self.store.trouble = Trouble(
            draw.choice((0.0, 0.05, 0.2)),
            draw.choice((0.0, 0.05, 0.2)),
            draw.choice((0.0, 0.02)),
            draw.choice((0.0, 0.02)),
        )
        self.tell(f"requests fail: {self.store.trouble}")

    def _outage(self) -> None:
        self.excused.update(self._alive())
        self.store.down = True
        self.tell("the storage is down")
        self.scheduler.sleep(self.draw.choice((5.0, 60.0, 300.0)))
        self.store.down = False
        self.tell("the storage is up again")

    def _append(self) -> None:
        if len(self.parts) < 3:
            self.parts.append(self._part())
            self._write_part(len(self.parts) - 1)
            self.tell(f"{self.parts[-1]} rows are appended")

    def _repair(self) -> None:
        rows, size = sum(self.parts), self.shard_size
        if not self._alive():
            masks = {
                index: bytes(self.draw.random() < 0.5 for _ in range(min(size, rows - index * size)))
                for index in range((rows + size - 1) // size)
                if self.draw.random() < 0.5
            }
            self.ways.gone.update(row for row in range(rows) if self.draw.random() < self.draw.choice((0.0, 0.3)))
            self.start({index: mask for index, mask in masks.items() if any(mask)})
            if self.draw.random() < 0.5:
                self._kill_within_a_change()

    def _heal(self) -> None:
        self.tell("the world heals")
        self.store.trouble, self.store.down, self.store.stale_seconds, self.fatal = Trouble(), False, 0.0, 0
        self.ways.deaths, self.ways.troubled, self.ways.lies = 0, 0.0, 0.0
        self.ways.lives_on = 0.0  # What such a worker stages after the last driver's end, the next start deletes.
        # A bad node goes for good: if it became sound, the verdicts that rows died there would count.
        for node in self.ways.bad_nodes & self.nodes.room.keys():
            self._end_node(node)
        for node in NODES:
            if node not in self.ways.bad_nodes:
                self.nodes.room.setdefault(node, 1)
        place(self.nodes)

    def _write_part(self, number: int) -> None:
        buffer = io.BytesIO()
        pq.write_table(pa.table({"prompt": ["a row"] * self.parts[number]}), buffer)
        storage.publish_bytes(f"{self.home}/in/part-{number}.parquet", buffer.getvalue())


def simulate(seed: int, trace: Callable[[str], None] | None = None) -> Universe:
    """Run one seed.

    Raises:
        Violation: something that must hold does not.
    """
    universe = Universe(seed, trace)
    universe.run()
    return universe


def wrong_among(seeds: range) -> list[str]:
    """What was found wrong in some seeds, in words."""
    found = []
    for seed in seeds:
        try:
            simulate(seed)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}\n  make simulate SEED={seed} shows what happened")
    return found
