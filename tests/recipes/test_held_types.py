"""Matrices that no cost decides on: layers that predict tokens ahead, indexers, states, and names that say nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGUFValueType

from dynquant.calibration.statistics import CalibrationStats, InputStats, StatsProvenance
from dynquant.checkpoints.gguf_source import MetadataField
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import Role
from dynquant.checkpoints.tensor_source import DictSource
from dynquant.encoding.stream import check_importance
from dynquant.errors import EncodeError, PlanError
from dynquant.formats.storage_format import Choice
from dynquant.planning.chooser import check_budget
from dynquant.planning.target import Target
from dynquant.recipes.build_plan import plan_from_types
from dynquant.recipes.held_types import held_types, planned_matrices
from dynquant.recipes.presets import preset_types

SHAPES = {
    "token_embd.weight": (64, 256), "per_layer_token_embd.weight": (64, 512), "altup_proj.weight": (3, 256, 256),
    "blk.0.attn_norm.weight": (256,), "blk.0.ssm_in.weight": (512, 256), "blk.0.ssm_out.weight": (256, 512),
    "blk.0.ssm_alpha.weight": (4, 256), "blk.0.ssm_conv1d.weight": (512, 4), "blk.0.ssm_a": (4, 1),
    "blk.0.indexer.proj.weight": (4, 256), "blk.0.indexer.attn_k.weight": (32, 256), "blk.0.novel.weight": (8, 256),
    "blk.1.nextn.eh_proj.weight": (256, 512), "blk.1.nextn.enorm.weight": (256,), "blk.1.ffn_gate_inp.weight": (2, 256),
    "blk.1.ffn_down_exps.weight": (2, 256, 256),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    fields = (
        MetadataField("general.architecture", "novel-moe", GGUFValueType.STRING),
        MetadataField("novel-moe.block_count", 2, GGUFValueType.UINT32),
        MetadataField("novel-moe.embedding_length", 256, GGUFValueType.UINT32),
    )
    tensors = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in SHAPES.items()}
    return Model(Path("novel"), DictSource(tensors), fields, lambda name: (name,))


def test_what_calibration_cannot_judge_is_not_measured(model):
    held = {name: choice.type for name, choice in held_types(model).items()}
    assert held == {
        "blk.0.ssm_alpha.weight": "BF16", "blk.0.indexer.proj.weight": "F32", "blk.0.indexer.attn_k.weight": "Q8_0",
        "blk.1.nextn.eh_proj.weight": "Q6_K", "blk.1.ffn_down_exps.weight": "Q6_K",
    }  # fmt: skip
    embeddings = ["token_embd.weight", "per_layer_token_embd.weight"]
    assert planned_matrices(model) == [*embeddings, "blk.0.ssm_in.weight", "blk.0.ssm_out.weight"]
    assert held_types(model, "q8_0")["blk.1.nextn.eh_proj.weight"].type == "Q8_0"


def test_a_preset_leaves_them_and_keeps_unknown_matrices_in_their_own_type(model):
    plan = plan_from_types(model, preset_types("uniform-iq1_s", model), recipe="preset uniform-iq1_s")
    types = {entry.name: entry.type for entry in plan.entries}
    assert types["token_embd.weight"] == types["per_layer_token_embd.weight"] == "Q2_K"
    assert types["blk.0.ssm_in.weight"] == "IQ1_S" and types["blk.1.ffn_down_exps.weight"] == "Q6_K"
    assert types["blk.0.novel.weight"] == types["altup_proj.weight"] == types["blk.0.ssm_alpha.weight"] == "BF16"
    assert types["blk.0.ssm_conv1d.weight"] == types["blk.0.ssm_a"] == types["blk.1.ffn_gate_inp.weight"] == "F32"
    assert plan.notes == ("1 matrix of unknown purpose, 4.10 kB, kept in BF16: blk.0.novel.weight",)
    roles = {entry.name: entry.role for entry in plan.entries}
    assert roles["blk.1.ffn_down_exps.weight"] is Role.MTP and roles["blk.1.ffn_gate_inp.weight"] is Role.ROUTER


def test_llama_cpps_mixtures_give_mtp_layers_types_that_need_no_statistics(model):
    types = {name: choice.type for name, choice in preset_types("llama-iq2_xxs", model).items()}
    assert types["blk.1.nextn.eh_proj.weight"] == types["blk.1.ffn_down_exps.weight"] == "Q6_K"
    assert types["blk.0.ssm_in.weight"] == "IQ2_XXS"
    assert preset_types("llama-q4_k_m", model)["blk.1.nextn.eh_proj.weight"].type == "Q4_K"


def test_types_that_need_statistics_are_refused_for_layers_ahead_with_the_way_out(model):
    types = preset_types("bf16", model) | {"blk.1.nextn.eh_proj.weight": Choice("IQ2_XXS", "asked")}
    plan = plan_from_types(model, types, recipe="recipe")
    with pytest.raises(EncodeError, match=r"nextn\.eh_proj.*--no-mtp"):
        check_importance(model, plan, lambda name, shape: None)


def test_a_plan_lists_what_has_no_statistics_and_why(model):
    inputs = InputStats(in_sum2=torch.ones(1, 256, dtype=torch.float64), counts=torch.tensor([9]))
    stats = CalibrationStats(
        StatsProvenance(fingerprint="f", text_hash="0", text_name="t"), {"blk.0.ssm_in.weight": inputs}, {}
    )
    types = preset_types("uniform-q4_k", model)
    plan = plan_from_types(model, types, recipe="preset uniform-q4_k", stats=stats, stats_hash="0" * 64)
    assert [note.partition(" without statistics, ")[2].partition(": ") for note in plan.notes[1:]] == [
        ("rows of an embedding are looked up, and no input weighs their columns", ": ",
         "token_embd.weight, per_layer_token_embd.weight"),
        ("nothing that calibration ran is known to read them", ": ",
         "blk.0.ssm_out.weight, blk.0.indexer.attn_k.weight"),
        ("layers that predict tokens ahead were not run", ": ",
         "blk.1.nextn.eh_proj.weight, blk.1.ffn_down_exps.weight"),
    ]  # fmt: skip


def test_a_budget_is_refused_with_the_bytes_that_have_no_choice(model):
    with pytest.raises(PlanError) as refusal:
        check_budget(model, Target(size="1kB"), ("IQ1_S", "Q4_K"), None)
    said = str(refusal.value)
    assert "below the smallest" in said and "of layers that predict tokens ahead (--no-mtp" in said
    assert "4.10 kB of tensors of unknown purpose" in said and "of vectors, norms and routers have no choice" in said
    assert "Matrices without statistics go down to Q4_K only: per_layer_token_embd.weight." in said


def test_rows_that_no_block_divides_are_named(model):
    shapes = {"token_embd.weight": (64, 200), "blk.0.ffn_down.weight": (200, 333), "blk.0.ffn_up.weight": (352, 200)}
    source = DictSource({name: torch.zeros(shape) for name, shape in shapes.items()})
    with pytest.raises(PlanError, match=r"Rows of 200 and 333 weights are no whole number .* floats: token_embd.*down"):
        check_budget(replace(model, source=source), Target(bpw=4), ("Q4_K", "Q8_0"), None)


def test_the_smallest_size_that_is_told_before_calibration_is_possible_after_it(model):
    inputs = InputStats(in_sum2=torch.ones(1, 256, dtype=torch.float64), counts=torch.tensor([9]))
    provenance = StatsProvenance(fingerprint="f", text_hash="0", text_name="t")
    names = filter(model.reads_input, model.source.names())
    stats = CalibrationStats(provenance, dict.fromkeys(names, inputs), {})
    with pytest.raises(PlanError, match="below the smallest") as refusal:
        check_budget(model, Target(size="1kB"), ("IQ1_S", "Q4_K"), None)
    smallest = str(refusal.value).split("between ")[1].split(" ")[0].replace(",", "")
    for known in (None, stats):
        check_budget(model, Target(size=smallest), ("IQ1_S", "Q4_K"), known)


def test_the_type_of_layers_ahead_is_one_that_exists():
    with pytest.raises(PlanError, match="no quant type `q9_k`"):
        Target(mtp_type="q9_k")
