"""Ray's errors in this package's words."""

from typing import Any

from ray.core.generated import common_pb2
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from vcf_batch.driver.failing_shard import Failure
from vcf_batch.errors import OutOfDeviceMemory, StorageError
from vcf_batch.pool import errors


def died(message: str, preempted: bool = False) -> ActorDiedError:
    proto: Any = common_pb2
    context = proto.ActorDiedErrorContext(
        class_name="_Actor", actor_id=b"0" * 16, pid=4711, node_ip_address="10.0.0.7", error_message=message
    )
    if preempted:
        context.node_death_info.reason = proto.NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED
    return ActorDiedError(context)


def test_the_reason_of_a_dead_worker_says_where_and_why() -> None:
    reason = errors.reason(
        died("The actor is dead because its worker process has died.\nWorker exit type: SYSTEM_ERROR")
    )
    assert reason == (
        "ActorDiedError: pid: 4711, ip: 10.0.0.7, The actor is dead because its worker process has died., "
        "Worker exit type: SYSTEM_ERROR"
    )
    assert len(errors.reason(died("x" * 1000))) < 310
    assert errors.reason(RuntimeError("CUDA error: device lost\nCompile with ...")) == (
        "RuntimeError: CUDA error: device lost"
    )
    assert errors.reason(StorageError("cannot read " + "x" * 400)).endswith("x" * 400)


def test_where_an_actor_died_is_told_by_an_address_alone() -> None:
    """A worker that could not even be made has not said on which node it is."""
    traceback = "ray::Actor.__init__() (pid=4711, ip=10.0.0.7)\nImportError: no such module"
    unmade = ActorDiedError(RayTaskError("__init__", traceback, None))
    assert errors.reason(unmade) == "ActorDiedError: ImportError: no such module"
    assert errors.address(unmade) == errors.address(died("Worker exit type: SYSTEM_ERROR")) == "10.0.0.7"
    assert errors.address(RuntimeError("ip=10.0.0.7")) == ""


def test_a_lost_node_is_nobodys_fault() -> None:
    """Losing a node costs no attempt of a shard."""
    assert errors.node_died(died("The actor died because its node has died. Node Id: 0"))
    assert errors.node_died(died("drained", preempted=True))
    assert errors.node_died(ActorUnavailableError("rpc error", b"0" * 16))
    assert not errors.node_died(died("Worker exit type: SYSTEM_ERROR"))
    assert not errors.node_died(StorageError("the node has died"))


def test_a_symptom_is_the_same_in_every_run() -> None:
    """A verdict is in the parquet: no address, process number or message of the moment is in it."""
    for first, second in [
        (RuntimeError("CUDA error at 0x7f00"), RuntimeError("CUDA error at 0x7fff")),
        (died("pid 1"), died("pid 2")),
        (died("its node has died: a"), died("its node has died: b")),
        (errors.Stalled("for 8 s"), errors.Stalled("for 9 s")),
    ]:
        assert errors.symptom(first) == errors.symptom(second)
    assert errors.symptom(RuntimeError("x")).endswith("fails with RuntimeError")


def test_only_what_a_process_does_may_be_a_rows_fault() -> None:
    """Trouble of storage, network or a node fails the attempt, never the row."""
    assert errors.failure(died("its node has died")) is Failure.LOSS
    assert errors.failure(died("Worker exit type: SYSTEM_ERROR")) is Failure.CRASH
    assert errors.failure(errors.Stalled()) is Failure.CRASH
    assert errors.failure(ZeroDivisionError()) is Failure.CRASH
    assert errors.failure(OutOfDeviceMemory("")) is Failure.MEMORY
    assert errors.failure(StorageError("")) is Failure.TROUBLE
    assert errors.failure(OSError()) is Failure.TROUBLE
    error = RayTaskError("run", "a traceback", StorageError("full"))
    assert errors.failure(errors.cause(error)) is Failure.TROUBLE
