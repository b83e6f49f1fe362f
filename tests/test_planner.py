"""Floors, exceptions and refusals of the planner, on hand-made error tables."""

import pytest

from dynquant.analysis.error_table import ErrorRow, ErrorTable
from dynquant.architecture import layer_of, role_of
from dynquant.errors import PlanError
from dynquant.exporters.gguf_header import padded
from dynquant.planner import Rules, outlier_tensors, plan_types
from dynquant.quant_types import QUANT_TYPES

TYPES = ("IQ1_S", "IQ2_XXS", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0")
SHAPE = {"attn_q": (256, 256), "ffn_down_exps": (8, 256, 256), "ffn_gate_exps": (8, 256, 256)}


def table_of(layers=6, outlier=None, sensitivity=None):
    rows = []
    for layer in range(layers):
        for part, shape in SHAPE.items():
            name = f"blk.{layer}.{part}.weight"
            for type_name in TYPES:
                error = 2.0 ** -QUANT_TYPES[type_name].bits_per_weight
                activation = error * (30.0 if name == outlier else 1.0 + 0.02 * layer)
                rows.append(
                    ErrorRow(
                        name=name, role=role_of(name), layer=layer_of(name), type=type_name,
                        bytes=QUANT_TYPES[type_name].tensor_bytes(shape), relative_rms=error, weighted_error=error,
                        weighted_energy=1.0, activation_error=activation,
                    )
                )  # fmt: skip
    return ErrorTable(model="m", fingerprint="f", stats_hash="s", encoder="ggml", types=TYPES, rows=tuple(rows),
                      sensitivity=sensitivity or {})  # fmt: skip


def size(table, types):
    return sum(padded(table.row(name, chosen).bytes) for name, (chosen, _) in types.items())


def test_attention_keeps_its_floor_while_experts_are_crushed():
    table = table_of()
    floor_size = sum(QUANT_TYPES["Q4_K"].tensor_bytes(SHAPE["attn_q"]) for _ in range(6))
    crushed = 12 * QUANT_TYPES["IQ1_S"].tensor_bytes(SHAPE["ffn_down_exps"])
    types = plan_types(table, floor_size + crushed + 1000, Rules())
    assert {types[f"blk.{i}.attn_q.weight"][0] for i in range(6)} == {"Q4_K"}
    assert {types[f"blk.{i}.ffn_down_exps.weight"][0] for i in range(6)} == {"IQ1_S"}
    assert "crushed" in types["blk.0.ffn_down_exps.weight"][1]


def test_floors_are_lowered_only_when_the_budget_demands_it_and_the_reason_says_so():
    table = table_of()
    smallest = sum(padded(rows["IQ1_S"].bytes) for rows in table.tensors().values())
    types = plan_types(table, smallest + 64, Rules())
    assert size(table, types) <= smallest + 64
    assert "no floor at this budget" in types["blk.0.attn_q.weight"][1]


@pytest.mark.parametrize("budget, words", [(10, "below the smallest"), (10**9, "above the largest")])
def test_impossible_budgets_name_both_ends(budget, words):
    table = table_of()
    smallest = sum(padded(rows["IQ1_S"].bytes) for rows in table.tensors().values())
    largest = sum(padded(rows["Q8_0"].bytes) for rows in table.tensors().values())
    with pytest.raises(PlanError, match=words) as refusal:
        plan_types(table, budget, Rules())
    assert f"{smallest:,}" in str(refusal.value) and f"{largest:,}" in str(refusal.value)


def test_a_tensor_whose_activation_error_stands_out_is_kept():
    spike = "blk.2.ffn_down_exps.weight"
    table = table_of(outlier=spike)
    assert list(outlier_tensors(table)) == [spike]
    budget = int(sum(padded(rows["Q3_K"].bytes) for rows in table.tensors().values()))
    types = plan_types(table, budget, Rules())
    assert QUANT_TYPES[types[spike][0]].bits_per_weight >= QUANT_TYPES["Q6_K"].bits_per_weight
    assert "stands out" in types[spike][1]


def test_a_tensor_with_a_super_weight_is_kept():
    table = table_of()
    name = "blk.4.ffn_down_exps.weight"
    budget = int(sum(padded(rows["Q3_K"].bytes) for rows in table.tensors().values()))
    types = plan_types(table, budget, Rules(super_weights={name: "holds a super weight"}))
    assert types[name][0] in ("Q6_K", "Q8_0")
    assert "super weight" in types[name][1]


def test_an_even_table_has_no_outliers():
    assert outlier_tensors(table_of()) == {}


def test_floors_that_cost_more_than_their_price_are_dropped():
    def sensitive_to(experts, attention):
        return {
            f"blk.{i}.{part}.weight": attention if part == "attn_q" else experts for i in range(6) for part in SHAPE
        }

    for sensitivity, kept in ((sensitive_to(1.0, 1e-4), False), (sensitive_to(1.0, 1.0), True)):
        table = table_of(sensitivity=sensitivity)
        budget = int(sum(padded(rows["Q3_K"].bytes) for rows in table.tensors().values()))
        bits = [
            QUANT_TYPES[plan_types(table, budget, Rules())[f"blk.{i}.attn_q.weight"][0]].bits_per_weight
            for i in range(6)
        ]
        assert all(b >= 4.25 for b in bits) == kept
