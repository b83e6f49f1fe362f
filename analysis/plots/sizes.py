"""Distribution of the bytes: size by role against a 16-bit file, and bits per weight of each role."""

from dataclasses import dataclass
from math import prod

from dynquant.analysis.plots import style
from dynquant.analysis.plots.groups import bits_of, role_group
from dynquant.recipes.plan import Plan
from dynquant.resources import human_bytes

BYTES_16_BIT = 2


@dataclass(frozen=True)
class RoleSize:
    """One line of the size table: bytes in the plan and in a 16-bit file, and bits per weight."""

    group: str
    num_weights: int
    bytes: int
    bits_per_weight: float

    @property
    def original_bytes(self) -> int:
        return BYTES_16_BIT * self.num_weights


def role_sizes(plan: Plan) -> list[RoleSize]:
    """Sizes of the role groups that the plan holds, in a fixed order."""
    sizes = []
    for group in style.GROUP_COLOURS:
        entries = [entry for entry in plan.entries if role_group(entry.role) == group]
        weights = sum(prod(entry.shape) for entry in entries)
        if entries:
            sizes.append(RoleSize(group, weights, sum(entry.bytes for entry in entries), bits_of(entries)))
    return sizes


def draw_size_breakdown(plan: Plan) -> style.Drawn:
    """Figure and headline: both files to scale above, share of weights against share of bytes per role below."""
    sizes = role_sizes(plan)
    original = sum(size.original_bytes for size in sizes)
    headline = (
        f"Size: {human_bytes(plan.predicted_bytes)}, {100 * plan.predicted_bytes / original:.1f}% of the 16-bit file, "
        f"{plan.bits_per_weight:.2f} bits per weight"
    )
    figure = style.new_figure(11.5, 1.9 + 0.5 * len(sizes), headline, style.plan_title(plan))
    upper, lower = figure.subplots(2, 1, height_ratios=[1.4, 0.5 * len(sizes)])
    _draw_scale(upper, sizes, original)
    _draw_roles(lower, sizes)
    return figure, headline


def _draw_scale(axes: style.Axes, sizes: list[RoleSize], original: int) -> None:
    divisor, unit = style.size_unit(original)
    for place, part, total in ((1, "original_bytes", original), (0, "bytes", sum(size.bytes for size in sizes))):
        start = 0.0
        for size in sizes:
            width = getattr(size, part) / divisor
            axes.barh(place, width, left=start, color=style.GROUP_COLOURS[size.group], edgecolor="white", linewidth=0.6)
            start += width
        look = {"textcoords": "offset points", "va": "center", "fontweight": "bold"}
        axes.annotate(human_bytes(total), (start, place), (4, 0), **look)
    axes.set_yticks([1, 0], ["16-bit original", "this plan"])
    axes.set_xlim(0, 1.12 * original / divisor)
    axes.set_xlabel(f"tensor bytes ({unit}), colours as below")
    axes.grid(axis="y", visible=False)


def _draw_roles(axes: style.Axes, sizes: list[RoleSize]) -> None:
    weights, total = sum(size.num_weights for size in sizes), sum(size.bytes for size in sizes)
    places = list(range(len(sizes)))[::-1]  # the first on top
    for place, size in zip(places, sizes, strict=True):
        color = style.GROUP_COLOURS[size.group]
        share, weight_share = 100 * size.bytes / total, 100 * size.num_weights / weights
        axes.barh(place + 0.19, share, height=0.36, color=color, edgecolor="#374151", linewidth=0.5)
        hatched = {"facecolor": "white", "edgecolor": "#9ca3af", "hatch": "////", "linewidth": 0.5}
        axes.barh(place - 0.19, weight_share, height=0.36, **hatched)
        text = (
            f"{size.bits_per_weight:.2f} bits/weight · {human_bytes(size.bytes)} · "
            f"{_percent(share)} of bytes, {_percent(weight_share)} of weights"
        )
        look = {"textcoords": "offset points", "va": "center", "fontsize": 8.5}
        axes.annotate(text, (max(share, weight_share), place), (6, 0), **look)
    widest = max(max(size.bytes / total, size.num_weights / weights) for size in sizes)
    axes.set_xlim(0, 100 * widest / 0.58)  # room for the words beside the longest bar
    axes.set_yticks(places, [size.group for size in sizes])
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= 100])
    axes.set_xlabel("share of all bytes in the plan (coloured) and of all weights (hatched), in %")
    axes.grid(visible=False)


def _percent(value: float) -> str:
    return f"{value:.1f}%" if value >= 0.05 or value == 0 else "<0.1%"
