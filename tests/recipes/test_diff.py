"""What differs between two plans, and which plans cannot be compared."""

import dataclasses

import pytest

from dynquant.checkpoints.inspect import TensorRecord
from dynquant.checkpoints.tensor_roles import role_of
from dynquant.errors import PlanError
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.recipes.diff import compare_types
from dynquant.recipes.plan_notes import number_ranges
from dynquant.recipes.type_lists import TypeList


def record(name, kind, shape=(2, 256)):
    num_bytes = QUANT_TYPES[kind].tensor_bytes(shape) if kind in QUANT_TYPES else 8
    return TensorRecord(name, shape, kind, num_bytes, role_of(name))


def plan_of(down, output="Q6_K", name="a"):
    tensors = [record(f"blk.{layer}.ffn_down_exps.weight", kind) for layer, kind in enumerate(down)]
    return TypeList(name, "deepseek2", 1000 + sum(t.num_bytes for t in tensors),
                    (*tensors, record("output.weight", output)))  # fmt: skip


def test_changes_are_grouped_by_role_and_types_with_their_bytes():
    before = plan_of(["Q2_K"] * 4 + ["IQ1_S"])
    after = plan_of(["Q4_K", "Q4_K", "Q2_K", "Q4_K", "Q2_K"], output="Q4_K", name="b")
    found = compare_types(before, after)
    assert [(c.role, c.before, c.after, c.layers) for c in found.changes] == [
        ("expert_down", "Q2_K", "Q4_K", (0, 1, 3)),
        ("output", "Q6_K", "Q4_K", ()),
        ("expert_down", "IQ1_S", "Q2_K", (4,)),
    ]
    assert (found.changes[0].bytes_before, found.changes[0].bytes_after) == (3 * 168, 3 * 288)
    assert [(s.type, s.tensors_before, s.tensors_after) for s in found.histogram] == [
        ("Q6_K", 1, 0), ("Q4_K", 0, 4), ("Q2_K", 4, 2), ("IQ1_S", 1, 0),
    ]  # fmt: skip
    assert sum(s.bytes_before for s in found.histogram) == sum(t.num_bytes for t in before.tensors)
    assert sum(s.bytes_after for s in found.histogram) == sum(t.num_bytes for t in after.tensors)


def test_equal_plans_have_no_changes():
    assert compare_types(plan_of(["Q2_K"]), plan_of(["Q2_K"], name="b")).changes == ()


def test_types_that_the_registry_does_not_know_are_compared_too():
    before, after = plan_of(["Q2_K"]), plan_of(["Q2_K"], name="b")
    other = (dataclasses.replace(after.tensors[0], type="Q1_0", num_bytes=8), after.tensors[1])
    found = compare_types(before, dataclasses.replace(after, tensors=other))
    assert [s.type for s in found.histogram] == ["Q6_K", "Q2_K", "Q1_0"]


def test_plans_of_different_models_are_refused():
    with pytest.raises(PlanError, match=r"only a .*`blk\.1\.ffn_down_exps\.weight` and 1 more"):
        compare_types(plan_of(["Q2_K"] * 3), plan_of(["Q2_K"], name="b"))
    with pytest.raises(PlanError, match=r"only b .*`blk\.1\.ffn_down_exps\.weight`"):
        compare_types(plan_of(["Q2_K"]), plan_of(["Q2_K"] * 2, name="b"))
    one = dataclasses.replace(plan_of([]), tensors=(record("output.weight", "Q6_K", (3, 256)),))
    with pytest.raises(PlanError, match=r"`output\.weight` has the shapes \[2, 256\] and \[3, 256\]"):
        compare_types(plan_of([]), one)


def test_a_leading_dimension_of_one_is_no_difference():
    row, matrix = (
        dataclasses.replace(plan_of([]), tensors=(record("blk.0.ffn_gate_inp_shexp.weight", "F32", shape),))
        for shape in ((256,), (1, 256))
    )
    assert compare_types(row, matrix).changes == ()


def test_ranges():
    assert number_ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert number_ranges([]) == ""
