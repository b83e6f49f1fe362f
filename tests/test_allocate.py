"""The allocator: never over budget, close to brute force, monotone in the budget."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynquant.allocate import Option, allocate, largest_total, lower_hull, smallest_total


@st.composite
def tables(draw, max_tensors=4):
    count = draw(st.integers(1, max_tensors))
    table = {}
    for index in range(count):
        sizes = draw(st.lists(st.integers(1, 50), min_size=1, max_size=4, unique=True))
        costs = draw(st.lists(st.floats(0, 100), min_size=len(sizes), max_size=len(sizes)))
        table[f"t{index}"] = [Option(32 * b, c, f"T{b}") for b, c in zip(sizes, costs, strict=True)]
    return table


def total_bytes(chosen):
    return sum(option.bytes for option in chosen.values())


def total_cost(chosen):
    return sum(option.cost for option in chosen.values())


def best_by_brute_force(table, budget):
    fitting = [c for c in itertools.product(*table.values()) if sum(o.bytes for o in c) <= budget]
    return min(sum(o.cost for o in c) for c in fitting)


@settings(max_examples=300, deadline=None)
@given(tables(), st.floats(0, 1))
def test_budget_is_kept_and_the_gap_to_brute_force_is_at_most_one_step(table, share):
    low, high = smallest_total(table), largest_total(table)
    budget = int(low + share * (high - low))
    chosen = allocate(table, budget)
    assert total_bytes(chosen) <= budget
    assert set(chosen) == set(table)
    one_step = max(
        (a.cost - b.cost for choices in table.values() for a, b in itertools.pairwise(lower_hull(choices))), default=0
    )
    assert total_cost(chosen) <= best_by_brute_force(table, budget) + one_step + 1e-9


@settings(max_examples=100, deadline=None)
@given(tables(max_tensors=6))
def test_the_whole_budget_buys_the_lowest_cost_of_every_tensor(table):
    chosen = allocate(table, largest_total(table))
    for name, option in chosen.items():
        assert option.cost == min(choice.cost for choice in table[name])


def test_order_of_tensors_does_not_matter():
    table = {f"t{i}": [Option(32, 4.0 + i, "A"), Option(64, 1.0, "B"), Option(128, 0.5, "C")] for i in range(8)}
    turned = dict(reversed(table.items()))
    assert allocate(table, 600) == {name: allocate(turned, 600)[name] for name in table}


def test_budget_below_the_smallest_total_is_refused():
    with pytest.raises(ValueError, match="below the smallest total 32"):
        allocate({"t": [Option(32, 1.0, "A")]}, 31)
