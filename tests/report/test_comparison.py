"""An evaluation as a person sees it: tables and plot."""

import io
import sys

import pytest
from PIL import Image

from vcf_batch.errors import UsageError
from vcf_batch.metrics.bootstrap import Interval
from vcf_batch.report import comparison
from vcf_batch.report.comparison import Line


def line(method: str, strength: float, clip: float, lpips: float, shown: dict[str, Interval]) -> Line:
    values = {"clip_score": clip, "lpips": lpips, "clip_reference": lpips}
    scores = {name: Interval(value, value - 0.01, value + 0.02) for name, value in values.items()}
    relative = dict.fromkeys(comparison.RELATIVE, Interval(0.9, 0.85, 0.95))
    return Line(method, "concat", strength, 64, scores, relative, shown)


SHOWN = {"shape": Interval(0.875, 0.8, 0.95)}
LINES = [
    line("text only", 0.0, 0.29, 0.78, SHOWN),
    line("concat", 0.5, 0.28, 0.77, SHOWN),
    line("concat", 1.0, 0.27, 0.76, SHOWN),
]


def test_the_tables_have_a_line_for_every_method() -> None:
    scores, shown = comparison.tables(LINES).split("\n\n")
    assert scores.splitlines()[2] == (
        "| text only | 0 | 64 | 0.290 [0.280, 0.310] | 90% [85%, 95%] "
        "| 0.780 [0.770, 0.800] | 90% [85%, 95%] | 0.780 [0.770, 0.800] |"
    )
    assert shown.splitlines() == [
        "| method | strength | shape |",
        "| --- | --- | --- |",
        "| text only | 0 | 88% [80%, 95%] |",
        "| concat | 0.5 | 88% [80%, 95%] |",
        "| concat | 1 | 88% [80%, 95%] |",
    ]


def test_what_is_shown_is_left_out_where_nobody_knows_it() -> None:
    assert "\n\n" not in comparison.tables([line("text only", 0.0, 0.29, 0.78, {})])


def test_the_plot_is_the_same_for_the_same_lines() -> None:
    first, again = comparison.plot(LINES), comparison.plot(LINES)
    assert first == again
    assert Image.open(io.BytesIO(first["png"])).width > 1000
    assert b"<svg" in first["svg"]


def test_a_missing_matplotlib_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'vcf-batch\[plots\]'"):
        comparison.require_matplotlib()


def test_a_score_without_interval_has_no_brackets() -> None:
    """The tables and the plot of a single pair give its score alone."""
    alone = {name: Interval(0.25, None, None) for name in comparison.TABLE_SCORES}
    relative = dict.fromkeys(comparison.RELATIVE, Interval(0.9, None, None))
    lines = [Line("text only", "concat", 0.0, 1, alone, relative, {})]
    assert comparison.tables(lines).splitlines()[2] == "| text only | 0 | 1 | 0.250 | 90% | 0.250 | 90% | 0.250 |"
    pytest.importorskip("matplotlib")
    assert Image.open(io.BytesIO(comparison.plot(lines)["png"])).format == "PNG"
