"""The measured frontier: file size against KL and top-1 agreement of the planner and of fixed recipes."""

from typing import TYPE_CHECKING

from dynquant.analysis.plots.style import (
    BLUE,
    GREEN,
    GREY,
    VERMILION,
    header_legend,
    new_figure,
    number_axis,
    plain,
    size_unit,
)
from dynquant.evaluation.statistics import Estimate
from dynquant.planning.selection import Candidate, Selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLANNER = "planner"
_LOOKS = {
    PLANNER: (VERMILION, "o", "-"),
    "one type for every matrix": (GREY, "s", ":"),
    "llama.cpp mixture": (BLUE, "^", "--"),
    "R1 recipe": (GREEN, "D", "none"),
}


def draw_measured_frontier(selection: Selection) -> tuple["Figure", str] | None:
    """Figure and headline; None when no frontier was measured."""
    points = [one for one in selection.frontier if one.kl and one.top1]
    if not points:
        return None
    divisor, unit = size_unit(max(one.bytes for one in points))
    headline = _headline(points)
    text = f"on {selection.num_tokens:,} tokens of {plain(selection.text, 60)}; bars are 95 % intervals"
    figure = new_figure(11, 5.2, headline, text, legend_rows=1)
    left, right = figure.subplots(1, 2)
    series = {name: sorted(_of_kind(points, name), key=lambda one: one.bytes) for name in _LOOKS}
    handles = []
    for name, found in series.items():
        if found:
            sizes = [one.bytes / divisor for one in found]
            handles.append(_draw(left, name, sizes, [one.kl for one in found], 1))
            _draw(right, name, sizes, [one.top1 for one in found], 100)
    left.set_yscale("log")
    number_axis(left.yaxis)
    left.set_ylabel("KL to the original (nats per token)")
    right.set_ylabel("same top token (%)")
    for axes in (left, right):
        axes.set_xlabel(f"file size ({unit})")
    header_legend(figure, handles, columns=4)
    return figure, headline


def kind_of(label: str) -> str:
    """The series that a point belongs to."""
    kinds = {"uniform": "one type for every matrix", "llama": "llama.cpp mixture", "r1": "R1 recipe"}
    return next((kind for start, kind in kinds.items() if label.startswith(start)), PLANNER)


def _of_kind(points: list[Candidate], kind: str) -> list[Candidate]:
    return [one for one in points if kind_of(one.label) == kind]


def _headline(points: list[Candidate]) -> str:
    planned = _of_kind(points, PLANNER)
    beaten = [
        one for one in points
        if one not in planned and any(p.bytes <= one.bytes and p.kl.value < one.kl.value for p in planned)
    ]  # fmt: skip
    fixed = len(points) - len(planned)
    return f"Measured frontier: planned files are no larger and better than {len(beaten)} of {fixed} fixed recipes"


def _draw(axes: "Axes", name: str, sizes: list[float], values: list[Estimate], scale: float):
    color, marker, dash = _LOOKS[name]
    spread = [[scale * (one.value - one.low) for one in values], [scale * (one.high - one.value) for one in values]]
    return axes.errorbar(
        sizes, [scale * one.value for one in values], yerr=spread, color=color, marker=marker, markersize=5,
        linestyle=dash, linewidth=1.2, elinewidth=0.8, label=name,
    )  # fmt: skip
