"""SIGINT and SIGTERM in a process of the command line, from its first line of Python to its last.

``__main__`` calls :func:`install` before anything heavy is imported, and :func:`finish` once the exit code is known.
In between, the first signal raises KeyboardInterrupt, and the second one ends the process at once. In an import, where
modules swallow or print what is raised, the first signal ends the process at once too: nothing is held there, because a
run has handlers of its own (:mod:`vcf_batch.pool.signals`). After :func:`done`, the first signal is ignored: little is
left to do. After :func:`finish`, a signal only hurries the end. So the code of a finished command does not change.
"""

import atexit
import contextlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

_installed = False
_done = False
_received: int | None = None
_code: int | None = None


def install() -> None:
    """Install the handlers of this process. Call it once, in the main thread."""
    global _installed
    _installed = True
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _receive)
    # What is registered first runs last: after it, Python would give signals their default back.
    atexit.register(_leave)


def is_installed() -> bool:
    """Whether this is a process of the command line, whose handlers are those of this module."""
    return _installed


def code() -> int:
    """The exit code of a process that was interrupted: that of the first signal, of Ctrl-C where none is known."""
    return 128 + (signal.SIGINT if _received is None else _received)


def is_interrupted() -> bool:
    """Whether a signal has arrived."""
    return _received is not None


def done() -> None:
    """Note that a command has done its work, and only prints its result: the first signal no longer changes its end."""
    global _done
    _done = _installed


def finish(exit_code: int) -> None:
    """Settle the exit code. From here on, a signal ends the process at once, with this code."""
    global _code
    _code = exit_code


def in_import(frame: FrameType | None) -> bool:
    """Whether a stack of frames is within an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def at_once(exit_code: int, line: str) -> NoReturn:
    """End the process without any cleaning up, with a line on standard error."""
    # Not sys.stderr: the signal may have come in the middle of its writing.
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())
    os._exit(exit_code)


def _receive(number: int, frame: FrameType | None) -> None:
    global _received
    _leave()
    if _received is not None:
        at_once(128 + number, "Interrupted again, and stopped at once.")
    _received = number
    if _done:
        return
    if in_import(frame):
        at_once(128 + number, "Interrupted.")
    raise KeyboardInterrupt


def _leave() -> None:
    """End the process with its exit code, if that is known."""
    if _code is None:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(_code)
