"""Training and held-out loss over the steps of a run."""

from collections.abc import Sequence

from dynquant.analysis.plots import style

Point = tuple[int, float]


def draw_training(
    train: Sequence[Point], held_out: Sequence[Point], *, best_step: int, measure: str, data: str
) -> style.Drawn:
    """Figure and headline. `train` and `held_out` are (step, loss); `measure` names the loss and its unit."""
    from matplotlib.ticker import MaxNLocator

    first, best = held_out[0][1], min(loss for _, loss in held_out)
    headline = f"Held-out loss {first:.4g} to {best:.4g}" if len(held_out) > 1 else f"Held-out loss {first:.4g}"
    figure = style.new_figure(8.0, 4.6, headline, style.plain(f"{measure}; {data}", 100), legend_rows=1)
    axes = figure.add_subplot()
    handles = []
    if train:
        handles += axes.plot(*zip(*train, strict=True), color=style.BLUE, linewidth=1.2, label="training")
    look = {"color": style.VERMILION, "marker": "o", "markersize": 4, "linewidth": 1.4, "label": "held out"}
    handles += axes.plot(*zip(*held_out, strict=True), **look)
    look = {"color": style.GREY, "linestyle": ":", "linewidth": 1.2, "label": "adapter that was kept"}
    handles.append(axes.axvline(best_step, **look))
    axes.set(xlabel="optimizer steps", ylabel=measure)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    style.header_legend(figure, handles, columns=3)
    return figure, headline
