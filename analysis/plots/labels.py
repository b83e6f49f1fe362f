"""Placing text beside points so that labels cover neither each other nor the data.

Greedy: for each label the nearest free position of a few dozen around its point. Positions are tested in pixels, so
this freezes the figure's layout; call it after everything else is drawn.
"""

import math
from collections.abc import Sequence
from itertools import pairwise, product
from typing import TYPE_CHECKING

import numpy as np

from dynquant.analysis.plots.style import freeze_layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DISTANCES = (0, 7, 17, 31, 49, 71, 100)  # points beyond the clearance
_SAMPLING = 6.0  # pixels between tested points along a line
_ANGLES = (45, 135, 90, 20, 160, 70, 110, 0, 180, 315, 225, 270, 340, 200)  # degrees
_OUTSIDE, _OVERLAP, _AMBIGUOUS, _CROSSED, _BELOW, _COVERED = 100_000, 10_000, 200, 150, 60, 20
"""Costs of the faults of a position; a point of distance costs 1."""


def place_labels(
    axes: "Axes",
    labels: Sequence[tuple[float, float, str]],
    obstacles: Sequence[Sequence[tuple[float, float]]] = (),
    *,
    color: str = "black",
    fontsize: float = 7.5,
    clearance: float = 7.0,
) -> None:
    """Write each (x, y, text) near its point with a thin leader.

    Args:
        axes: Where the points lie.
        labels: Data coordinates and text.
        obstacles: Polylines of drawn data, in data coordinates.
        color: Of text and leader.
        fontsize: In points.
        clearance: Least distance between point and text, in points: more for large markers.
    """
    freeze_layout(axes.figure)
    taken: list[tuple[float, float, float, float]] = []
    if not labels:
        return
    anchors = axes.transData.transform([(x, y) for x, y, _ in labels])
    blocked = _pixels(axes, obstacles, anchors)
    for x, y, text in labels:
        annotation = axes.annotate(
            text, (x, y), (0, 0), textcoords="offset points", fontsize=fontsize, color=color,
            annotation_clip=False, zorder=6,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )  # fmt: skip
        annotation.set_in_layout(False)
        offset, align, box = _best(axes, annotation, taken, blocked, anchors, clearance)
        annotation.set_position(offset)
        annotation.set_ha(align)
        taken.append(box)
        blocked = np.concatenate([blocked, _leader(axes.transData.transform((x, y)), box)])


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


def _best(axes: "Axes", annotation, taken: list, blocked: np.ndarray, anchors: np.ndarray, clearance: float) -> tuple:
    """The offset, alignment and pixel box of lowest cost."""
    scale = axes.figure.dpi / 72
    width, height = _text_size(annotation)
    frame = axes.get_window_extent()
    anchor = axes.transData.transform(annotation.xy)
    annotation.set_va("center")
    best = None
    for distance, angle in product(_DISTANCES, _ANGLES):
        dx, dy = _offset(clearance + distance, angle)
        align = "left" if dx > 1 else "right" if dx < -1 else "center"
        centre_y = anchor[1] + dy * scale + (height / 2 if dy > 1 else -height / 2 if dy < -1 else 0)
        left = anchor[0] + dx * scale - {"left": 0, "right": width, "center": width / 2}[align]
        box = (left, centre_y - height / 2, left + width, centre_y + height / 2)
        cost = distance + _BELOW * (dy < -1) + _COVERED * _count_inside(box, blocked)
        cost += _AMBIGUOUS * _is_nearer_to_others(box, anchor, anchors) + _OUTSIDE * _is_outside(box, frame)
        cost += sum(_OVERLAP * _overlap(box, other) for other in taken)
        cost += sum(_CROSSED * _count_inside(other, _leader(anchor, box)) for other in taken)
        if best is None or cost < best[0]:
            best = (cost, (dx, (centre_y - anchor[1]) / scale), align, box)
    return best[1:]


def _leader(anchor: np.ndarray, box: tuple) -> np.ndarray:
    """Points along the line from a point to the middle of its label; [N, 2] pixels."""
    middle = np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])
    return anchor + np.linspace(0, 1, 12)[:, None] * (middle - anchor)


def _offset(distance: float, angle: float) -> tuple[float, float]:
    return distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))


def _text_size(annotation) -> tuple[float, float]:
    """Pixel width and height of the text alone, without its leader."""
    from matplotlib.text import Text

    box = Text.get_window_extent(annotation)
    return box.width + 6, box.height + 4


def _overlap(box: tuple, other: tuple) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def _count_inside(box: tuple, points: np.ndarray) -> int:
    inside = (points[:, 0] > box[0]) & (points[:, 0] < box[2]) & (points[:, 1] > box[1]) & (points[:, 1] < box[3])
    return int(inside.sum())


def _is_outside(box: tuple, frame) -> bool:
    return box[0] < frame.x0 or box[2] > frame.x1 or box[1] < frame.y0 or box[3] > frame.y1


def _is_nearer_to_others(box: tuple, anchor: np.ndarray, anchors: np.ndarray) -> bool:
    """Return whether a label here would seem to belong to another labelled point."""

    def distance(points: np.ndarray) -> np.ndarray:
        dx = np.maximum(0, np.maximum(box[0] - points[..., 0], points[..., 0] - box[2]))
        dy = np.maximum(0, np.maximum(box[1] - points[..., 1], points[..., 1] - box[3]))
        return np.hypot(dx, dy)

    return bool((distance(anchors) < distance(anchor) - 0.5).any())
