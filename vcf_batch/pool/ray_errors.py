"""What Ray's errors mean, in the driver's words: a :class:`vcf_batch.driver.fault.Fault`, made once for each."""

import re

from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from vcf_batch.driver.fault import Failure, Fault, lines_of, named


def fault_of(error: RayError, node: str) -> Fault:
    """Understand what Ray raises instead of an answer.

    Args:
        error: if a task raised an exception, that one counts.
        node: where it happened; empty if nobody knows.
    """
    raised = cause(error)
    if not isinstance(raised, RayError):
        return Fault.of(raised, node)
    node_died = _node_died(raised)
    return Fault(
        _failure(raised, node_died),
        _symptom(raised, node_died),
        named(raised, _message(raised)),
        node,
        raised,
        node_died,
        one_task=isinstance(raised, RayTaskError),
    )


def cause(error: RayError) -> Exception:
    """The exception that a task raised; the error itself where there is none."""
    raised = error.cause if isinstance(error, RayTaskError) else None
    return raised if isinstance(raised, Exception) else error


def address(error: RayError) -> str:
    """Where an actor died, which Ray tells in the error's text alone; empty where it does not."""
    told = re.search(r"\bip(?:=|: )([0-9A-Fa-f.:]+)", str(error)) if isinstance(error, RayActorError) else None
    return told[1] if told else ""


def _node_died(error: RayError) -> bool:
    if isinstance(error, ActorUnavailableError) or (isinstance(error, RayActorError) and error.preempted):
        return True
    return "node has died" in str(error).lower()


def _failure(error: RayError, node_died: bool) -> Failure:
    if node_died:
        return Failure.LOSS
    # Of what Ray itself reports, only the death of a process may come from what it did.
    return Failure.CRASH if isinstance(error, (RayTaskError, RayActorError, OutOfMemoryError)) else Failure.TROUBLE


def _symptom(error: RayError, node_died: bool) -> str:
    if isinstance(error, OutOfMemoryError):
        return "the worker that generates this row needs more memory than its node has"
    if node_died:
        return "the node of the worker that generates this row dies"
    if isinstance(error, RayActorError):
        return "the process of the worker that generates this row dies"
    return f"the worker that generates this row fails with {type(error).__name__}"


def _message(error: RayError) -> str:
    """What the error says, in one line."""
    lines = lines_of(error)
    if isinstance(error, RayTaskError) or (isinstance(error, RayActorError) and error.actor_init_failed):
        return lines[-1]  # of a traceback, which ends with the exception
    if isinstance(error, RayActorError):  # a headline, names of Ray's own, then where it ran and what happened
        told = [line for line in lines[1:] if not line.startswith(("class_name:", "actor_id:", "name:", "namespace:"))]
        return ", ".join(told or lines)
    return lines[0]
