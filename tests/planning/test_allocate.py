"""The allocator: never over budget, close to the exact optimum, monotone in the budget, indifferent to order."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynquant.analysis.errors.table import Option, lower_hull
from dynquant.planning.allocate import allocate, largest_total, smallest_total, total_cost
from tests.helpers.exact_allocation import lowest_cost


@st.composite
def tables(draw, max_tensors=4, max_options=4, integer_costs=False):
    count = draw(st.integers(1, max_tensors))
    numbers = st.integers(0, 8).map(float) if integer_costs else st.floats(0, 100)
    table = {}
    for index in range(count):
        sizes = draw(st.lists(st.integers(1, 50), min_size=1, max_size=max_options, unique=True))
        costs = draw(st.lists(numbers, min_size=len(sizes), max_size=len(sizes)))
        table[f"t{index}"] = [Option(32 * b, c, f"T{b}") for b, c in zip(sizes, costs, strict=True)]
    return table


def random_table(rng, tensors=16, options=6):
    """Costs that fall with size as those of real tensors do, with noise."""
    table = {}
    for index in range(tensors):
        weights, scale = rng.choice((4, 8, 32)), math.exp(rng.gauss(0, 1))
        bits = sorted(rng.sample(range(3, 18), options))
        table[f"t{index}"] = [
            Option(32 * weights * b, scale * 2 ** (-0.9 * b) * math.exp(rng.gauss(0, 0.1)), f"T{b}") for b in bits
        ]
    return table


def total_bytes(chosen):
    return sum(option.bytes for option in chosen.values())


def best_by_brute_force(table, budget):
    fitting = [c for c in itertools.product(*table.values()) if sum(o.bytes for o in c) <= budget]
    return min(sum(o.cost for o in c) for c in fitting)


def budget_at(table, share):
    """A budget between the smallest and the largest total."""
    low, high = smallest_total(table), largest_total(table)
    return int(low + share * (high - low))


def first_saving_not_taken(table, budget):
    """What the first hull step that does not fit would save: the bound that the module states."""
    steps = sorted(
        ((b.cost - a.cost) / (b.bytes - a.bytes), name, b.bytes - a.bytes, a.cost - b.cost)
        for name, choices in table.items()
        for a, b in itertools.pairwise(lower_hull(choices))
    )
    left = budget - smallest_total(table)
    for _, _, extra, saved in steps:
        if extra > left:
            return saved
        left -= extra
    return 0.0


@settings(max_examples=300, deadline=None)
@given(tables(), st.floats(0, 1))
def test_budget_is_kept_and_the_gap_to_brute_force_is_at_most_the_step_that_did_not_fit(table, share):
    budget = budget_at(table, share)
    chosen = allocate(table, budget)
    assert total_bytes(chosen) <= budget
    assert list(chosen) == list(table)
    assert all(option in table[name] for name, option in chosen.items())
    optimum = best_by_brute_force(table, budget)
    assert optimum == pytest.approx(lowest_cost(table, budget))
    assert total_cost(chosen) <= optimum + first_saving_not_taken(table, budget) + 1e-9


@settings(max_examples=150, deadline=None)
@given(tables(max_tensors=2))
def test_two_tensors_are_solved_exactly(table):
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        budget = budget_at(table, share)
        assert total_cost(allocate(table, budget)) == pytest.approx(best_by_brute_force(table, budget), abs=1e-9)


def test_the_gap_to_the_optimum_is_small_on_tables_like_real_ones():
    rng = random.Random(5)
    gaps = []
    for _ in range(40):
        table = random_table(rng)
        budget = budget_at(table, rng.random())
        gaps.append(total_cost(allocate(table, budget)) / lowest_cost(table, budget) - 1)
    assert min(gaps) > -1e-9
    assert sum(gaps) / len(gaps) < 0.01


@settings(max_examples=100, deadline=None)
@given(st.one_of(tables(), tables(integer_costs=True)))
def test_more_budget_never_costs_more(table):
    low, high = smallest_total(table), largest_total(table)
    costs = [total_cost(allocate(table, budget)) for budget in range(low, high + 33, 32)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(costs))


@settings(max_examples=100, deadline=None)
@given(st.one_of(tables(max_tensors=6), tables(max_tensors=6, integer_costs=True)), st.floats(0, 1), st.randoms())
def test_order_of_tensors_and_options_does_not_matter(table, share, rng):
    names = rng.sample(list(table), len(table))
    turned = {name: rng.sample(table[name], len(table[name])) for name in names}
    budget = budget_at(table, share)
    assert allocate(turned, budget) == allocate(table, budget)


@settings(max_examples=100, deadline=None)
@given(tables(max_tensors=6))
def test_the_whole_budget_buys_the_lowest_cost_of_every_tensor(table):
    chosen = allocate(table, largest_total(table))
    for name, option in chosen.items():
        assert option.cost == min(choice.cost for choice in table[name])


def test_an_option_off_the_hull_fills_the_budget():
    table = {"t": [Option(32, 10.0, "A"), Option(96, 9.0, "B"), Option(128, 1.0, "C")], "u": [Option(32, 1.0, "A")]}
    assert allocate(table, 32 + 96)["t"].type == "B"


def test_an_exchange_beats_filling_up():
    table = {
        "big": [Option(32, 100.0, "A"), Option(320, 10.0, "B")],
        "small": [Option(32, 50.0, "A"), Option(64, 30.0, "B")],
    }
    assert {name: option.type for name, option in allocate(table, 352).items()} == {"big": "B", "small": "A"}


def test_budget_below_the_smallest_total_is_refused():
    with pytest.raises(ValueError, match="below the smallest total 32"):
        allocate({"t": [Option(32, 1.0, "A")]}, 31)
