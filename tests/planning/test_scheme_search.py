"""`plan --select` for vLLM: schemes priced and chosen by running the model, in the search that types of GGUF have."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dynquant.analysis.errors.table import ErrorRow, ErrorTable
from dynquant.analysis.sensitivity.fisher_probe import fisher_probe
from dynquant.calibration.options import CalibrationOptions
from dynquant.checkpoints.tensor_roles import layer_of
from dynquant.encoding.scheme_store import SchemeStore
from dynquant.encoding.stream import Guidance
from dynquant.errors import PlanError, StatsError
from dynquant.evaluation.rendered_model import ScoredInputs
from dynquant.evaluation.runners import load_model
from dynquant.families.linear_layers import linear_checkpoint
from dynquant.families.open import open_model
from dynquant.planning.chooser import SchemeChooser
from dynquant.planning.options import METHODS, PlanOptions, SearchOptions
from dynquant.planning.selecting.search import Search, search_plans
from dynquant.planning.stage import make_plan
from dynquant.planning.target import Target
from dynquant.recipes.build_plan import plan_for_vllm
from dynquant.running.load import load_hf
from dynquant.session import SILENT
from tests.helpers.commands import run
from tests.helpers.tiny_models import save_tiny

LOSSES = {"W2A16": 0.3, "W3A16": 0.08, "W4A16": 0.02, "W8A16": 0.0002}
CALIBRATION = CalibrationOptions(tokens=512, window=64, hessians="none")
SELECTING = {"select": True, "probes": 2, "probe_window": 64, "unit_tokens": 128, "rounds": 1, "selection_tokens": 256}
BUDGET = 8_780_000


@pytest.fixture(scope="module")
def deepseek(small_moe, tmp_path_factory):
    return save_tiny("deepseek-v3", tmp_path_factory.mktemp("tiny") / "deepseek", small_moe, num_hidden_layers=2)


def search_of(directory, folder):
    """Return a search over plans with experts in one scheme."""
    model = open_model(directory)
    checkpoint = linear_checkpoint(model)
    chooser = SchemeChooser(checkpoint, tuple(LOSSES), budget=BUDGET)
    by_name = {name: {scheme.name: scheme for scheme in of} for name, of in chooser.candidates.items()}
    store = SchemeStore(model, checkpoint, by_name, Guidance(), folder / "store", torch.device("cpu"))
    stats = SimpleNamespace(
        stats=SimpleNamespace(provenance=SimpleNamespace(max_tokens=512, window=64, seed=0, sampled_tokens=0))
    )
    target = Target(size=str(BUDGET), serves="vllm")
    return Search(store, SearchOptions(**SELECTING), chooser, target, stats, CALIBRATION, SILENT)


@pytest.fixture
def search(deepseek, tmp_path):
    return search_of(deepseek, tmp_path)


def table_of(search):
    """Return made-up errors, in which later layers matter more."""
    linears = search.store.checkpoint.linears
    rows = [
        ErrorRow(
            name=linear.name, role=linear.role, layer=layer_of(linear.name), type=name,
            bytes=scheme.tensor_bytes(linear.shape), relative_rms=0.0, weighted_error=LOSSES[name], weighted_energy=1.0,
        )
        for linear in linears
        for name, scheme in search.store.schemes[linear.name].items()
    ]  # fmt: skip
    return ErrorTable(
        model="tiny", fingerprint="", stats_hash="", encoder="", types=tuple(LOSSES), rows=tuple(rows),
        sensitivity={linear.name: 1.0 + n for n, linear in enumerate(linears)},
    )  # fmt: skip


@pytest.fixture
def table(search):
    return table_of(search)


@pytest.mark.parametrize("methods", [("closed-form",), pytest.param(METHODS, marks=pytest.mark.nightly)])
def test_a_search_prices_and_takes_schemes_by_the_kl_of_what_is_written(search, table, methods):
    search = replace(search, options=replace(search.options, methods=methods))
    ((priced, selection, _),) = search_plans([search], table)
    kls = [plan.kl.value for plan in selection.candidates]
    winner = selection.winner
    assert winner.kl.value == min(kls) and selection.num_tokens == 256
    assert set(methods) >= {plan.method for plan in selection.candidates}
    assert priced.prices.keys() == set(methods) - {"closed-form"} and priced.priced_by == winner.method
    for plan in selection.candidates:
        for unit in search.store.checkpoint.units(mixed_experts=False).values():
            assert len({plan.types[linear.name] for linear in unit}) == 1
    chosen = plan_for_vllm(search.model, search.store.checkpoint, search.chooser.explained(winner.types), recipe="test")
    assert BUDGET - 40_000 < winner.bytes - 4096 < chosen.predicted_bytes <= winner.bytes <= BUDGET
    value, _ = selection.fit.predicted(winner.predicted_kl)
    assert value == pytest.approx(winner.kl.value, rel=0.5)


def test_a_tied_embedding_that_gguf_stores_twice_is_no_layer(small_moe, tmp_path):
    search = search_of(save_tiny("qwen2-moe-tied", tmp_path / "tied", small_moe), tmp_path)
    assert {"token_embd.weight", "output.weight"} < set(search.model.source.names())
    running, table = load_hf(search.model, dtype=torch.float32), table_of(search)
    assert running.get_input_embeddings().weight is running.get_output_embeddings().weight
    costs = fisher_probe(running, search.store, table, torch.arange(128).reshape(2, 64))
    assert costs.keys() == table.tensors().keys()


def asked(deepseek, folder, bpw, **search):
    target = Target(bpw=bpw, serves="vllm", mixed_experts=True)
    searching = SearchOptions(**SELECTING, **search)
    return PlanOptions(model=str(deepseek), output=folder, target=target, calibration=CALIBRATION, search=searching)


@pytest.mark.nightly
def test_a_selected_plan_says_what_its_checkpoint_loses(deepseek, tmp_path):
    folder, out = tmp_path / "plan", tmp_path / "out"
    make_plan(asked(deepseek, folder, 14.2))
    plan = make_plan(asked(deepseek, folder, 13.8, check_plans=5, frontier=(13.7, 15.2), frontier_points=2))
    selection = json.loads((folder / "selection.json").read_text())
    winner = selection["candidates"][selection["chosen"]]
    assert {entry.name: entry.type for entry in plan.entries} == winner["types"]
    assert plan.selected_kl == winner["kl"]["value"] and plan.predicted_kl == pytest.approx(plan.selected_kl, rel=0.3)
    assert len(selection["checked"]) == 5
    assert {plan["label"].split(",")[0] for plan in selection["frontier"]} >= {"planner", "uniform-w4a16"}
    model_and_plan = (deepseek, "--plan", folder / "plan.json")
    done = run("export", *model_and_plan, "-f", "compressed-tensors", "--tune", 0, "-o", out)
    assert done.returncode == 0, done.stderr
    assert f"{plan.selected_kl:.4f}" in (out / "README.md").read_text()
    texts = []

    class Noted(ScoredInputs):
        def __init__(self, rendered, inputs, original=None):
            super().__init__(rendered, inputs, original)
            texts.append(inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynquant.planning.selecting.search.ScoredInputs", Noted)
        assert make_plan(asked(deepseek, folder, 13.8)).selected_kl == plan.selected_kl
    original, written = load_hf(open_model(deepseek), dtype=torch.float32), load_model(out)
    with torch.inference_mode():
        p, q = (each(texts[0].windows).logits.log_softmax(-1) for each in (original, written))
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(plan.selected_kl, rel=0.02)


def test_a_plan_without_a_search_leaves_no_selection_of_an_earlier_one(deepseek, tmp_path):
    for target in (Target(preset="uniform-w4a16", serves="vllm"), Target(preset="uniform-q8_0")):
        (tmp_path / "selection.json").write_text("{}")
        make_plan(PlanOptions(model=str(deepseek), output=tmp_path, target=target, calibration=CALIBRATION))
        assert not (tmp_path / "selection.json").exists()


def test_a_streamed_plan_and_too_little_text_are_refused_before_calibration(deepseek, tmp_path):
    for limit, calibration, words in (
        ("4GB", {}, "--select run"), (None, {"tokens": 10**6, "text": "TEXT"}, "Give --selection-text FILE")
    ):  # fmt: skip
        text = tmp_path / "text.txt"
        text.write_text("A text of a few words. " * 40)
        given = {name: str(text) if value == "TEXT" else value for name, value in calibration.items()}
        options = PlanOptions(
            model=str(deepseek), output=tmp_path / "refused", target=Target(bpw=13.8, serves="vllm"),
            calibration=CalibrationOptions(max_memory=limit, **given), search=SearchOptions(select=True),
        )  # fmt: skip
        with pytest.raises((PlanError, StatsError), match=words):
            make_plan(options)
        assert not (tmp_path / "refused").exists()
