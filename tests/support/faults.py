"""Faults on order: real workers in processes of their own, told by a test when to die, hang or fail.

Orders are files in a folder beside the manifest. An order ``PHASE.ACTION`` (``PHASE.ACTION.2`` for another one) is
carried out once, by the first process that gets to that phase. ``hold`` keeps workers from beginning a shard; with
``tickets-only`` each shard that is handed in takes a ``ticket``, and who has none waits for one (the phase ``wait``).
Words in prompts are orders that hold for ever: the row with the prompt "kill ..." kills every worker that looks at it.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from vcf_batch.driver import failing_shard, loop
from vcf_batch.driver.cluster import Loaded
from vcf_batch.errors import StorageError
from vcf_batch.pool import actor, ray_cluster
from vcf_batch.records import RowMask
from vcf_batch.setup.job import Job
from vcf_batch.setup.shard_task import ShardTask

WORKER_PHASES = ("load", "run", "sample", "score", "tar", "parquet", "stage", "staged")
"""When a worker looks for orders, in their order."""

DRIVER_PHASES = ("commit", "first file", "both files", "receipt")
"""When a driver does: before a commit, after each of its steps."""


def orders(manifest: str) -> Path:
    """The folder of orders to those who work on a manifest; made if there is none."""
    folder = Path(manifest).parent / "orders"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def give(folder: Path, *names: str) -> None:
    """Order something to be done once."""
    for name in names:
        (folder / name).touch()


def obey(folder: Path, phase: str) -> None:
    """Carry out an order for this phase, if there is one that nobody else takes."""
    for order in sorted(folder.glob(f"{phase}.*")):
        if taken(order):
            act(order.name.split(".")[1])


def taken(order: Path) -> bool:
    """Whether the order was there, and is this process's now."""
    try:
        order.unlink()
    except FileNotFoundError:
        return False
    return True


def workers(folder: Path) -> list[int]:
    """Processes of workers that are alive; there has to be a folder ``pids``, in which they say so."""
    numbers = sorted(int(path.name) for path in (folder / "pids").iterdir())
    return [number for number in numbers if b"FaultyActor" in _command(number)]


def _command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def act(action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "hang":
        time.sleep(3600)
    elif action == "storage":
        raise StorageError("the storage fails as ordered")
    elif action == "fail":
        raise ZeroDivisionError("failed as ordered")


def around(
    owner: Any, name: str, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None
) -> None:
    """Let something come before or after a method or function, in this process."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **settings: Any) -> Any:
        if before is not None:
            before(*args, **settings)
        result = original(*args, **settings)
        if after is not None:
            after(*args, **settings)
        return result

    setattr(owner, name, wrapped)


def faulty_actor(manifest: str) -> type[actor.Actor]:
    """A worker that obeys the orders beside a manifest. Tests put it in the place of the pool's own."""
    folder = orders(manifest)

    class FaultyActor(actor.Actor):
        """A worker that obeys."""

        def __init__(self) -> None:
            if (folder / f"no-init-on-{ray.get_runtime_context().get_node_id()}").exists():
                act("fail")
            obey(folder, "init")
            super().__init__()

        def load(self, job: Job) -> Loaded:
            node = ray.get_runtime_context().get_node_id()
            if (folder / "pids").exists():
                (folder / "pids" / str(os.getpid())).touch()
            if (folder / f"no-load-on-{node}").exists():
                raise StorageError("this node loads nothing, as ordered")
            obey(folder, "load")
            loaded = super().load(job)

            from vcf_batch.output import commits, shards

            def sampling(*_: Any, seeds: Sequence[int], **__: Any) -> None:
                obey(folder, "sample")
                limit = folder / "rows-in-memory"
                if limit.exists() and len(seeds) > int(limit.read_text()):
                    import torch

                    raise torch.OutOfMemoryError("CUDA out of memory, as ordered")

            def encoding(_: object, prompts: Sequence[str], *__: Any, **___: Any) -> None:
                for prompt in prompts:
                    act(prompt.partition(" ")[0])

            def phase(name: str) -> Callable[..., None]:
                return lambda *_, **__: obey(folder, name)

            def staging(*_: Any) -> None:
                obey(folder, "stage")
                while (folder / "tickets-only").exists() and not taken(folder / "ticket"):
                    for attempt_id in self._worker.progress:
                        self._worker.note_progress(attempt_id)  # it does not hang
                    time.sleep(0.05)
                    obey(folder, "stage")
                    obey(folder, "wait")

            components = self._worker.components
            around(components.pipeline, "generate_from_tokens", sampling)
            around(type(components.pipeline.family), "encode", encoding)
            around(type(components.scorer), "score", phase("score"))
            around(shards.ShardWriter, "add", phase("tar"))
            around(shards.ShardWriter, "finish", phase("parquet"))
            around(commits, "stage", staging, phase("staged"))
            return loaded

        @ray.method(concurrency_group="shards")
        def run(self, task: ShardTask, attempt_id: str, redo: RowMask | None) -> Any:
            node = ray.get_runtime_context().get_node_id()
            if (folder / f"no-run-on-{node}").exists():
                act("fail")
            while (folder / "hold").exists():
                time.sleep(0.05)
            obey(folder, "run")
            return super().run(task, attempt_id, redo)  # type: ignore[operator]

    return FaultyActor


def drive() -> None:
    """The command line, with workers and a driver that obey: ``python faults.py generate MANIFEST ...``."""
    from vcf_batch import __main__, storage
    from vcf_batch.output import commits

    folder = orders(sys.argv[2])

    def moved(source: str, target: str) -> None:
        obey(folder, "first file" if target.endswith(".tar") else "both files")

    def begin(*_: Any) -> None:
        (folder.parent / "driving").write_text(str(os.getpid()))

    around(commits, "commit", lambda *_: obey(folder, "commit"), lambda *_: obey(folder, "receipt"))
    around(storage, "move", after=moved)
    around(loop.Loop, "run", begin)
    # As many attempts as it takes: where all workers are struck all the time, no row is to blame.
    failing_shard.PAUSES = failing_shard.LOSS_PAUSES = (0.2,) * 1000
    ray_cluster.Actor = faulty_actor(sys.argv[2])  # type: ignore[misc]
    __main__.main()


if __name__ == "__main__":
    drive()
