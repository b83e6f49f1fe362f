"""Decisions for vision tower and projector by measured KL: `plan --select` on pictures, and the table of modules."""

import pytest

pytest.importorskip("PIL", reason="Pillow is not installed")
import torch

from dynquant.analysis.bench.vision_modules import measure_modules
from dynquant.checkpoints.tensor_roles import Role
from dynquant.encoding.store import EncodedStore
from dynquant.encoding.stream import Guidance, load_encoder
from dynquant.evaluation.rendered_model import RenderedModel, ScoredInputs
from dynquant.families.open import open_model
from dynquant.inputs.model_inputs import ModelInputs
from dynquant.planning import stage
from dynquant.planning import vision_modules as vision_choice
from dynquant.planning.selecting.selection import Selection
from dynquant.recipes.plan import Plan
from dynquant.running.load import load_hf
from tests.helpers.commands import refused, run
from tests.helpers.packed_models import plan_of
from tests.helpers.tiny_vision import encoded_pictures, write_pictures


@pytest.fixture(scope="module")
def qwen(tiny_vision):
    return tiny_vision("qwen2_vl")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 4)


@pytest.fixture
def store(qwen, tmp_path):
    return EncodedStore(open_model(qwen), Guidance(), load_encoder("ggml"), tmp_path)


def test_pictures_score_what_is_installed(store, qwen, pictures):
    samples = ModelInputs(tuple(encoded_pictures("qwen2_vl", qwen, pictures)))
    rendered = RenderedModel(load_hf(store.model), store)
    scored = ScoredInputs(rendered, samples)
    assert scored.num_tokens == sum(int((one.is_text[0, 1:] & one.is_text[0, :-1]).sum()) for one in samples)
    divergences, agreements = scored.score()
    assert divergences.abs().max() < 1e-5 and agreements.all()
    rendered.install({"blk.0.ffn_up.weight": "Q4_0"})
    divergences, _ = scored.score()
    assert divergences.mean() > 1e-5
    with pytest.raises(ValueError, match="before anything is installed"):
        ScoredInputs(rendered, samples)
    rendered.install({})
    divergences, _ = scored.score()
    assert divergences.abs().max() < 1e-5


def test_modules_are_measured_beside_the_same_language_model(store, qwen, pictures):
    samples = ModelInputs(tuple(encoded_pictures("qwen2_vl", qwen, pictures)))
    rows = list(measure_modules(plan_of(store.model, "Q8_0"), store, samples, ("q8_0", "q4_0")))
    kl = {(row.module, row.type): row.kl.value for row in rows}
    size = {(row.module, row.type): row.bytes for row in rows}
    assert len(rows) == 7 and rows[0].type == "as stored"
    alone = kl["both", "as stored"]
    for module in ("vision tower", "projector", "both"):
        assert alone * 0.5 < kl[module, "q8_0"] < kl[module, "q4_0"]
        assert size[module, "q4_0"] < size[module, "q8_0"] < size["both", "as stored"]
    assert kl["both", "q4_0"] > 3 * alone
    assert size["both", "q4_0"] / size["both", "as stored"] == pytest.approx(4.5 / 16)


def test_select_takes_the_combination_with_the_lowest_kl(qwen, pictures, tmp_path):
    other = write_pictures(tmp_path, 2)
    made = run(
        "plan", qwen, "--data", pictures, "-o", tmp_path / "plan", "--types", "q4_0,q8_0,iq4_nl", "--bpw", 10.5,
        "--select", "--selection-text", other, "--hessians", "none", "--no-report",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-2000:]
    selection = Selection.load(tmp_path / "plan" / "selection.json")
    labels = [one.label for one in selection.candidates]
    assert len(labels) > 3 and "vision lower / projector lower" in labels
    assert selection.winner.kl.value == min(one.kl.value for one in selection.candidates)
    plan = Plan.load(tmp_path / "plan" / "plan.json")
    assert plan.selected_kl == selection.winner.kl.value
    assert "KL on 2 samples of samples.jsonl" in made.stderr
    assert {e.name: e.type for e in plan.entries if e.name in selection.winner.types} == selection.winner.types

    model = open_model(qwen)
    store = EncodedStore(model, Guidance(), load_encoder("ggml"), tmp_path)
    rendered = RenderedModel(load_hf(model, dtype=torch.float32), store)
    scored = ScoredInputs(rendered, ModelInputs(tuple(encoded_pictures("qwen2_vl", qwen, other))))
    rendered.install({e.name: e.type for e in plan.entries if not e.quant_type.is_float})
    assert scored.score()[0].mean() == pytest.approx(plan.selected_kl, rel=0.05)


def test_what_runs_on_text_is_refused_with_pictures(qwen, pictures, tmp_path):
    error = refused("plan", qwen, "--data", pictures, "--bpw", 9, "--frontier", "5:9", "-o", tmp_path / "plan")
    assert "run on text" in error and "--select" in error


def test_whole_modules_are_held_only_near_the_lowest_predicted_kl(qwen, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(vision_choice, "KEEP_RATIO", 0.0)  # errors of a random tower are like those of the layers
    plans = {}
    for kept in (True, False):
        monkeypatch.setattr(stage, "FLOOR_PRICE", 1e9 if kept else 1.1)
        options = ("--types", "q4_0,q8_0,bf16", "--bpw", 13.5, "--no-report", "--hessians", "none")
        made = run("plan", qwen, "--data", pictures, "-o", tmp_path, *options)
        assert made.returncode == 0, made.stderr[-2000:]
        assert ("with modules held as their errors say it would be" in made.stderr) is not kept
        plans[kept] = Plan.load(tmp_path / "plan.json")
    towers = [
        {entry.type for entry in plans[kept].entries if entry.role in (Role.VISION_ATTN, Role.VISION_FFN)}
        for kept in (True, False)
    ]
    assert towers[0] == {"BF16"} and "BF16" not in towers[1]
    assert plans[True].predicted_kl > 1.1 * plans[False].predicted_kl
