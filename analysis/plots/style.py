"""The look of every plot: palette, header band, number formats, and writing PNG and SVG.

Figures are built with matplotlib's object interface (no pyplot, no window). Colours are Okabe and Ito's, told apart
also by marker and dash. Text is never parsed as mathematics: model and tensor names are not trusted.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dynquant.errors import ExportError
from dynquant.recipes.plan import Plan
from dynquant.storage.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
else:
    Axes = Figure = Line2D = Any  # matplotlib is imported when something is drawn
Drawn = tuple[Figure, str] | None  # figure and headline; None when there is nothing to show

BLACK, GREY, LIGHT = "#000000", "#6b7280", "#e5e7eb"
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"


class Look(NamedTuple):
    """Looks of a series."""

    color: str
    marker: str
    dash: str

    @property
    def line(self) -> dict[str, str]:
        """The look as options of `Axes.plot`."""
        return {"color": self.color, "marker": self.marker, "linestyle": self.dash}


_TYPE_COLOURS = (VERMILION, ORANGE, PURPLE, GREY, GREEN, SKY, BLUE)
TYPE_LOOKS = tuple(map(Look, _TYPE_COLOURS, "vsDo^PX", ("-", "--", "-.", ":", "-", "--", "-.")))
"""Looks of the shown types, fewest bits first: warm is crushed, cool is precise."""
GROUP_COLOURS = {
    "routed gate/up": SKY,
    "routed down": BLUE,
    "shared expert": GREEN,
    "dense FFN": YELLOW,
    "attention": ORANGE,
    "state-space": "#7f3b08",
    "cross-attention": "#8c510a",
    "vision attention": "#1b7837",
    "vision FFN": "#a6dba0",
    "projector": "#762a83",
    "per-layer inputs": "#b2abd2",
    "predicts ahead (MTP)": "#35978f",
    "embedding": PURPLE,
    "per layer embedding": "#dfc27d",
    "output": VERMILION,
    "router/norm/other": GREY,
}
PNG_DPI = 150
_TITLES = {"titlesize": 10, "titleweight": "bold", "titlelocation": "left"}
_SETTINGS = {
    "font": {"size": 9},
    "axes": {"edgecolor": "#9ca3af", "grid": True, "axisbelow": True, **_TITLES},
    "axes.spines": {"top": False, "right": False},
    "grid": {"color": LIGHT, "linewidth": 0.7},
    "legend": {"frameon": False},
    "figure": {"facecolor": "white"},
    "svg": {"fonttype": "none", "hashsalt": "dynquant"},  # text stays text; equal plots are equal files
    "text": {"parse_math": False},  # a `$` in a tensor's name is no formula
}


@dataclass(frozen=True)
class PlotFiles:
    """One plot on disk. `headline` is its title, which also states what it shows (used as alternative text)."""

    png: Path
    svg: Path
    headline: str


@contextmanager
def plot_settings() -> Iterator[None]:
    """Our settings for the figures built inside; the caller's are restored. Raises ExportError: matplotlib is not
    installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ExportError(
            "Plots need matplotlib, which is not installed. Run `pip install 'dynquant-toolchain[report]'`."
        ) from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        for group, settings in _SETTINGS.items():
            matplotlib.rc(group, **settings)
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def plain(text: str, limit: int = 80) -> str:
    """A name as one printable line of at most `limit` characters."""
    line = "".join(char if char.isprintable() else "\ufffd" for char in text)  # names may hold anything
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def plan_title(plan: Plan) -> str:
    """Return model and recipe of a plan, for a subtitle."""
    return f"{plain(plan.model, 60)}, plan “{plain(plan.recipe, 40)}”"


def new_figure(width: float, height: float, headline: str, subtitle: str, *, legend_rows: int = 0) -> Figure:
    """A figure of width x height inches under a header band with headline, subtitle and room for a legend."""
    from matplotlib.figure import Figure

    header = 0.72 + 0.24 * legend_rows
    total = height + header
    figure = Figure(figsize=(width, total), dpi=PNG_DPI)
    figure.set_layout_engine("constrained", rect=(0.008, 0.008, 0.984, height / total - 0.008), h_pad=0.08, w_pad=0.08)
    figure.text(0.15 / width, 1 - 0.12 / total, headline, fontsize=13, fontweight="bold", va="top")
    figure.text(0.15 / width, 1 - 0.40 / total, subtitle, fontsize=9, color=GREY, va="top")
    return figure


def header_legend(figure: Figure, handles: list, columns: int) -> None:
    """A legend in the header band, clear of the data."""
    width, height = figure.get_size_inches()
    place = {"loc": "upper left", "bbox_to_anchor": (0.05 / width, 1 - 0.56 / height)}
    legend = figure.legend(handles=handles, **place, ncols=columns, columnspacing=1.4, handlelength=2.6)
    legend.set_in_layout(False)  # the band has room for it


def legend_line(label: str, **look: Any) -> Line2D:
    """Return a line or marker for a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **look)


def number_axis(axis, *, percent: bool = False) -> None:
    """Plain numbers, or fractions in percent, on a logarithmic axis: one, two and five of each decade as they fit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)  # fewer ticks on a long axis
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    scale, unit = (100, "%") if percent else (1, "")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{short_number(scale * value)}{unit}"))
    axis.set_minor_formatter(NullFormatter())


def layer_axis(axes: Axes, layers: list[int]) -> None:
    """Whole layer numbers from the first to the last layer."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(min(layers) - 0.6, max(layers) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))


def short_number(value: float) -> str:
    """1234567 -> 1.23M; small numbers keep three digits."""
    for limit, divisor, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / divisor:.3g}{suffix}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def size_unit(num_bytes: float) -> tuple[float, str]:
    """Divisor and name of the decimal unit that suits a size."""
    for divisor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if num_bytes >= divisor:
            return divisor, unit
    return 1e3, "kB"


@contextmanager
def _without_minor_ticks(figure: Figure) -> Iterator[None]:
    """Context manager: what is laid out has no minor ticks. They have no labels and are shorter than the others: they
    take no room, but half the time."""
    from matplotlib.ticker import NullLocator

    locators = {axis: axis.get_minor_locator() for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)}
    for axis in locators:
        axis.set_minor_locator(NullLocator())
    try:
        yield
    finally:
        for axis, locator in locators.items():
            axis.set_minor_locator(locator)


def freeze_layout(figure: Figure) -> None:
    """Lay the figure out once and keep it so: what follows reads final pixel positions, and saving is faster."""
    engine = figure.get_layout_engine()
    if engine is not None:
        with _without_minor_ticks(figure):
            engine.execute(figure)
        # "none" would leave a placeholder, for which every save draws the figure once more.
        figure.set_layout_engine(None)


def save_figure(figure: Figure, directory: Path, name: str, headline: str) -> PlotFiles:
    """Write NAME.png (150 dpi) and NAME.svg, each whole or not at all. Raises WriteError: the directory cannot be
    written."""
    files = PlotFiles(directory / f"{name}.png", directory / f"{name}.svg", headline)
    freeze_layout(figure)
    for path, metadata in ((files.png, {"Software": None}), (files.svg, {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=path.suffix[1:], dpi=PNG_DPI, metadata=metadata)  # without date and version
        write_atomically(path, buffer.getvalue())
    return files
