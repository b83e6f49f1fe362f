"""Plan map: layers down, roles across, each cell coloured by bits per weight and named by its type."""

from dynquant.analysis.plots import style
from dynquant.analysis.plots.groups import bits_of, group_of
from dynquant.checkpoints.tensor_roles import Role, layer_of
from dynquant.recipes.plan import Plan, PlanEntry

KEPT_BITS = 4.0  # from this many bits per weight a tensor counts as kept, below it as crushed
BIT_EDGES = (1.5, 1.8, 2.2, 2.8, KEPT_BITS, 4.6, 5.7, 7.0, 10.0, 17.0, 33.0)
COLOURS = ("#a50026", "#d73027", "#f46d43", "#fdae61", "#e0f3f8", "#c3e3ef", "#9ecae1", "#74add1", "#4575b4", "#313695")
"""Red is crushed, blue is kept: after ColorBrewer's RdYlBu, safe for colour-blind readers."""
_ENDS = (Role.EMBEDDING, Role.PER_LAYER_EMBEDDING, Role.OUTPUT, Role.VISION_PATCH, Role.PROJECTOR)


def map_cells(plan: Plan) -> dict[tuple[int, Role], PlanEntry]:
    """Return the largest tensor of every layer and role; norms, biases and unknown tensors are left out."""
    cells: dict[tuple[int, Role], PlanEntry] = {}
    for entry in plan.entries:
        layer = layer_of(entry.name)
        if layer is None or not (group_of(entry.role) or entry.role is Role.ROUTER):
            continue
        largest = cells.get((layer, entry.role))
        if largest is None or entry.bytes > largest.bytes:
            cells[layer, entry.role] = entry
    return cells


def draw_plan_map(plan: Plan) -> style.Drawn:
    """Figure and headline; None for a plan without layers."""
    cells = map_cells(plan)
    if not cells:
        return None
    layers = sorted({layer for layer, _ in cells})
    roles = [role for role in Role if any((layer, role) in cells for layer in layers)]
    ends = [entry for entry in plan.entries if entry.role in _ENDS and len(entry.shape) > 1]
    headline = _headline(plan)
    subtitle = f"{style.plan_title(plan)}: top of the model above, output below"
    width, row = max(0.74 * len(roles) + 2.2, 8.5), 0.30 if len(layers) <= 24 else 0.205
    figure = style.new_figure(width, row * (len(layers) + len(ends)) + 1.5, headline, subtitle)
    axes = figure.add_subplot()
    size = 7.5 if len(layers) <= 24 else 7
    for (layer, role), entry in cells.items():
        _box(axes, entry, roles.index(role), layers.index(layer), 1, entry.type, size)
    _draw_ends(axes, ends, layers, roles)
    _dress(axes, layers, roles, ends)
    return figure, headline


def _headline(plan: Plan) -> str:
    matrices = [entry for entry in plan.entries if len(entry.shape) > 1]
    crushed = [entry for entry in matrices if entry.quant_type.bits_per_weight < KEPT_BITS]
    kept = [entry for entry in matrices if entry.quant_type.bits_per_weight >= KEPT_BITS]
    if not crushed:
        return f"Plan map: all {len(kept)} matrices kept at {bits_of(kept):.2f} bits per weight on average"
    if not kept:
        return f"Plan map: all {len(crushed)} matrices crushed to {bits_of(crushed):.2f} bits per weight on average"
    return (
        f"Plan map: {len(kept)} matrices kept at {bits_of(kept):.2f} bits, "
        f"{len(crushed)} crushed to {bits_of(crushed):.2f} bits per weight"
    )


def _palette():
    from matplotlib.colors import BoundaryNorm, ListedColormap

    return ListedColormap(COLOURS), BoundaryNorm(BIT_EDGES, len(COLOURS))


def _box(axes: style.Axes, entry: PlanEntry, left: int, top: int, width: int, text: str, size: float) -> None:
    from matplotlib.patches import Rectangle

    palette, norm = _palette()
    red, green, blue, _ = color = palette(norm(entry.quant_type.bits_per_weight))
    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"  # BT.601 luma
    axes.add_patch(Rectangle((left, top), width, 1, facecolor=color, edgecolor="white", linewidth=0.8))
    axes.text(left + width / 2, top + 0.53, text, ha="center", va="center", fontsize=size, color=ink)


def _draw_ends(axes: style.Axes, ends: list[PlanEntry], layers: list[int], roles: list[Role]) -> None:
    """Embeddings above the first layer, output and ends of the vision tower below the last, across the whole width."""
    above, below = -1, len(layers)
    for entry in ends:
        top = above if entry.role.is_embedding else below
        _box(axes, entry, 0, top, len(roles), f"{style.plain(entry.name, 40)} · {entry.type}", 7.5)
        above, below = (above - 1, below) if entry.role.is_embedding else (above, below + 1)


def _dress(axes: style.Axes, layers: list[int], roles: list[Role], ends: list[PlanEntry]) -> None:
    from matplotlib.cm import ScalarMappable

    above = sum(entry.role.is_embedding for entry in ends)
    axes.set_xlim(0, len(roles))
    axes.set_ylim(len(layers) + len(ends) - above, -above)
    names = [role.value.replace("_", "\n", 1) for role in roles]
    axes.set_xticks([i + 0.5 for i in range(len(roles))], names, fontsize=8)
    axes.xaxis.tick_top()
    axes.set_yticks([i + 0.5 for i in range(len(layers))], [str(layer) for layer in layers], fontsize=7.5)
    axes.tick_params(length=0)
    axes.set_ylabel("layer")
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    palette, norm = _palette()
    shrink = min(1.0, 7 / axes.figure.get_figheight())
    bar = axes.figure.colorbar(
        ScalarMappable(norm, palette), ax=axes, pad=0.012, fraction=0.025, aspect=32, shrink=shrink, anchor=(0, 1),
        ticks=BIT_EDGES,
    )  # fmt: skip
    bar.set_label("bits per weight (red: crushed, blue: kept)")
    bar.ax.set_yticklabels([f"{edge:g}" for edge in BIT_EDGES], fontsize=8)
