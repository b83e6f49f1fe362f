"""Placing text beside points so that labels cover neither each other nor the data.

Greedy: for each label the nearest free position of a few dozen around its point. Positions are tested in pixels after
the layout is final, so call this last.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DISTANCES = (7, 14, 24, 38, 56, 78)  # points
_ANGLES = (45, 135, 90, 315, 225, 270, 20, 160, 340, 200)  # degrees


def place_labels(
    axes: "Axes",
    labels: Sequence[tuple[float, float, str]],
    obstacles: Sequence[Sequence[tuple[float, float]]] = (),
    *,
    color: str = "black",
    fontsize: float = 7.5,
) -> None:
    """Write each (x, y, text) near its point with a thin leader; `obstacles` are polylines of drawn data."""
    axes.figure.draw_without_rendering()
    taken: list[tuple[float, float, float, float]] = []
    blocked = _pixels(axes, obstacles, labels)
    for x, y, text in labels:
        annotation = axes.annotate(
            text, (x, y), (0, 0), textcoords="offset points", fontsize=fontsize, color=color,
            annotation_clip=False, zorder=6,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )  # fmt: skip
        annotation.set_in_layout(False)
        offset, align, box = _best(axes, annotation, taken, blocked)
        annotation.set_position(offset)
        annotation.set_ha(align)
        taken.append(box)


def _pixels(axes: "Axes", obstacles: Sequence, labels: Sequence) -> np.ndarray:
    """Display coordinates along every polyline and at every labelled point; [N, 2]."""
    parts = [axes.transData.transform([(x, y) for x, y, _ in labels])] if labels else []
    for line in obstacles:
        points = axes.transData.transform(np.asarray(line, dtype=float).reshape(-1, 2))
        steps = np.linspace(0, 1, 6)[:, None, None]
        if len(points) > 1:
            parts.append((points[:-1] + steps * (points[1:] - points[:-1])).reshape(-1, 2))
        else:
            parts.append(points)
    return np.concatenate(parts) if parts else np.zeros((0, 2))


def _best(axes: "Axes", annotation, taken: list, blocked: np.ndarray) -> tuple:
    """The offset, alignment and pixel box of lowest cost: overlaps first, then leaving the axes, then distance."""
    scale = axes.figure.dpi / 72
    width, height = _text_size(annotation)
    frame = axes.get_window_extent()
    anchor = axes.transData.transform(annotation.xy)
    annotation.set_va("center")
    best = None
    for distance in _DISTANCES:
        for angle in _ANGLES:
            dx, dy = distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))
            align = "left" if dx > 1 else "right" if dx < -1 else "center"
            centre_x, centre_y = anchor[0] + dx * scale, anchor[1] + dy * scale
            left = centre_x - {"left": 0, "right": width, "center": width / 2}[align]
            box = (left, centre_y - height / 2, left + width, centre_y + height / 2)
            cost = 1000 * sum(_overlap(box, other) for other in taken) + 20 * _covered(box, blocked) + distance
            cost += 1000 * _outside(box, frame)
            if best is None or cost < best[0]:
                best = (cost, (dx, dy), align, box)
    return best[1:]


def _text_size(annotation) -> tuple[float, float]:
    """Pixel width and height of the text alone, without its leader."""
    from matplotlib.text import Text

    box = Text.get_window_extent(annotation)
    return box.width + 6, box.height + 4


def _overlap(box: tuple, other: tuple) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def _covered(box: tuple, points: np.ndarray) -> int:
    inside = (points[:, 0] > box[0]) & (points[:, 0] < box[2]) & (points[:, 1] > box[1]) & (points[:, 1] < box[3])
    return int(inside.sum())


def _outside(box: tuple, frame) -> bool:
    return box[0] < frame.x0 or box[2] > frame.x1 or box[1] < frame.y0 or box[3] > frame.y1
