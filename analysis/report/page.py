"""report.html: one file that opens offline and says what a plan keeps, what it crushes, and why.

Plots are embedded as data; a content security policy forbids every request and any script but the page's own few
lines (sorting and filtering of tables), named by hash. All inserted text is escaped: model and tensor names are not
trusted. The page is written as ASCII, so that no reader can mistake its encoding.
"""

import base64
import hashlib
import re
from collections.abc import Mapping
from html import escape
from importlib import resources
from math import prod
from pathlib import Path
from string import Template

from dynquant.analysis.outliers.stand_outs import stand_outs
from dynquant.analysis.plots.experts import starved_experts
from dynquant.analysis.plots.groups import PlanResults, bits_of, role_group, shown_types
from dynquant.analysis.plots.plan_map import KEPT_BITS
from dynquant.analysis.plots.style import GROUP_COLOURS, PlotFiles
from dynquant.analysis.report import tables
from dynquant.analysis.report.texts import PLOT_TEXTS
from dynquant.checkpoints.vision_names import LANGUAGE, part_of
from dynquant.errors import ExportError
from dynquant.recipes.plan import Plan, PlanEntry
from dynquant.resources import human_bytes
from dynquant.storage.atomic import write_atomically

MAX_SVG_BYTES = 1_500_000  # a larger SVG is embedded as PNG
_FILTER = (
    '<p><label>Show tensors with <input type="search" data-filter="plan" placeholder="ffn_down, Q6_K, …"></label> '
    "Click a heading to sort.</p>"
)


def write_report(path: Path, results: PlanResults, plots: Mapping[str, PlotFiles], *, measured: str = "") -> None:
    """Write the report, whole or not at all. `plots` come from `write_plots`; absent ones are said to be absent.

    `measured` is HTML of what `eval` found: `tables.evaluation_table` or `pictures.picture_section`.

    Raises:
        PlanError, StatsError: table or statistics belong to another checkpoint than the plan.
        ExportError: a plot cannot be read, or the report cannot be written.
    """
    results.check_same_checkpoint()
    plan = results.plan
    below = _tables(results)
    # The page does not miss plots of what was not asked for.
    not_asked_for = {"token_errors", "selection", "measured_frontier"} - plots.keys() - below.keys()
    shown = [name for name in PLOT_TEXTS if name not in not_asked_for]
    sections = [_plot_section(name, plots.get(name), below.get(name, "")) for name in shown]
    if measured:
        sections.append(_section("evaluation", "Before and after", measured))
    every_tensor = _FILTER + tables.plan_table(plan, results.table)
    sections.append(_section("plan-section", "The plan, tensor by tensor", every_tensor))
    sections.append(_section("provenance", "Provenance", _provenance(results)))
    template = resources.files("dynquant.analysis.report").joinpath("page.html").read_text(encoding="utf-8")
    page = Template(template).substitute(
        policy=_content_policy(template),
        title=escape(f"{plan.model}: {plan.recipe}"),
        model=escape(plan.model),
        sentence=escape(summary_sentence(plan)),
        facts=_facts(plan),
        sections="\n".join(sections),
    )
    write_atomically(path, page.encode("ascii", "xmlcharrefreplace").decode())


def summary_sentence(plan: Plan) -> str:
    """Say what was crushed and what was kept, in one sentence with bits and shares of the weights."""
    crushed = [entry for entry in plan.entries if entry.quant_type.bits_per_weight < KEPT_BITS]
    kept = [entry for entry in plan.entries if entry.quant_type.bits_per_weight >= KEPT_BITS]
    if not crushed:
        return (
            f"Nothing is crushed: every tensor is kept at {KEPT_BITS:g} bits or more, {bits_of(kept):.2f} on average."
        )
    share = sum(prod(entry.shape) for entry in crushed) / plan.num_weights
    bits = f"{bits_of(crushed):.2f} bits per weight ({share:.1%} of the weights)"
    sentence = f"{_groups(crushed, plan)} crushed to {bits}"
    if kept:
        sentence += f"; {_groups(kept, plan)} kept at {bits_of(kept):.2f} bits ({1 - share:.1%})"
    return f"{sentence[0].upper()}{sentence[1:]}."


def _groups(entries: list[PlanEntry], plan: Plan) -> str:
    """List the role groups of some entries, with a count where a group is split between kept and crushed."""
    names = []
    for group in GROUP_COLOURS:
        count = sum(role_group(entry.role) == group for entry in entries)
        total = sum(role_group(entry.role) == group for entry in plan.entries)
        if count:
            names.append(group if count == total else f"{group} ({count} of {total} tensors)")
    return names[0] if len(names) == 1 else f"{'; '.join(names[:-1])} and {names[-1]}".replace("; ", ", ")


def _facts(plan: Plan) -> str:
    original = 2 * plan.num_weights
    facts = {
        "File size": f"{human_bytes(plan.predicted_bytes)} ({plan.predicted_bytes:,} bytes)",
        "Of the 16-bit original": f"{plan.predicted_bytes / original:.1%} of {human_bytes(original)}",
        "Bits per weight": f"{plan.bits_per_weight:.3f}",
        "Weights": f"{plan.num_weights:,}",
        "Recipe": plan.recipe,
        "Architecture": plan.arch,
        "Types (tensors)": ", ".join(f"{name} ({count})" for name, count in plan.histogram().items()),
    }
    return _definitions(facts)


def _definitions(facts: Mapping[str, str]) -> str:
    return "\n".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())


def _section(identity: str, heading: str, body: str) -> str:
    return f'<section id="{identity}"><h2>{escape(heading)}</h2>\n{body}\n</section>'


def _plot_section(name: str, files: PlotFiles | None, extra: str) -> str:
    text = PLOT_TEXTS[name]
    if files is None:
        absent = f'<p class="absent">Not drawn: this plot needs {escape(text.needs)}.</p>'
        return _section(name, text.heading, absent + extra)
    figure = (
        f'<figure><img src="{_data_uri(files)}" alt="{escape(files.headline)}">'
        f"<figcaption>{escape(text.how_to_read)}</figcaption></figure>"
    )
    return _section(name, text.heading, figure + extra)


def _data_uri(files: PlotFiles) -> str:
    try:
        path, kind = (files.svg, "svg+xml") if files.svg.stat().st_size <= MAX_SVG_BYTES else (files.png, "png")
        return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError as error:
        raise ExportError(f"The plot {error.filename} cannot be read for the report: {error.strerror}.") from error


def _tables(results: PlanResults) -> dict[str, str]:
    """Return the HTML below each plot."""
    plan, table, stats, selection = results.plan, results.table, results.stats, results.selection
    below = {"size_breakdown": tables.size_table(plan)}
    if table is not None:
        types = shown_types(table, plan)
        for name, measure in (("error_by_layer", "activation_error"), ("weight_error_by_layer", "relative_rms")):
            outliers = stand_outs(table, measure, types)
            none = "<p>No tensor sticks out of its role.</p>"
            below[name] = tables.stand_out_table(outliers, plan) if outliers else none
    if results.super_weights:
        below["super_weights"] = tables.super_weight_table(results.super_weights, plan)
    elif any(part_of(entry.name) != LANGUAGE for entry in plan.entries):
        below["super_weights"] = "<p>Super weights are looked for in text models only.</p>"
    else:
        below["super_weights"] = "<p>No super weight was detected.</p>"
    if starved := starved_experts(stats):
        count = f"{len(starved):,} starved experts: their statistics are shrunk to their layer's mean."
        below["expert_heatmap"] = f"<details><summary>{count}</summary>{tables.starved_table(starved)}</details>"
    elif any(entry.role.is_routed_expert for entry in plan.entries) and stats is not None:
        below["expert_heatmap"] = "<p>No expert is starved.</p>"
    if selection is not None:
        below["selection"] = tables.selection_table(selection)
        if selection.frontier:
            below["measured_frontier"] = tables.frontier_table(selection)
    return below


def _provenance(results: PlanResults) -> str:
    plan, table, stats = results.plan, results.table, results.stats
    facts = {
        "Tool": f"dynquant {plan.tool_version}",
        "Checkpoint fingerprint": plan.fingerprint,
        **({"Pruned experts": str(plan.pruned)} if plan.pruned else {}),
        "Plan hash": plan.hash,
        "Candidate types": ", ".join(plan.types) or "fixed by the recipe",
        "Statistics hash": plan.stats_hash or "none: the recipe reads no statistics",
        "Error table hash": plan.errors_hash or "none",
    }
    if table is not None:
        drawn = ""
        if table.seed is not None:
            drawn = (
                f", from rows drawn with seed {table.seed}; {table.num_exact:,} are exact, every weight was measured"
            )
        entries = f"{len(table.rows):,} entries{drawn}"
        facts["Error table"] = f"{entries}, encoder {table.encoder}, dynquant {table.tool_version}"
        facts["Statistics hash in the error table"] = table.stats_hash
    if stats is not None:
        text = stats.provenance
        facts["Calibration text"] = f"{text.text_name}, {text.num_tokens:,} tokens in {text.num_windows:,} windows"
        facts["Calibration text hash"] = text.text_hash
        held_back = f"{text.num_held_back_tokens:,} tokens held back"
        facts["Calibration options"] = f"window {text.window}, seed {text.seed}, {held_back}"
        if text.imported_from:
            facts["Statistics imported from"] = text.imported_from
    if results.frontier:
        facts["Frontier"] = f"{len(results.frontier)} plans priced"
    return f'<dl class="provenance">{_definitions(facts)}</dl>'


def _content_policy(template: str) -> str:
    """Forbid all requests; allow embedded images and the page's own style and script by hash."""
    parts = {}
    for tag in ("style", "script"):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL).group(1)  # exactly what the browser hashes
        parts[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{parts['style']}'; "
        f"script-src 'sha256-{parts['script']}'; base-uri 'none'; form-action 'none'"
    )
