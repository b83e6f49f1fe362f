"""Floors, exceptions and refusals of the planner, on hand-made error tables."""

import itertools
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynquant.analysis.errors.table import ErrorRow, ErrorTable
from dynquant.checkpoints.gguf_layout import padded
from dynquant.checkpoints.tensor_roles import layer_of, role_of
from dynquant.errors import PlanError
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.planning.planner import Rules, coupled_tensors, outlier_tensors, plan_types, size_range

TYPES = ("IQ1_S", "IQ2_XXS", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0")
SHAPE = {"attn_q": (256, 256), "ffn_down_exps": (8, 256, 256), "ffn_gate_exps": (8, 256, 256)}
SHAPES = SHAPE | {"ffn_up_exps": (8, 256, 256)}


def table_of(layers=6, outlier=None, sensitivity=None, parts=tuple(SHAPE)):
    rows = []
    for layer in range(layers):
        for part in parts:
            shape, name = SHAPES[part], f"blk.{layer}.{part}.weight"
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


def random_table(rng):
    """A table with noise in the errors and sensitivities that differ by orders of magnitude."""
    plain = table_of(layers=3, parts=tuple(SHAPES))
    rows = tuple(
        row.model_copy(update={"weighted_error": row.weighted_error * rng.uniform(0.8, 1.25)}) for row in plain.rows
    )
    sensitivity = {name: 10 ** rng.uniform(-3, 0) for name in plain.tensors()}
    return ErrorTable(**plain.model_dump(exclude={"rows", "sensitivity"}), rows=rows, sensitivity=sensitivity)


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


def test_a_lowered_floor_is_told_with_the_one_that_it_was_lowered_from():
    spike, held = "blk.2.ffn_down_exps.weight", "blk.4.ffn_down_exps.weight"
    table = table_of(outlier=spike, parts=("attn_q", "ffn_down_exps"))
    coupled = (("blk.0.attn_q.weight", "blk.0.ffn_down_exps.weight"), ("blk.1.attn_q.weight", spike))
    rules = Rules(super_weights={held: "holds a super weight"}, coupled=coupled)
    floors = {spike: "Q4_K", "blk.1.attn_q.weight": "Q4_K", held: "Q6_K", "blk.3.attn_q.weight": "Q3_K"}
    needed = {name: (floors.get(name, "Q3_K" if "attn_q" in name else "IQ1_S"), "") for name in table.tensors()}
    needed["blk.0.ffn_down_exps.weight"] = ("Q3_K", "")
    types = plan_types(table, size(table, needed), rules)
    assert "floor Q4_K, lowered from Q6_K at this budget" in types[spike][1]
    assert "floor Q4_K, lowered from Q6_K at this budget" in types["blk.1.attn_q.weight"][1]
    assert "floor Q3_K, lowered from IQ4_XS at this budget" in types["blk.0.ffn_down_exps.weight"][1]
    assert "floor Q6_K" in types[held][1] and "lowered" not in types[held][1]


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


def test_coupled_tensors_take_one_type_and_say_so():
    table = table_of(parts=("attn_q", "ffn_gate_exps", "ffn_up_exps"))
    groups = coupled_tensors(table.tensors(), ("gate-up",))
    assert groups == tuple((f"blk.{i}.ffn_gate_exps.weight", f"blk.{i}.ffn_up_exps.weight") for i in range(6))
    budget = size(table, dict.fromkeys(table.tensors(), ("Q2_K", "")))
    types = plan_types(table, budget, Rules(coupled=groups))
    assert list(types) == list(table.tensors())
    assert size(table, types) <= budget
    for gate, up in groups:
        assert types[gate][0] == types[up][0]
        assert f"coupled, one type with {up}" in types[gate][1] and gate in types[up][1]
    assert "coupled" not in types["blk.0.attn_q.weight"][1]


def test_a_super_weight_keeps_the_whole_group_precise():
    table = table_of(parts=("ffn_gate_exps", "ffn_up_exps"))
    gate, up = (f"blk.2.{part}.weight" for part in ("ffn_gate_exps", "ffn_up_exps"))
    budget = size(table, dict.fromkeys(table.tensors(), ("Q3_K", "")))
    rules = Rules(super_weights={gate: "holds a super weight"}, coupled=coupled_tensors(table.tensors(), ("gate-up",)))
    types = plan_types(table, budget, rules)
    assert types[gate][0] == types[up][0] and types[gate][0] in ("Q6_K", "Q8_0")


def test_queries_keys_and_values_are_coupled_by_layer():
    names = [f"blk.{i}.attn_{part}.weight" for i in range(2) for part in ("q", "k", "v", "output")]
    assert coupled_tensors(names, ("qkv",)) == (tuple(names[:3]), tuple(names[4:7]))
    assert coupled_tensors(names, ("gate-up",)) == ()
    assert coupled_tensors(names, ()) == ()
    mla = ["blk.0.attn_q_a.weight", "blk.0.attn_kv_a_mqa.weight"]
    assert coupled_tensors(mla, ("gate-up", "qkv")) == ()


def test_coupled_tensors_without_a_common_type_are_named():
    table = table_of(layers=1, parts=("ffn_gate_exps", "ffn_up_exps"))
    gate, up = table.tensors()
    rows = tuple(row for row in table.rows if (row.name == gate) == (row.type in ("Q4_K", "Q6_K")))
    apart = ErrorTable(**table.model_dump(exclude={"rows"}), rows=rows)
    with pytest.raises(PlanError, match="no candidate type") as refusal:
        plan_types(apart, 10**6, Rules(coupled=((gate, up),)))
    assert f"`{gate}` can be Q4_K, Q6_K" in str(refusal.value) and up in str(refusal.value)


def test_size_range_is_what_the_refusals_name():
    table, rules = table_of(), Rules(fixed_bytes=1000)
    smallest, largest = size_range(table, rules)
    assert size(table, plan_types(table, smallest, rules)) + 1000 == smallest
    assert size(table, plan_types(table, largest, rules)) + 1000 == largest


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.floats(0, 1))
def test_floors_are_kept_within_the_budget_or_lowered_with_a_reason(seed, coupled, share):
    table = random_table(random.Random(seed))
    rules = Rules(coupled=coupled_tensors(table.tensors(), ("gate-up",)) if coupled else (), fixed_bytes=64)
    low, high = size_range(table, rules)
    budget = int(low + share * (high - low))
    types = plan_types(table, budget, rules)
    assert 64 + size(table, types) <= budget
    for name, (chosen, reason) in types.items():
        assert table.row(name, chosen) is not None
        if floor := re.search(r", floor (\w+)", reason):
            assert QUANT_TYPES[chosen].bits_per_weight >= QUANT_TYPES[floor.group(1)].bits_per_weight


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_without_floors_more_budget_never_has_a_higher_predicted_cost(seed):
    table = random_table(random.Random(seed))
    low, high = size_range(table, Rules(floors=False))
    costs = []
    for step in range(12):
        types = plan_types(table, low + step * (high - low) // 11, Rules(floors=False))
        costs.append(sum(table.cost(table.row(name, chosen)) for name, (chosen, _) in types.items()))
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(costs))
