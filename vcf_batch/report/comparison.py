"""Presentation of an evaluation: Markdown tables, and a plot of the prompt's score against the reference's."""

import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vcf_batch.errors import UsageError
from vcf_batch.metrics.bootstrap import Interval

TABLE_SCORES = {
    "clip_score": "CLIP score (up)",
    "lpips": "LPIPS to reference (down)",
    "clip_reference": "CLIP to reference (up)",
}
"""Columns of the table of scores, with their headings."""

RELATIVE = ("clip_score", "lpips")
"""Scores that the tables also give relative to text only. ``clip_reference`` is not among them: it is near 0 for text
only, so a ratio means nothing."""

Point = tuple[float, float]

_DISTANCES = (11, 17, 24, 34, 46)
"""Distances of a label's centre from its point, in points of print. The nearest one with room is taken."""

_ANGLES = (90, 135, 45, 180, 0, 225, 315, 270)
"""Directions from a point to its label, in degrees. The first one with room is taken."""

_LEADER = 12
"""Distance beyond which a line joins a label with its point."""

_MARKER = 10
"""Width that is left free for a point's marker, in points of print."""


@dataclass(frozen=True, slots=True)
class Line:
    """Results of one method: a line of the tables."""

    method: str
    fusion: str
    strength: float
    samples: int
    scores: Mapping[str, Interval]
    """Mean of each of :data:`TABLE_SCORES`."""
    relative: Mapping[str, Interval]
    """Each of :data:`RELATIVE` over its value for text only on the same prompts, references and seeds."""
    shown: Mapping[str, Interval]
    """For each attribute, the share of samples that show its wanted value; empty if no attribute is known."""


def tables(lines: Sequence[Line]) -> str:
    """The lines as Markdown tables: scores, then the shown attributes, if any are known."""
    columns = ["samples"]
    for name, title in TABLE_SCORES.items():
        columns += [title, "of text only"] if name in RELATIVE else [title]

    def cells(line: Line) -> Iterator[str]:
        yield str(line.samples)
        for name in TABLE_SCORES:
            yield _cell(line.scores[name], "{:.3f}")
            if name in RELATIVE:
                yield _cell(line.relative[name], "{:.0%}")

    parts = [_table(columns, lines, cells)]
    if names := list(lines[0].shown):
        parts.append(_table(names, lines, lambda line: (_cell(line.shown[name], "{:.0%}") for name in names)))
    return "\n\n".join(parts)


def _table(columns: Sequence[str], lines: Sequence[Line], cells: Callable[[Line], Iterable[str]]) -> str:
    rows = [["method", "strength", *columns], ["---"] * (2 + len(columns))]
    rows += [[line.method, f"{line.strength:g}", *cells(line)] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(interval: Interval, form: str) -> str:
    value = form.format(interval.value)
    if interval.low is None or interval.high is None:
        return value
    return f"{value} [{form.format(interval.low)}, {form.format(interval.high)}]"


def require_matplotlib() -> None:
    """Check that matplotlib is installed, before the work and not after it.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("the trade-off plot needs matplotlib: pip install 'vcf-batch[plots]'") from error


def plot(lines: Sequence[Line]) -> dict[str, bytes]:
    """Plot of CLIP score against LPIPS with their intervals, as ``png`` and ``svg`` files.

    Points of one method, such as the strengths of ``concat``, are joined. The same lines give the same bytes.
    """
    from matplotlib import rc_context  # an optional dependency
    from matplotlib.figure import Figure

    methods: dict[str, list[Line]] = {}
    for line in lines:
        methods.setdefault(line.method, []).append(line)
    with rc_context({"svg.hashsalt": "vcf-batch", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="LPIPS to the reference (left is closer)", ylabel="CLIP score with the prompt")
        points: list[tuple[float, float]] = []
        labels: list[tuple[str, tuple[float, float]]] = []
        for method, own in methods.items():
            (x, x_errors), (y, y_errors) = _values(own, "lpips"), _values(own, "clip_score")
            axes.errorbar(x, y, xerr=x_errors, yerr=y_errors, fmt="o-", elinewidth=0.7, label=method)
            here = [*zip(x, y, strict=True)]
            points += here
            labels += [(f"{line.strength:g}", at) for line, at in zip(own, here, strict=True)] if len(own) > 1 else []
        figure.legend(loc="outside right upper", frameon=False)
        place_labels(axes, labels, points)
        return {"png": _file(figure, "png"), "svg": _file(figure, "svg")}


def place_labels(axes: Any, labels: Sequence[tuple[str, Point]], points: Sequence[Point]) -> None:
    """Write the labels of points. A label that finds no room stands at the last place that was tried.

    Args:
        axes: axes of matplotlib, with all else in their figure drawn, as the layout is measured.
        labels: texts, each with its point.
        points: all points that no label may cover, in units of the axes.
    """
    from matplotlib.patheffects import withStroke  # an optional dependency

    axes.figure.draw_without_rendering()
    scale, frame = axes.figure.dpi / 72, axes.get_window_extent()
    taken = [_box(at, (_MARKER * scale, _MARKER * scale)) for at in axes.transData.transform(points)]
    for text, point in labels:
        at, size = axes.transData.transform(point), _size(axes, text)
        for distance, angle in itertools.product(_DISTANCES, map(math.radians, _ANGLES)):
            shift = distance * math.cos(angle), distance * math.sin(angle)
            box = _box((at[0] + scale * shift[0], at[1] + scale * shift[1]), size)
            if frame.contains(*box.min) and frame.contains(*box.max) and not any(map(box.overlaps, taken)):
                break
        taken.append(box)
        leader = {"arrowstyle": "-", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3} if distance > _LEADER else None
        label = axes.annotate(
            text, point, shift, textcoords="offset points", size=8, ha="center", va="center", arrowprops=leader
        )
        label.set(path_effects=[withStroke(linewidth=2, foreground="white")], in_layout=False, zorder=10)


def _size(axes: Any, text: str) -> Point:
    """Width and height of a label, in pixels."""
    label = axes.text(0, 0, text, size=8)
    size = label.get_window_extent().size
    label.remove()
    return float(size[0]), float(size[1])


def _box(centre: Point, size: Point) -> Any:
    from matplotlib.transforms import Bbox

    (x, y), (width, height) = centre, size
    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)


def _values(lines: Sequence[Line], score: str) -> tuple[list[float], list[list[float]]]:
    """A score of each line, and the lengths of its interval below and above it, which are 0 where there is none."""
    intervals = [line.scores[score] for line in lines]
    below = [0.0 if i.low is None else i.value - i.low for i in intervals]
    above = [0.0 if i.high is None else i.high - i.value for i in intervals]
    return [i.value for i in intervals], [below, above]


def _file(figure: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()
