"""HTML tables of the report. Every cell is escaped here; nothing else turns values into markup."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import prod

from dynquant.analysis.errors.table import ErrorTable
from dynquant.analysis.outliers.stand_outs import StandOut
from dynquant.analysis.plots.sizes import role_sizes
from dynquant.checkpoints.tensor_roles import layer_of
from dynquant.evaluation.statistics import Estimate
from dynquant.planning.selection import Candidate, Selection
from dynquant.recipes.folder import SuperWeight
from dynquant.recipes.plan import Plan
from dynquant.resources import human_bytes

PLAN_COLUMNS = (
    "Tensor", "Role", "Layer", "Shape", "Type", "Bits per weight", "Bytes", "Output error", "RMS weight error",
    "Weighted error", "Reason",
)  # fmt: skip
MAX_LIST = 8
"""Longer lists inside evaluation results are counted instead of shown."""


@dataclass(frozen=True)
class Cell:
    """Text that is shown, and the number that the column sorts by."""

    text: str
    key: float | None = None


ABSENT = Cell("\u2014", -1e308)


def number(value: float | None, text: str) -> Cell:
    """Make a right-aligned cell; an absent or not finite value is a dash that sorts first."""
    return Cell(text, float(value)) if value is not None and math.isfinite(value) else ABSENT


def percent(value: float | None) -> Cell:
    """Show a fraction as percent with three digits."""
    return number(value, "" if value is None else f"{100 * value:.3g}%")


def html_table(
    caption: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Cell | str]],
    *,
    identity: str = "",
    sortable: bool = False,
) -> str:
    """Write a table with caption and column headings; `sortable` turns the headings into buttons for the script."""
    wrap = '<button type="button">{}</button>' if sortable else "{}"
    rows = list(rows)
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


def plan_table(plan: Plan, table: ErrorTable | None) -> str:
    """List every tensor once, in file order."""
    measured = table.tensors() if table is not None else {}
    rows = []
    for entry in plan.entries:
        row = measured.get(entry.name, {}).get(entry.type)
        bits = entry.quant_type.bits_per_weight
        error = entry.weighted_error if entry.weighted_error is not None else row and row.weighted_error
        reason = f"{entry.reason} (asked for {entry.wanted_type})" if entry.wanted_type else entry.reason
        rows.append(
            [
                entry.name,
                entry.role.value,
                number(layer_of(entry.name), str(layer_of(entry.name))),
                Cell("x".join(map(str, entry.shape)), float(prod(entry.shape))),
                entry.type,
                number(bits, f"{bits:.4g}"),
                number(entry.bytes, f"{entry.bytes:,}"),
                percent(row.activation_error if row else None),
                percent(row.relative_rms if row else None),
                number(error, f"{error:.3g}" if error is not None else ""),
                reason,
            ]
        )
    return html_table(f"Plan: {len(rows)} tensors", PLAN_COLUMNS, rows, identity="plan", sortable=True)


def size_table(plan: Plan) -> str:
    """List bytes and bits of each role."""
    total = plan.tensor_bytes
    rows = [
        [
            size.group,
            number(size.num_weights, f"{size.num_weights:,}"),
            number(size.original_bytes, human_bytes(size.original_bytes)),
            number(size.bytes, human_bytes(size.bytes)),
            percent(size.bytes / total),
            number(size.bits_per_weight, f"{size.bits_per_weight:.2f}"),
        ]
        for size in role_sizes(plan)
    ]
    columns = ("Role", "Weights", "16-bit size", "Planned size", "Share of plan", "Bits per weight")
    return html_table("Size by role", columns, rows, sortable=True)


def super_weight_table(super_weights: Sequence[SuperWeight], plan: Plan) -> str:
    """List coordinates and magnitudes, with the type that the tensor got."""
    types = {entry.name: entry.type for entry in plan.entries}
    rows = [
        [
            item.name,
            number(item.expert, str(item.expert)),
            number(item.row, str(item.row)),
            number(item.col, str(item.col)),
            number(item.value, f"{item.value:.4g}"),
            number(item.max_in, f"{item.max_in:.4g}"),
            number(item.max_out, f"{item.max_out:.4g}"),
            types.get(item.name, "not in the plan"),
        ]
        for item in super_weights
    ]
    columns = ("Tensor", "Expert", "Row", "Column", "Weight", "Largest input", "Largest output", "Planned type")
    return html_table("Detected super weights", columns, rows, sortable=True)


def stand_out_table(found: Sequence[StandOut], plan: Plan) -> str:
    """List tensors whose output or weight error sticks out, with what the plan gave them."""
    types = {entry.name: entry.type for entry in plan.entries}
    rows = [
        [
            item.row.name,
            item.row.role.value,
            item.row.type,
            percent(item.value),
            percent(item.typical),
            number(item.z, f"{item.z:.1f}"),
            types.get(item.row.name, "not in the plan"),
        ]
        for item in found
    ]
    columns = ("Tensor", "Role", "Shown in", "Error", "Median of the role", "Robust z-score", "Planned type")
    return html_table("Tensors that stick out of their role", columns, rows, sortable=True)


def starved_table(starved: Sequence[tuple[int, int, int]]) -> str:
    """List experts that saw too few tokens, fewest first."""
    rows = [
        [number(layer, str(layer)), number(expert, str(expert)), number(tokens, f"{tokens:,}")]
        for layer, expert, tokens in sorted(starved, key=lambda item: item[2])
    ]
    return html_table("Starved experts", ("Layer", "Expert", "Calibration tokens"), rows, sortable=True)


def selection_table(selection: Selection) -> str:
    """List every candidate with its interval; the chosen one is named."""
    labels = [
        plan.label + (" (chosen)" if i == selection.chosen else "") for i, plan in enumerate(selection.candidates)
    ]
    table = _candidates(f"Candidates on {selection.text}", labels, selection.candidates)
    if selection.rank_correlation is None:
        return table
    rho = selection.rank_correlation
    return table + (
        f"<p>Spearman correlation of predicted and measured KL over {len(selection.checked)} drawn plans: "
        f"{rho.value:.3f}, 95 % interval {rho.low:.3f} to {rho.high:.3f}.</p>"
    )


def frontier_table(selection: Selection) -> str:
    """List the measured frontier, smallest file first."""
    points = sorted(selection.frontier, key=lambda plan: plan.bytes)
    return _candidates(f"Frontier on {selection.text}", [plan.label for plan in points], points)


def _candidates(caption: str, labels: Sequence[str], plans: Sequence[Candidate]) -> str:
    rows = [
        [
            label,
            number(plan.bytes, f"{plan.bytes:,}"),
            number(plan.predicted_kl, "" if plan.predicted_kl is None else f"{plan.predicted_kl:.4f}"),
            _estimate(plan.kl, 1),
            _estimate(plan.top1, 100),
        ]
        for label, plan in zip(labels, plans, strict=True)
    ]
    columns = ("Plan", "Bytes", "Prices added up", "Measured KL", "Same top token, %")
    return html_table(caption, columns, rows, sortable=True)


def _estimate(value: Estimate | None, scale: float) -> Cell:
    if value is None:
        return ABSENT
    mean, low, high = (f"{scale * bound:.4g}" for bound in (value.value, value.low, value.high))
    return number(value.value, f"{mean} [{low}, {high}]")


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
