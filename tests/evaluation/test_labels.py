"""Names are apart from each other and inside the picture, also where points are crowded."""

from itertools import combinations

import pytest

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from megatron_lowbit.evaluation.labels import label


def boxes(points):
    figure = Figure((6, 5))
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.plot(*zip(*points), "o")
    canvas.draw()
    label(axis, [(x, y, f"int{i}:g128:sym") for i, (x, y) in enumerate(points)], points, "black", "white")
    canvas.draw()
    found = [note for note in axis.texts if note.get_text()]
    return axis, [Text.get_window_extent(note) for note in found], {note.get_text() for note in found}


def test_crowded_points_have_names_apart():
    points = [(x + 0.02 * y, y) for x in (0, 1) for y in range(8)] + [(0.0, 0.1), (0.01, 0.05), (0.02, 0.12)]
    axis, found, names = boxes(points)
    assert len(found) == len(points) == len(names)
    assert not any(one.shrunk(0.98, 0.98).overlaps(other.shrunk(0.98, 0.98)) for one, other in combinations(found, 2))
    inside = axis.get_window_extent().padded(1)
    assert all(inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1) for box in found)


def test_the_same_points_are_named_the_same_way():
    points = [(0, 0), (0.1, 0), (0, 0.1), (1, 1)]
    assert [box.bounds for box in boxes(points)[1]] == [box.bounds for box in boxes(points)[1]]
