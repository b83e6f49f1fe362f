"""HTML tables of the report. Every cell is escaped here; nothing else turns values into markup."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import prod
from typing import Any

from dynquant.analysis.errors.table import ErrorTable
from dynquant.analysis.outliers.stand_outs import StandOut
from dynquant.analysis.plots.sizes import role_sizes
from dynquant.checkpoints.tensor_roles import layer_of
from dynquant.evaluation.statistics import Estimate, shown_kl
from dynquant.planning.selecting.selection import Candidate, Selection
from dynquant.recipes.folder import SuperWeight
from dynquant.recipes.plan import Plan, PlanEntry
from dynquant.resources import human_bytes

MAX_LIST = 8  # longer lists inside evaluation results are counted instead of shown


@dataclass(frozen=True)
class Cell:
    """Text that is shown, and the number that the column sorts by."""

    text: str
    key: float | None = None


ABSENT = Cell("\u2014", -1e308)  # sorts before every number
Row = Sequence[Cell | str]
Columns = Mapping[str, Callable[[Any], Cell | str]]  # heading -> what a row of the table shows under it of its item
_GROUPED = "{:,}".format


def number(value: float | None, form: Callable[[float], str] = str) -> Cell:
    """Make a right-aligned cell; an absent or not finite value is a dash that sorts first."""
    return Cell(form(value), float(value)) if value is not None and math.isfinite(value) else ABSENT


def percent(value: float | None) -> Cell:
    """Show a fraction as percent with three digits."""
    return number(value, lambda fraction: f"{100 * fraction:.3g}%")


def html_table(
    caption: str, columns: Sequence[str], rows: Sequence[Row], *, identity: str = "", sortable: bool = False
) -> str:
    """Write a table with caption and column headings; `sortable` turns the headings into buttons for the script."""
    wrap = '<button type="button">{}</button>' if sortable else "{}"
    aligned = [not isinstance(cell, str) for cell in rows[0]] if rows else [False] * len(columns)
    head = "".join(
        f'<th scope="col"{" class=number" if is_number else ""}>{wrap.format(escape(column))}</th>'
        for column, is_number in zip(columns, aligned, strict=True)
    )
    body = "\n".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    attributes = (f' id="{escape(identity)}"' if identity else "") + (" data-sortable" if sortable else "")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table{attributes}>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return f"<td>{escape(cell)}</td>"
    key = "" if cell.key is None else f' class="number" data-key="{cell.key:.10g}"'
    return f"<td{key}>{escape(cell.text)}</td>"


def _sortable(caption: str, items: Iterable[Any], columns: Columns, identity: str = "") -> str:
    rows = [[cell_of(item) for cell_of in columns.values()] for item in items]
    return html_table(caption, tuple(columns), rows, identity=identity, sortable=True)


def plan_table(plan: Plan, table: ErrorTable | None) -> str:
    """List every tensor once, in file order."""
    measured = table.tensors() if table is not None else {}
    row_of = {entry.name: measured.get(entry.name, {}).get(entry.type) for entry in plan.entries}

    def weighted_error(entry: PlanEntry) -> float | None:
        row = row_of[entry.name]
        return entry.weighted_error if entry.weighted_error is not None else row and row.weighted_error

    columns: Columns = {
        "Tensor": lambda entry: entry.name,
        "Role": lambda entry: entry.role.value,
        "Layer": lambda entry: number(layer_of(entry.name)),
        "Shape": lambda entry: Cell("x".join(map(str, entry.shape)), float(prod(entry.shape))),
        "Type": lambda entry: entry.type,
        "Bits per weight": lambda entry: number(entry.quant_type.bits_per_weight, "{:.4g}".format),
        "Bytes": lambda entry: number(entry.bytes, _GROUPED),
        "Output error": lambda entry: percent(getattr(row_of[entry.name], "activation_error", None)),
        "RMS weight error": lambda entry: percent(getattr(row_of[entry.name], "relative_rms", None)),
        "Weighted error": lambda entry: number(weighted_error(entry), "{:.3g}".format),
        "Reason": lambda entry: entry.reason + (f" (asked for {entry.wanted_type})" if entry.wanted_type else ""),
    }
    return _sortable(f"Plan: {len(plan.entries)} tensors", plan.entries, columns, "plan")


def size_table(plan: Plan) -> str:
    """List bytes and bits of each role."""
    columns: Columns = {
        "Role": lambda size: size.group,
        "Weights": lambda size: number(size.num_weights, _GROUPED),
        "16-bit size": lambda size: number(size.original_bytes, human_bytes),
        "Planned size": lambda size: number(size.bytes, human_bytes),
        "Share of plan": lambda size: percent(size.bytes / plan.tensor_bytes),
        "Bits per weight": lambda size: number(size.bits_per_weight, "{:.2f}".format),
    }
    return _sortable("Size by role", role_sizes(plan), columns)


def super_weight_table(super_weights: Sequence[SuperWeight], plan: Plan) -> str:
    """List coordinates and magnitudes, with the type that the tensor got."""
    columns: Columns = {
        "Tensor": lambda item: item.name,
        "Expert": lambda item: number(item.expert),
        "Row": lambda item: number(item.row),
        "Column": lambda item: number(item.col),
        "Weight": lambda item: number(item.value, "{:.4g}".format),
        "Largest input": lambda item: number(item.max_in, "{:.4g}".format),
        "Largest output": lambda item: number(item.max_out, "{:.4g}".format),
        "Planned type": lambda item: _planned_type(item.name, plan),
    }
    return _sortable("Detected super weights", super_weights, columns)


def stand_out_table(outliers: Sequence[StandOut], plan: Plan) -> str:
    """List tensors whose output or weight error sticks out, with what the plan gave them."""
    columns: Columns = {
        "Tensor": lambda item: item.row.name,
        "Role": lambda item: item.row.role.value,
        "Shown in": lambda item: item.row.type,
        "Error": lambda item: percent(item.value),
        "Median of the role": lambda item: percent(item.typical),
        "Robust z-score": lambda item: number(item.z, "{:.1f}".format),
        "Planned type": lambda item: _planned_type(item.row.name, plan),
    }
    return _sortable("Tensors that stick out of their role", outliers, columns)


def _planned_type(name: str, plan: Plan) -> str:
    return next((entry.type for entry in plan.entries if entry.name == name), "not in the plan")


def starved_table(starved: Sequence[tuple[int, int, int]]) -> str:
    """List experts that saw too few tokens, fewest first."""
    columns: Columns = {
        "Layer": lambda item: number(item[0]),
        "Expert": lambda item: number(item[1]),
        "Calibration tokens": lambda item: number(item[2], _GROUPED),
    }
    return _sortable("Starved experts", sorted(starved, key=lambda item: item[2]), columns)


def selection_table(selection: Selection) -> str:
    """List every candidate with its interval; the chosen one is named."""
    candidates, winner = list(selection.candidates), selection.winner
    candidates[selection.chosen] = winner.model_copy(update={"label": f"{winner.label} (chosen)"})
    table = _candidates(f"Candidates on {selection.text}", candidates)
    if selection.rank_correlation is None:
        return table
    rho = selection.rank_correlation
    return table + (
        f"<p>Spearman correlation of predicted and measured KL over {len(selection.checked)} drawn plans: "
        f"{rho.value:.3f}, 95 % interval {rho.low:.3f} to {rho.high:.3f}.</p>"
    )


def frontier_table(selection: Selection) -> str:
    """List the measured frontier, smallest file first."""
    return _candidates(f"Frontier on {selection.text}", sorted(selection.frontier, key=lambda plan: plan.bytes))


def _candidates(caption: str, plans: Sequence[Candidate]) -> str:
    columns: Columns = {
        "Plan": lambda plan: plan.label,
        "Bytes": lambda plan: number(plan.bytes, _GROUPED),
        "Prices added up": lambda plan: number(plan.predicted_kl, shown_kl),
        "Measured KL": lambda plan: _estimate(plan.kl, 1),
        "Same top token, %": lambda plan: _estimate(plan.top1, 100),
    }
    return _sortable(caption, plans, columns)


def _estimate(value: Estimate | None, scale: float) -> Cell:
    if value is None:
        return ABSENT
    mean, low, high = (f"{scale * bound:.4g}" for bound in (value.value, value.low, value.high))
    return number(value.value, lambda _: f"{mean} [{low}, {high}]")


def evaluation_table(evaluation: Mapping[str, object]) -> str:
    """List any nested result, one line a number."""
    return html_table("Measured", ("Measure", "Value"), [[name, value] for name, value in _flatten("", evaluation)])


def _flatten(prefix: str, value: object) -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(f"{prefix} / {key}" if prefix else str(key), inner)
    elif isinstance(value, list | tuple) and len(value) > MAX_LIST:
        yield prefix, f"{len(value)} values"
    elif isinstance(value, list | tuple):
        yield prefix, ", ".join(_scalar(item) for item in value)
    else:
        yield prefix, _scalar(value)


def _scalar(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
