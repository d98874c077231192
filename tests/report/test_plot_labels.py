"""The labels of a plot can be read, however near its points are to each other."""

import itertools

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.text import Text

from vcf_batch.report import comparison

CROWDED = [(0.081, 0.367), (0.078, 0.370), (0.077, 0.369), (0.076, 0.365), (0.076, 0.344), (0.075, 0.351)]


def test_labels_cover_neither_each_other_nor_a_point() -> None:
    """Those of five strengths on a hundredth of the axis, beside a point without a label. They stay within the axes."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlim=(0.06, 0.11), ylim=(0.24, 0.40))
    axes.plot(*zip(*CROWDED, strict=True), "o")
    labels = [*zip(["0.01", "0.03", "0.1", "0.3", "1"], CROWDED, strict=False)]
    comparison.place_labels(axes, labels, CROWDED)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(label) for label in axes.texts]
    assert [label.get_text() for label in axes.texts] == [text for text, _ in labels]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert not any(box.contains(*at) for box in boxes for at in axes.transData.transform(CROWDED))
    frame = axes.get_window_extent()
    assert all(frame.contains(*box.min) and frame.contains(*box.max) for box in boxes)


def test_a_label_without_room_is_written_all_the_same() -> None:
    figure = Figure(figsize=(1, 1))
    axes = figure.add_subplot(xlim=(0, 1), ylim=(0, 1))
    comparison.place_labels(axes, [("a label that is wider than all of it", (0.5, 0.5))], [(0.5, 0.5)])
    assert len(axes.texts) == 1
