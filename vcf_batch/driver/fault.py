"""Failures in the driver's words. A fault is made once, where the answer of a worker or of a commit arrives."""

import enum
from dataclasses import dataclass
from typing import Self

from vcf_batch.errors import OutOfDeviceMemory, VcfBatchError, printable

REASON_LENGTH = 300
"""Largest number of characters of a reason, for errors that are not this package's own."""


class Failure(enum.Enum):
    """Kind of failure of an attempt."""

    TROUBLE = enum.auto()
    """Storage, network or a machine failed. No row is to blame."""
    MEMORY = enum.auto()
    """The GPU's memory did not hold a batch."""
    CRASH = enum.auto()
    """The worker died, stalled or raised an unexpected error. A row may be to blame."""
    LOSS = enum.auto()
    """The node went away."""


class Stalled(Exception):
    """A worker has given no heartbeat for too long. The cluster does not notice that."""


@dataclass(frozen=True)
class Fault:
    """Failure of a request or a commit, with all that the driver needs to know of it."""

    failure: Failure
    symptom: str
    """Symptom of the worker, in words. It may become a row's error message, so it is the same at every repetition: it
    leaves out the error's own message, which has addresses, process numbers and times in it."""
    reason: str
    """The error in one line, for the log."""
    node: str
    """Node of the failure; empty if it is unknown."""
    error: Exception
    """Exception to raise if the run ends with this fault."""
    node_died: bool = False
    """Whether the node went away."""
    one_task: bool = True
    """Whether the error belongs to one task. If not, it belongs to the process, which may have had several tasks."""

    @classmethod
    def of(cls, error: Exception, node: str) -> Self:
        """Make a fault of an exception that this package or a task has raised. The pool does so for Ray's errors."""
        failure = Failure.TROUBLE if isinstance(error, (VcfBatchError, OSError)) else Failure.CRASH
        symptom = f"the worker that generates this row fails with {type(error).__name__}"
        if isinstance(error, OutOfDeviceMemory):
            failure, symptom = Failure.MEMORY, "the GPU's memory does not hold this row, even alone"
        elif isinstance(error, Stalled):
            symptom = "the worker that generates this row gives no sign of life (--stall-timeout)"
        first = lines_of(error)[0]
        told = first if isinstance(error, (VcfBatchError, Stalled)) else named(error, first)
        return cls(failure, symptom, told, node, error, one_task=not isinstance(error, Stalled))


def lines_of(error: Exception) -> list[str]:
    """The lines of an error's message that are not empty; at least one."""
    return [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]


def named(error: Exception, text: str) -> str:
    """An error's class and a text on it, printable and at most :data:`REASON_LENGTH` characters long."""
    told = printable(f"{type(error).__name__}: {text}")
    return told if len(told) <= REASON_LENGTH else told[:REASON_LENGTH] + "..."
