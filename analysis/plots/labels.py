"""Placing text beside points so that labels cover neither each other nor the data.

Greedy: for each label the nearest free position of a few dozen around its point. Positions are tested in pixels, so
this freezes the figure's layout; call it after everything else is drawn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import TYPE_CHECKING

import numpy as np

from dynquant.analysis.plots.style import freeze_layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

Label = tuple[float, float, str]  # x, y, text
Line = Sequence[tuple[float, float]]
_DISTANCES = (0, 7, 17, 31, 49, 71, 100)  # points beyond the clearance
_SAMPLING = 6.0  # pixels between tested points along a line
_ANGLES = (45, 135, 90, 20, 160, 70, 110, 0, 180, 315, 225, 270, 340, 200)  # degrees
_OUTSIDE, _OVERLAP, _AMBIGUOUS, _CROSSED, _BELOW, _COVERED = 100_000, 10_000, 200, 150, 60, 20
"""Costs of the faults of a position; a point of distance costs 1."""


def place_labels(
    axes: "Axes", labels: Sequence[Label], obstacles: Sequence[Line] = (), *, color="black", fontsize=7.5, clearance=7.0
) -> None:
    """Write each label, in data coordinates as the polylines `obstacles`, near its point with a thin leader.

    `clearance` is the least distance between point and text, in points: more for large markers.
    """
    freeze_layout(axes.figure)
    if not labels:
        return
    anchors = axes.transData.transform([(x, y) for x, y, _ in labels])
    blocked = _pixels(axes, obstacles, anchors)
    taken: list[Bbox] = []
    for (x, y, text), anchor in zip(labels, anchors, strict=True):
        annotation = axes.annotate(
            text, (x, y), (0, 0), textcoords="offset points", va="center", fontsize=fontsize, color=color,
            annotation_clip=False, zorder=6,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )  # fmt: skip
        annotation.set_in_layout(False)
        position = min(_positions(axes, annotation, anchor, clearance), key=lambda p: _cost(p, taken, blocked, anchors))
        annotation.set_position(position.offset)
        annotation.set_ha(position.align)
        taken.append(position.box)
        blocked = np.concatenate([blocked, position.leader])


@dataclass(frozen=True)
class _Position:
    """Place where a label may stand: `offset` in points, `box` and `leader` [N, 2] in pixels."""

    offset: tuple[float, float]
    align: str
    box: "Bbox"
    leader: np.ndarray
    fault: float


def _pixels(axes: "Axes", obstacles: Sequence, anchors: np.ndarray) -> np.ndarray:
    """Display coordinates along every polyline and at every labelled point; [N, 2]."""
    parts = [anchors]
    for line in obstacles:
        points = axes.transData.transform(np.asarray(line, dtype=float).reshape(-1, 2))
        parts.append(points[:1])
        for start, end in pairwise(points):
            steps = np.linspace(0, 1, 2 + int(np.hypot(*(end - start)) / _SAMPLING))[1:, None]
            parts.append(start + steps * (end - start))
    return np.concatenate(parts)


def _positions(axes: "Axes", annotation, anchor: np.ndarray, clearance: float) -> Iterator[_Position]:
    """Yield the positions around a point at `anchor` pixels, the nearest first."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    scale, frame = axes.figure.dpi / 72, axes.get_window_extent()
    text = Text.get_window_extent(annotation)  # the text alone, without its leader
    width, height = text.width + 6, text.height + 4
    for distance, angle in product(_DISTANCES, np.radians(_ANGLES)):
        dx, dy = (clearance + distance) * np.cos(angle), (clearance + distance) * np.sin(angle)
        align = "left" if dx > 1 else "right" if dx < -1 else "center"
        left = anchor[0] + dx * scale - {"left": 0, "right": width, "center": width / 2}[align]
        middle = anchor[1] + dy * scale + (height / 2 if dy > 1 else -height / 2 if dy < -1 else 0)
        box = Bbox.from_bounds(left, middle - height / 2, width, height)
        is_outside = (box.min < frame.min).any() or (box.max > frame.max).any()
        leader = anchor + np.linspace(0, 1, 12)[:, None] * (np.array([left + width / 2, middle]) - anchor)
        fault = distance + _BELOW * (dy < -1) + _OUTSIDE * is_outside
        yield _Position((dx, (middle - anchor[1]) / scale), align, box, leader, fault)


def _cost(position: _Position, taken: Sequence["Bbox"], blocked: np.ndarray, anchors: np.ndarray) -> float:
    """Add the faults of a position among other labels, drawn data and other labelled points."""
    box = position.box
    places = (anchors, position.leader[:1])
    gaps = [np.hypot(*np.maximum(0, np.maximum(box.min - points, points - box.max)).T) for points in places]
    # A label that is nearer to another labelled point would seem to belong to that one.
    cost = position.fault + _AMBIGUOUS * bool(gaps[0].min() < gaps[1][0] - 0.5) + _COVERED * box.count_contains(blocked)
    return cost + sum(_OVERLAP * box.overlaps(o) + _CROSSED * o.count_contains(position.leader) for o in taken)
