"""What Ray's errors mean, in this package's words: who may be to blame, and what people are told."""

import re

from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from vcf_batch.driver.failing_shard import Failure
from vcf_batch.errors import OutOfDeviceMemory, VcfBatchError, printable

REASON_LENGTH = 300
"""Characters of an error that is not this package's own."""


class Stalled(Exception):
    """A worker gives no sign of life, which Ray does not notice."""


def cause(error: RayError) -> Exception:
    """The exception that a task raised; the error itself where there is none."""
    raised = error.cause if isinstance(error, RayTaskError) else None
    return raised if isinstance(raised, Exception) else error


def failure(error: Exception) -> Failure:
    """Whether a row may be to blame for the error of a worker."""
    if isinstance(error, OutOfDeviceMemory):
        return Failure.MEMORY
    if node_died(error):
        return Failure.LOSS
    # Of what Ray itself reports, only the death of a process may come from what it did.
    trouble = isinstance(error, (VcfBatchError, OSError)) or (
        isinstance(error, RayError) and not isinstance(error, (RayTaskError, RayActorError, OutOfMemoryError))
    )
    return Failure.TROUBLE if trouble else Failure.CRASH


def node_died(error: Exception) -> bool:
    """Whether a machine went away."""
    if isinstance(error, ActorUnavailableError) or (isinstance(error, RayActorError) and error.preempted):
        return True
    return isinstance(error, RayError) and "node has died" in str(error).lower()


def address(error: Exception) -> str:
    """Of the machine where an actor died, which Ray tells in the error's text alone; empty where it does not."""
    told = re.search(r"\bip(?:=|: )([0-9A-Fa-f.:]+)", str(error)) if isinstance(error, RayActorError) else None
    return told[1] if told else ""


def says_which(error: Exception) -> bool:
    """Whether the error is of one task, and not of the process, which may have had several."""
    return not isinstance(error, Stalled) and (not isinstance(error, RayError) or isinstance(error, RayTaskError))


def symptom(error: Exception) -> str:
    """What a worker suffers from. It may become a row's error message, so it is the same whenever that happens: no
    message of the error's own, which has addresses, process numbers and times in it."""
    if isinstance(error, Stalled):
        return "the worker that generates this row gives no sign of life (--stall-timeout)"
    if isinstance(error, OutOfDeviceMemory):
        return "the GPU's memory does not hold this row, even alone"
    if isinstance(error, OutOfMemoryError):
        return "the worker that generates this row needs more memory than its node has"
    if node_died(error):
        return "the node of the worker that generates this row dies"
    if isinstance(error, RayActorError):
        return "the process of the worker that generates this row dies"
    return f"the worker that generates this row fails with {type(error).__name__}"


def reason(error: Exception) -> str:
    """The error in one line, for the log."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    if isinstance(error, (VcfBatchError, Stalled)):
        return lines[0]
    if isinstance(error, RayTaskError) or (isinstance(error, RayActorError) and error.actor_init_failed):
        text = lines[-1]  # of a traceback, which ends with the exception
    elif isinstance(error, RayActorError):  # a headline, names of Ray's own, then where it ran and what happened
        told = [line for line in lines[1:] if not line.startswith(("class_name:", "actor_id:", "name:", "namespace:"))]
        text = ", ".join(told or lines)
    else:
        text = lines[0]
    text = printable(f"{type(error).__name__}: {text}")
    return text if len(text) <= REASON_LENGTH else text[:REASON_LENGTH] + "..."
