"""Names beside the points of a plot, moved apart so that they can be read.

Greedy: one point after another takes the place around it that covers the fewest names and points and is nearest. Not
the best arrangement there is, but the same one every time, and good for a few dozen names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

DISTANCES = (7, 16, 28, 42, 58)  # of a name from its point, in typographic points
DIRECTIONS = ((1, 0.6), (1, -0.6), (-1, 0.6), (-1, -0.6), (0.2, 1), (0.2, -1), (-0.2, 1), (-0.2, -1))
FAR = 10  # from here on a line leads to the name
CROWD = 8  # points; covering more of them is no worse, and never as bad as covering a name
NAME, POINT, OUTSIDE = 100.0, 5.0, 200.0  # what covering one costs, beside the distance in units of the nearest


def label(
    axis: Axes, names: Sequence[tuple[float, float, str]], points: Sequence[tuple[float, float]], ink: str, paper: str
) -> None:
    """Write each name (x, y, text) near its place. points: all that are drawn, (x, y). Coordinates are the data's.

    ink, paper: colours of the names and of what is behind them.

    The axes must have their final place and limits: draw the figure before, and keep its layout afterwards.
    """
    dots = axis.transData.transform(list(points)) if points else []
    inside, taken = axis.get_window_extent(), []
    behind = {"facecolor": paper, "edgecolor": "none", "alpha": 0.75, "pad": 0.5}
    look = {"textcoords": "offset points", "fontsize": "small", "color": ink, "zorder": 5, "bbox": behind}
    line = {"arrowstyle": "-", "color": ink, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3}
    for x, y, text in sorted(names, key=lambda name: (name[1], name[0])):
        note = axis.annotate(text, (x, y), (0, 0), **look)
        _, _, offset = min(
            (_cost(_box(note, axis, offset), dots, taken, inside) + offset[2] / DISTANCES[0], index, offset)
            for index, offset in enumerate(_offsets())
        )
        taken.append(_box(note, axis, offset))
        if offset[2] > FAR:
            note.remove()  # a line cannot be added to a name that is there
            axis.annotate(
                text, (x, y), note.get_position(), ha=note.get_ha(), va=note.get_va(), arrowprops=line, **look
            )


def _offsets() -> list[tuple[float, float, float]]:
    return [(dx, dy, distance) for distance in DISTANCES for dx, dy in DIRECTIONS]


def _place(note, offset: tuple[float, float, float]) -> None:
    dx, dy, distance = offset
    note.set_position((dx * distance, dy * distance))
    note.set(ha="left" if dx > 0 else "right", va="bottom" if dy > 0 else "top")


def _box(note, axis: Axes, offset: tuple[float, float, float]) -> Bbox:
    _place(note, offset)
    return note.get_window_extent(axis.figure.canvas.get_renderer()).padded(2)


def _cost(box: Bbox, dots, taken: Sequence[Bbox], inside: Bbox) -> float:
    covered = min(CROWD, sum(box.contains(*dot) for dot in dots))
    beyond = not (inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1)
    return NAME * box.count_overlaps(taken) + POINT * covered + OUTSIDE * beyond
