"""What ``benchmarks/gpu.py`` has measured, as a table on stdout and as a JSON file that is whole after every row."""

import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import click

OUT_OF_TIME = "not measured: out of time"
FILE = "gpu.json"
MAX_TRACEBACK = 4000
"""Characters of a traceback that are kept, from its end."""


@dataclass(frozen=True)
class Figure:
    """A row of the table."""

    what: str
    shown: str
    """The value as the table shows it."""
    goal: str = ""
    met: bool | None = None
    """Whether the goal is met; None where there is none."""
    required: bool = False
    """Whether the benchmark fails if the goal is missed."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """What the JSON has besides: numbers by name."""


def below(
    what: str, value: float, limit: float | None, goal: str = "", required: bool = False, **values: Any
) -> Figure:
    """A figure that should be at most ``limit``; NaN misses it.

    Args:
        what: name of the figure.
        value: the figure.
        limit: the largest value that meets the goal; None for a figure without one.
        goal: the goal as the table shows it; empty shows the limit.
        required: see :attr:`Figure.required`.
        values: see :attr:`Figure.values`.
    """
    if limit is None:
        return Figure(what, f"{value:.4g}", values={"value": value, **values})
    return Figure(what, f"{value:.4g}", goal or f"<= {limit:g}", value <= limit, required, {"value": value, **values})


@dataclass(frozen=True)
class Measurement:
    """Work that gives figures, one after the other."""

    name: str
    """Unique name, ``section/part``."""
    work: Callable[[Any], Iterator[Figure]]
    """Takes the models. Taking the next figure does its work."""
    seconds: float
    """Estimated seconds of all but sampling, on one H200."""
    images: float = 0
    """Number of images whose sampling takes the rest of the time."""


class OutOfTime(BaseException):
    """The time is over. It is no ``Exception``, so that nothing within a measurement takes it for a failure."""


class Record:
    """Record of a run.

    Args:
        folder: where the JSON is written, as :data:`FILE`; None writes none.
        about: what the JSON says of the run as a whole.
    """

    def __init__(self, folder: str | None, about: dict[str, Any]) -> None:
        self.about = about
        self.rows: list[dict[str, Any]] = []
        self.failed: list[str] = []
        """Names of the measurements that failed, and of required figures that were missed."""
        self._path = None
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._path = Path(folder) / FILE
        self._write()
        click.echo("| what | goal | measured |\n|---|---|---|")

    def measure(self, measurements: Sequence[Measurement], models: Any, deadline: float) -> None:
        """Do each measurement that fits into the time, in the given order.

        Args:
            measurements: what to measure.
            models: the argument of each work. Its ``estimate`` says how long a measurement takes, in seconds.
            deadline: the end of the time, of :func:`time.monotonic`. A measurement that is not done by then is stopped.
        """
        for measurement in measurements:
            left = deadline - time.monotonic()
            estimate = models.estimate(measurement)
            if estimate > left:
                self._note(measurement, measurement.name, OUT_OF_TIME, estimate=estimate, left=left)
                continue
            self._measure(measurement, models, left)
            free_memory()

    def _measure(self, measurement: Measurement, models: Any, left: float) -> None:
        """Take the figures of one measurement. Its failure, whatever it is, costs no other one."""
        previous = signal.signal(signal.SIGALRM, _stop)
        begin = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3))
        try:
            for figure in measurement.work(models):
                taken, begin = time.monotonic() - begin, time.monotonic()
                self._add(measurement, figure, taken)
        except OutOfTime:
            self._note(measurement, f"the rest of {measurement.name}", OUT_OF_TIME, seconds=time.monotonic() - begin)
        except Exception as error:
            message = " ".join(f"{type(error).__name__}: {error}".split())
            trace = traceback.format_exc()
            self.failed.append(measurement.name)
            self._note(
                measurement,
                f"the rest of {measurement.name}",
                f"failed: {message[:200]}",
                seconds=time.monotonic() - begin,
                error=trace[-MAX_TRACEBACK:],
            )
            click.echo(trace, err=True)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)

    def _add(self, measurement: Measurement, figure: Figure, seconds: float) -> None:
        if figure.required and figure.met is False:
            self.failed.append(figure.what)
        missed = " (missed)" if figure.required and figure.met is False else ""
        click.echo(f"| {figure.what} | {figure.goal} | {figure.shown}{missed} |")
        self._append(measurement, asdict(figure) | {"seconds": seconds, "error": None})

    def _note(self, measurement: Measurement, what: str, shown: str, **more: Any) -> None:
        click.echo(f"| {what} | | {shown.replace('|', '/')} |")
        self._append(measurement, {"what": what, "shown": shown, "error": None, **more})

    def _append(self, measurement: Measurement, row: dict[str, Any]) -> None:
        self.rows.append({"measurement": measurement.name, **row})
        sys.stdout.flush()
        self._write()

    def _write(self) -> None:
        """Replace the file as a whole, so that a reader or a sudden end never meets a half."""
        if self._path is None:
            return
        document = {**self.about, "failed": self.failed, "rows": self.rows}
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(document, indent=1, default=str))
        os.replace(new, self._path)


def free_memory() -> None:
    """Give the device's memory back that a measurement, or its failure, has left behind."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:  # after a fault of the device every call fails, and each row will say so
            click.echo(f"the device's memory cannot be freed: {error}", err=True)


def _stop(number: int, frame: FrameType | None) -> None:
    raise OutOfTime
