"""Draw the README's figure, kl_against_size.svg, from the measured points in kl_against_size.json.

    python reports/kl_against_size.py                        draw
    python reports/kl_against_size.py PLAN/selection.json    first take the frontier of that plan, then draw

The points come from `dynquant plan --frontier`, whose whole command kl_against_size.json states.
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter

DATA = Path(__file__).with_suffix(".json")
PLANNED = "dynquant, planned from measurement"
SERIES = {
    PLANNED: ("planner", "#d55e00", "o"),
    "one type for all matrices": ("uniform-", "#6b7280", "s"),
    "llama.cpp's mixtures": ("llama-", "#0072b2", "^"),
    "DeepSeek-R1 recipes (1.58 bits and up)": ("r1-", "#009e73", "D"),
}
"""Name -> how the labels of its points begin, colour and marker."""
STYLE = {
    "font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "dynquant",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9ca3af", "axes.labelcolor": "#374151",
    "xtick.color": "#6b7280", "ytick.color": "#6b7280",
}  # fmt: skip


def take_points(selection: Path) -> None:
    """Replace the points by those of a selection.json."""
    document = json.loads(DATA.read_text())
    measured = json.loads(selection.read_text())
    document |= {"text": measured["text"], "tokens": measured["num_tokens"]}
    document["points"] = [
        {key: point[key] for key in ("label", "bytes", "kl", "top1")} for point in measured["frontier"]
    ]
    DATA.write_text(json.dumps(document, indent=1) + "\n")


def draw(document: dict[str, Any]) -> Figure:
    """The measured KL of every point over its bits per weight; a second axis has megabytes."""
    figure = Figure(figsize=(8.4, 4.6), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.set_yscale("log")
    for number, (name, (start, color, marker)) in enumerate(SERIES.items()):
        points = sorted((p for p in document["points"] if p["label"].startswith(start)), key=lambda p: p["bytes"])
        bits = [8 * point["bytes"] / document["weights"] for point in points]
        kl = [point["kl"]["value"] for point in points]
        spread = [
            [point["kl"]["value"] - point["kl"]["low"] for point in points],
            [point["kl"]["high"] - point["kl"]["value"] for point in points],
        ]
        line = {"linestyle": "-", "linewidth": 2.2, "zorder": 3} if name == PLANNED else {"linestyle": "none"}
        axes.errorbar(bits, kl, spread, color=color, marker=marker, markersize=6, elinewidth=1, **line)
        height = 0.94 - 0.065 * number
        axes.plot(0.57, height + 0.012, color=color, marker=marker, markersize=6, transform=axes.transAxes)
        weight = "bold" if name == PLANNED else "normal"
        axes.text(0.59, height, name, color=color, weight=weight, transform=axes.transAxes)
        for point, x, y in zip(points, bits, kl, strict=True):
            if name != PLANNED:
                type_name = point["label"].partition("-")[2].upper()
                offset, side = ((0, 7), "center") if start == "uniform-" else ((7, 3), "left")
                axes.annotate(type_name, (x, y), offset, textcoords="offset points", ha=side, color=color, fontsize=8.5)
    _dress(axes, document)
    return figure


def _dress(axes: Axes, document: dict[str, Any]) -> None:
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("size of the file (bits per weight)")
    axes.set_ylabel("KL to the original (nats per token)")
    ticks = [
        tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2) if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]
    ]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(FixedLocator([]))
    megabytes = document["weights"] / 8e6
    top = axes.secondary_xaxis("top", functions=(lambda bits: bits * megabytes, lambda size: size / megabytes))
    top.set_xlabel("MB")
    title = f"{document['model']}, KL on {document['tokens']:,} tokens of {document['text']}, 95 % intervals"
    axes.set_title(title, fontsize=9, loc="left", color="#374151")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        take_points(Path(sys.argv[1]))
    with rc_context(STYLE):
        draw(json.loads(DATA.read_text())).savefig(DATA.with_suffix(".svg"), metadata={"Date": None})
