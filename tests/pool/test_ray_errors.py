"""Ray's errors in this package's words."""

from typing import Any

from ray.core.generated import common_pb2
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError

from vcf_batch.driver.fault import REASON_LENGTH, Failure, Fault, Stalled
from vcf_batch.errors import OutOfDeviceMemory, StorageError
from vcf_batch.pool import ray_errors


def died(message: str, preempted: bool = False) -> ActorDiedError:
    proto: Any = common_pb2
    context = proto.ActorDiedErrorContext(
        class_name="_Actor", actor_id=b"0" * 16, pid=4711, node_ip_address="10.0.0.7", error_message=message
    )
    if preempted:
        context.node_death_info.reason = proto.NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED
    return ActorDiedError(context)


def fault(error: Exception) -> Fault:
    """As it arrives where a task raised the error, or the cluster did."""
    return ray_errors.fault_of(
        error if isinstance(error, RayError) else RayTaskError("run", "a traceback", error), "node"
    )


def is_loss(error: Exception) -> bool:
    found = fault(error)
    assert found.node_died == (found.failure is Failure.LOSS)
    return found.node_died


def test_the_reason_of_a_dead_worker_says_where_and_why() -> None:
    error = died("The actor is dead because its worker process has died.\nWorker exit type: SYSTEM_ERROR")
    assert fault(error).reason == (
        "ActorDiedError: pid: 4711, ip: 10.0.0.7, The actor is dead because its worker process has died., "
        "Worker exit type: SYSTEM_ERROR"
    )
    assert len(fault(died("x" * 1000)).reason) == REASON_LENGTH + len("...")
    assert fault(RuntimeError("CUDA error: device lost\nCompile with ...")).reason == (
        "RuntimeError: CUDA error: device lost"
    )
    assert fault(StorageError("cannot read " + "x" * 400)).reason.endswith("x" * 400)


def test_where_an_actor_died_is_told_by_an_address_alone() -> None:
    """A worker that could not even be made has not said on which node it is."""
    traceback = "ray::Actor.__init__() (pid=4711, ip=10.0.0.7)\nImportError: no such module"
    unmade = ActorDiedError(RayTaskError("__init__", traceback, None))
    assert fault(unmade).reason == "ActorDiedError: ImportError: no such module"
    assert ray_errors.address(unmade) == ray_errors.address(died("Worker exit type: SYSTEM_ERROR")) == "10.0.0.7"
    assert ray_errors.address(RayTaskError("run", "ip=10.0.0.7", None)) == ""


def test_a_lost_node_is_nobodys_fault() -> None:
    """Losing a node costs no attempt of a shard."""
    assert is_loss(died("The actor died because its node has died. Node Id: 0"))
    assert is_loss(died("drained", preempted=True))
    assert is_loss(ActorUnavailableError("rpc error", b"0" * 16))
    assert not is_loss(died("Worker exit type: SYSTEM_ERROR"))
    assert not is_loss(StorageError("the node has died"))


def test_a_symptom_is_the_same_in_every_run() -> None:
    """A verdict is in the parquet: no address, process number or message of the moment is in it."""
    for first, second in [
        (RuntimeError("CUDA error at 0x7f00"), RuntimeError("CUDA error at 0x7fff")),
        (died("pid 1"), died("pid 2")),
        (died("its node has died: a"), died("its node has died: b")),
        (Stalled("for 8 s"), Stalled("for 9 s")),
    ]:
        assert fault(first).symptom == fault(second).symptom
    assert fault(RuntimeError("x")).symptom.endswith("fails with RuntimeError")


def test_only_what_a_process_does_may_be_a_rows_fault() -> None:
    """Trouble of storage, network or a node fails the attempt, never the row."""
    assert fault(died("its node has died")).failure is Failure.LOSS
    assert fault(died("Worker exit type: SYSTEM_ERROR")).failure is Failure.CRASH
    assert fault(Stalled()).failure is Failure.CRASH
    assert fault(ZeroDivisionError()).failure is Failure.CRASH
    assert fault(OutOfDeviceMemory("")).failure is Failure.MEMORY
    assert fault(StorageError("")).failure is Failure.TROUBLE
    assert fault(OSError()).failure is Failure.TROUBLE
    error = RayTaskError("run", "a traceback", StorageError("full"))
    assert fault(error).failure is Failure.TROUBLE


def test_a_fault_says_whom_it_concerns() -> None:
    """A process that dies or stalls may have had several tasks; an exception is that of the task which raised it."""
    assert fault(StorageError("full")).one_task and fault(ZeroDivisionError()).one_task
    assert fault(RayTaskError("run", "a traceback", None)).one_task
    assert not fault(died("Worker exit type: SYSTEM_ERROR")).one_task
    assert not Fault.of(Stalled("for 8 s"), "node").one_task
    raised = StorageError("full")
    assert (fault(raised).node, fault(raised).error) == ("node", raised)
