"""Every plot is drawn from realistic tables, names what it should, and keeps its labels apart."""

import dataclasses
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image

from dynquant.analysis.outliers.stand_outs import stand_outs
from dynquant.analysis.plots.all_plots import write_plots
from dynquant.analysis.plots.experts import draw_experts, expert_errors, starved_experts
from dynquant.analysis.plots.frontier import draw_frontier, plan_error
from dynquant.analysis.plots.groups import GROUPS, MAX_TYPES, OUTSIDE, PlanResults, group_of, role_group, shown_types
from dynquant.analysis.plots.labels import place_labels
from dynquant.analysis.plots.plan_map import map_cells
from dynquant.analysis.plots.sizes import role_sizes
from dynquant.analysis.plots.style import GROUP_COLOURS, new_figure, plain, plot_settings, short_number
from dynquant.analysis.report.page import write_report
from dynquant.calibration.importance import expert_coverage
from dynquant.checkpoints.tensor_roles import Role
from dynquant.errors import PlanError, StatsError, WriteError
from dynquant.evaluation.statistics import Estimate
from dynquant.planning.frontier import FrontierPoint
from dynquant.planning.selecting.selection import Candidate, Fit, Selection
from dynquant.resources import human_bytes
from tests.helpers.synthetic_models import DENSE, LARGE_MOE, SMALL_MOE, TYPES, Shape, synthetic_model

ALL_PLOTS = {
    "plan_map", "size_breakdown", "error_by_layer", "weight_error_by_layer", "super_weights", "expert_heatmap",
    "frontier",
}  # fmt: skip


def texts_of(path) -> list[str]:
    """Every text of an SVG, which must be well-formed XML."""
    root = ElementTree.parse(path).getroot()
    return ["".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]


def write(directory, made, **changes):
    return write_plots(directory, dataclasses.replace(made.results, **changes))


def test_every_role_has_a_line_in_size_tables_and_a_colour():
    assert {role_group(role) for role in Role} == set(GROUP_COLOURS)
    assert {group_of(role) for role in Role} == {*GROUPS, OUTSIDE, None}


@pytest.fixture(scope="module")
def moe(drawn_moe):
    return drawn_moe.made


@pytest.fixture(scope="module")
def moe_plots(drawn_moe):
    steps = drawn_moe.steps
    total = len(ALL_PLOTS)
    assert steps[0] == ("drawing plots", 0, total) and steps[-1] == ("drawing plots", total, total)
    return drawn_moe.files


def test_all_plots_are_written_as_png_and_svg(moe_plots):
    assert set(moe_plots) == ALL_PLOTS
    folder = {path.name for path in moe_plots["plan_map"].png.parent.iterdir()}
    assert folder == {f"{name}.{kind}" for name in ALL_PLOTS for kind in ("png", "svg")}
    for files in moe_plots.values():
        image = Image.open(files.png)
        assert round(image.info["dpi"][0]) == 150
        assert np.asarray(image.convert("L")).std() > 5, f"{files.png.name} is blank"
        assert files.headline in " ".join(texts_of(files.svg))


def test_no_plot_loads_anything_or_parses_names(moe_plots):
    for files in moe_plots.values():
        svg = files.svg.read_text()
        assert 'href="http' not in svg and "url(http" not in svg
        assert any("<moe> $x_1$ \ufffd" in text for text in texts_of(files.svg))


def test_error_plot_names_the_spikes_and_units(moe_plots):
    texts = texts_of(moe_plots["error_by_layer"].svg)
    assert "blk.4.ffn_down_shexp x3.4" in texts and "blk.1.ffn_down_exps x2.8" in texts
    assert {"relative output error (%)", "layer", "attention", "dense FFN", "shared expert", "routed gate/up"} <= set(
        texts
    )
    assert {"routed down", "outside the layers", "the plan", *TYPES} <= set(texts)
    assert any(text.endswith("%") for text in texts)
    assert "blk.4.ffn_down_shexp" in moe_plots["error_by_layer"].headline
    assert "relative RMS weight error (%)" in texts_of(moe_plots["weight_error_by_layer"].svg)


def test_super_weights_are_named_by_coordinates(moe_plots):
    texts = texts_of(moe_plots["super_weights"].svg)
    assert texts.count("[507, 1229]") == 4  # two super weights on two panels
    assert "layer 1, expert 0" in texts and "layer 4" in texts
    assert "max |output| (activation units)" in texts


def test_plan_map_shows_every_cell(moe, moe_plots):
    texts = texts_of(moe_plots["plan_map"].svg)
    cells = map_cells(moe.plan)
    for name in ("IQ1_S", "IQ2_XXS", "Q8_0", "Q4_K"):
        assert texts.count(name) == sum(entry.type == name for entry in cells.values())
    assert "output.weight · Q6_K" in texts
    assert cells[4, Role.SHARED_DOWN].type == "Q8_0"


def test_sizes_add_up_to_the_plan(moe):
    sizes = role_sizes(moe.plan)
    assert sum(size.bytes for size in sizes) == moe.plan.tensor_bytes
    assert sum(size.num_weights for size in sizes) == moe.plan.num_weights
    assert next(size for size in sizes if size.group == "routed gate/up").bits_per_weight == pytest.approx(1.5625)


def test_frontier_marks_the_plan_at_its_own_error(moe, moe_plots):
    texts = texts_of(moe_plots["frontier"].svg)
    assert {"uniform-iq1_s", "llama-iq1_s", "this plan, preset r1-iq1_s", "file size (MB)"} <= set(texts)
    rows = moe.table.tensors()
    expected = sum(rows[e.name][e.type].weighted_error for e in moe.plan.entries if e.type in rows.get(e.name, {}))
    assert plan_error(moe.plan, moe.table) == pytest.approx(expected)


def test_the_plans_own_recipe_is_not_its_rival(moe):
    error = plan_error(moe.plan, moe.table)
    itself = FrontierPoint("r1-iq1_s", moe.plan.predicted_bytes, error * 0.9999, "preset")
    worse = FrontierPoint("uniform-iq1_s", moe.plan.predicted_bytes - 1000, error * 2, "uniform")
    better = FrontierPoint("llama-iq1_s", moe.plan.predicted_bytes - 1000, error / 2, "preset")
    with plot_settings():
        assert "50% less predicted error than uniform-iq1_s" in draw_frontier(moe.plan, moe.table, [itself, worse])[1]
        assert "llama-iq1_s is predicted better" in draw_frontier(moe.plan, moe.table, [worse, better])[1]
        assert draw_frontier(moe.plan, moe.table, [itself]) is None


@pytest.mark.nightly
def test_dense_model_has_no_expert_plot(tmp_path):
    made = synthetic_model(dataclasses.replace(DENSE, layers=8), spikes={"blk.3.ffn_down.weight": 3.0})
    files = write(tmp_path, made)
    assert set(files) == ALL_PLOTS - {"expert_heatmap"}
    assert "blk.3.ffn_down x3" in " ".join(texts_of(files["error_by_layer"].svg))
    assert "routed down" not in texts_of(files["error_by_layer"].svg)


def test_plan_alone_still_gives_its_map_and_sizes(tmp_path, moe):
    files = write(tmp_path, moe, table=None, stats=None, super_weights=(), frontier=())
    assert set(files) == {"plan_map", "size_breakdown"}


def test_large_moe_stays_legible(tmp_path):
    made = synthetic_model(LARGE_MOE, spikes={"blk.46.ffn_down_exps.weight": 2.5, "blk.47.ffn_down_exps.weight": 3.5})
    with plot_settings():
        starved = starved_experts(made.stats)
        figure, headline = draw_experts(made.plan, made.table, made.stats)
        figure.draw_without_rendering()
        tokens, errors = figure.axes[0], figure.axes[2]
        cell = tokens.transData.transform([(0, 0), (1, 1)])
    assert f"{len(starved):,} of 14,848" in headline
    assert tokens.get_window_extent().y0 > errors.get_window_extent().y1, "the maps stand above each other"
    assert (np.abs(cell[1] - cell[0]) >= 5).all(), "cells of at least 5 pixels"


def test_expert_errors_take_the_planned_type_and_worst_projection(moe):
    errors, name = expert_errors(moe.plan, moe.table)
    rows = moe.table.tensors()
    types = {entry.name: entry.type for entry in moe.plan.entries}
    names = [f"blk.3.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
    values = [rows[tensor][types[tensor]].per_expert_activation_error[5] for tensor in names]
    assert errors[3][5] == pytest.approx(max(values)) and name == "relative output error"


def test_starved_experts_are_those_of_the_coverage_report(moe):
    listed = {(row.layer, expert) for row in expert_coverage(moe.stats) for expert in row.starved}
    assert listed == {(layer, expert) for layer, expert, _ in starved_experts(moe.stats)}
    assert starved_experts(None) == []


def test_stand_outs_are_planted_spikes_and_first_layers_only():
    made = synthetic_model(Shape(layers=24, hidden=256), spikes={"blk.9.ffn_down.weight": 3.0})
    found = stand_outs(made.table, "activation_error", TYPES)
    assert found[0].row.name == "blk.9.ffn_down.weight" and found[0].z > 5
    assert {item.row.layer for item in found[1:]} <= {0, 1}
    assert stand_outs(made.table, "relative_rms", ()) == []


def test_many_types_are_thinned_to_those_of_the_plan(moe):
    many = (*TYPES, "IQ1_M", "IQ2_XS", "IQ2_S", "Q3_K", "IQ3_S", "IQ4_XS", "Q5_K")
    shown = shown_types(moe.table.model_copy(update={"types": many}), moe.plan)
    assert len(shown) == MAX_TYPES
    assert {"IQ1_S", "IQ2_XXS", "Q4_K", "Q8_0"} <= set(shown)


def test_other_checkpoints_are_refused(tmp_path, moe):
    with pytest.raises(PlanError, match=r"eeee.*ffff"):
        write(tmp_path, moe, table=moe.table.model_copy(update={"fingerprint": "e" * 64}))
    provenance = moe.stats.provenance.model_copy(update={"fingerprint": "d" * 64})
    with pytest.raises(StatsError, match="dddd"):
        write(tmp_path, moe, stats=dataclasses.replace(moe.stats, provenance=provenance))
    assert not list(tmp_path.iterdir())


def test_unwritable_directory_is_one_clear_error(tmp_path, moe):
    (tmp_path / "plots").write_text("a file")
    with pytest.raises(WriteError, match="plan_map"):
        write(tmp_path / "plots", moe, table=None, stats=None, frontier=())


def test_settings_of_the_caller_are_restored():
    before = dict(matplotlib.rcParams)
    with plot_settings():
        assert matplotlib.rcParams["svg.fonttype"] == "none"
    assert dict(matplotlib.rcParams) == before


def test_labels_do_not_overlap_or_leave_the_axes():
    with plot_settings():
        figure = new_figure(6, 4, "headline", "subtitle")
        axes = figure.add_subplot()
        points = [(x, 1.0 + 0.01 * (x % 3), f"tensor number {x}") for x in range(8)]
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points])
        axes.set_ylim(0, 2)
        place_labels(axes, points, [[(x, y) for x, y, _ in points]])
        figure.draw_without_rendering()
        boxes = [matplotlib.text.Text.get_window_extent(label) for label in axes.texts]
        frame = axes.get_window_extent()
    assert len(boxes) == 8
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)


@pytest.mark.parametrize(
    ("value", "text"), [(31_051_424, "31.05 MB"), (140e9, "140.00 GB"), (1.5e12, "1.50 TB"), (2_500, "2.50 kB")]
)
def test_human_bytes(value, text):
    assert human_bytes(value) == text


def test_short_numbers_and_plain_names():
    assert [short_number(v) for v in (0.05, 10, 1000, 12_000, 3e6)] == ["0.05", "10", "1,000", "12k", "3M"]
    assert plain("a\nb\udc80" + "x" * 100, 10) == "a\ufffdb\ufffdxxxxx…"


def test_a_selection_is_drawn_and_listed(tmp_path):
    made = synthetic_model(SMALL_MOE)
    kl, top1 = Estimate(value=0.3, low=0.25, high=0.35), Estimate(value=0.8, low=0.78, high=0.82)
    plans = [
        Candidate(label=label, bytes=size, predicted_kl=0.1 * size / 1e6, kl=kl, top1=top1, types={})
        for label, size in (("closed-form", 10**6), ("fisher-probe", 2 * 10**6))
    ]
    recipes = [Candidate(label="uniform-q2_k", bytes=10**6, kl=kl, top1=top1, types={})]
    selection = Selection(
        text="held <out>.txt", num_tokens=512, candidates=tuple(plans), chosen=1, checked=tuple(plans),
        frontier=(*plans, *recipes),
        rank_correlation=Estimate(value=0.9, low=0.7, high=0.95), fit=Fit(intercept=0.0, slope=1.0, residual=0.1),
    )  # fmt: skip
    results = PlanResults(made.plan, selection=selection)
    files = write_plots(tmp_path, results)
    assert {"selection", "measured_frontier"} <= set(files)
    page = tmp_path / "report.html"
    write_report(page, results, files)
    text = page.read_text()
    assert "fisher-probe (chosen)" in text and "0.900, 95 % interval 0.700 to 0.950" in text
    assert "held &lt;out&gt;.txt" in text and "held <out>" not in text
