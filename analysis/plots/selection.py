"""Predicted against measured KL of the candidate plans, and of the plans drawn around the chosen one."""

from typing import TYPE_CHECKING

import numpy as np

from dynquant.analysis.plots.style import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    VERMILION,
    header_legend,
    new_figure,
    number_axis,
    plain,
)
from dynquant.planning.selection import Candidate, Selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CHOSEN, _CANDIDATE, _DRAWN, _FIT = "chosen plan", "other candidates", "plans drawn around it", "fit"


def draw_selection(selection: Selection) -> tuple["Figure", str] | None:
    """Figure and headline; None when nothing was measured."""
    others = [one for i, one in enumerate(selection.candidates) if one.kl and i != selection.chosen]
    chosen = [selection.winner] if selection.winner.kl else []
    drawn = [one for one in selection.checked if one.kl]
    if not chosen and not drawn:
        return None
    headline = _headline(selection)
    text = f"KL on {selection.num_tokens:,} tokens of {plain(selection.text, 60)}; bars are 95 % intervals"
    figure = new_figure(8.5, 5.6, headline, text, legend_rows=1)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    looks = {_DRAWN: (drawn, GREY, "o", 4), _CANDIDATE: (others, BLUE, "s", 6), _CHOSEN: (chosen, VERMILION, "*", 15)}
    handles = [_scatter(axes, name, *look) for name, look in looks.items() if look[0]]
    if selection.fit is not None:
        handles.append(_draw_fit(axes, selection, drawn))
    for one in [*others, *chosen]:
        axes.annotate(
            one.label, (one.predicted_kl, one.kl.value), xytext=(7, 4), textcoords="offset points", fontsize=8
        )
    axes.set_xlabel("predicted KL: prices added up (nats per token)")
    axes.set_ylabel("measured KL (nats per token)")
    number_axis(axes.xaxis)
    number_axis(axes.yaxis)
    axes.margins(x=0.15, y=0.12)
    header_legend(figure, handles, columns=4)
    return figure, headline


def _headline(selection: Selection) -> str:
    if selection.rank_correlation is not None:
        rho = selection.rank_correlation
        return f"Selection: predictions rank {len(selection.checked)} plans with Spearman {rho.value:.2f}"
    kls = sorted(one.kl.value for one in selection.candidates if one.kl)
    if len(kls) < 2:
        return "Selection: one plan"
    return f"Selection: {selection.winner.label} has the lowest KL of {len(kls)} plans"


def _scatter(axes: "Axes", name: str, found: list[Candidate], color: str, marker: str, size: float):
    y = np.array([one.kl.value for one in found])
    spread = np.array([[one.kl.value - one.kl.low, one.kl.high - one.kl.value] for one in found]).T
    return axes.errorbar(
        [one.predicted_kl for one in found], y, yerr=spread, color=color, marker=marker, markersize=size,
        linestyle="none", elinewidth=0.8, markeredgecolor=BLACK, markeredgewidth=0.4, label=name,
    )  # fmt: skip


def _draw_fit(axes: "Axes", selection: Selection, drawn: list[Candidate]):
    x = np.array(sorted(one.predicted_kl for one in drawn))
    y = np.array([selection.fit.predicted(value)[0] for value in x])
    (line,) = axes.plot(x, y, color=ORANGE, linewidth=1.2, label=_FIT)
    return line
