"""The meaning of Ray's errors in the driver's words: a :class:`vcf_batch.driver.fault.Fault` for each error."""

import re

from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from vcf_batch.driver.fault import Failure, Fault, lines_of, named


def fault_of(error: RayError, node: str) -> Fault:
    """Make a fault of an error that Ray raises instead of an answer.

    Args:
        error: the error; if a task raised an exception, that one counts.
        node: node of the failure; empty if it is unknown.
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
    """Address of the node where an actor died, from the error's text; empty if it is not there."""
    told = re.search(r"\bip(?:=|: )([0-9A-Fa-f.:]+)", str(error)) if isinstance(error, RayActorError) else None
    return told[1] if told else ""


def _node_died(error: RayError) -> bool:
    if isinstance(error, ActorUnavailableError) or (isinstance(error, RayActorError) and error.preempted):
        return True
    return "node has died" in str(error).lower()


def _failure(error: RayError, node_died: bool) -> Failure:
    if node_died:
        return Failure.LOSS
    # Of Ray's own errors, only the death of a process may be caused by its task.
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
    """The error's message in one line."""
    lines = lines_of(error)
    if isinstance(error, RayTaskError) or (isinstance(error, RayActorError) and error.actor_init_failed):
        return lines[-1]  # the exception, at the end of a traceback
    if isinstance(error, RayActorError):  # a headline, names of Ray's own, then place and cause
        told = [line for line in lines[1:] if not line.startswith(("class_name:", "actor_id:", "name:", "namespace:"))]
        return ", ".join(told or lines)
    return lines[0]
