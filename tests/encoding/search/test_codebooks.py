"""The codeword search is exact: no word of the grid, under no choice of signs that can be stored, is nearer."""

import itertools

import pytest
import torch

from dynquant.encoding.search.codebooks import Integers, SignedWords, Targets, TernaryWords, Values
from dynquant.formats import tables

GROUPS, ROWS = 3, 16


def targets(peak: float, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets [GROUPS, ROWS, width] with zeros and outliers among them, and metrics over six orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(GROUPS, ROWS, width, generator=generator) * peak / 2
    y[0, 0], y[0, 1, 0], y[1, 2] = 0, 40 * peak, -peak
    metric = torch.exp(3 * torch.randn(GROUPS, width, generator=generator))
    return y, metric


def cost(y: torch.Tensor, values: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    return ((y - values).double().square() * metric.double().unsqueeze(1)).sum(-1)


def least_cost(y: torch.Tensor, words: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """By comparing with all words [K, width], in float64."""
    difference = (y.unsqueeze(2) - words).double().square()  # [G, R, K, width]
    return (difference * metric.double()[:, None, None]).sum(-1).amin(-1)


def assert_least(found: torch.Tensor, least: torch.Tensor) -> None:
    assert torch.allclose(found, least, rtol=1e-5, atol=1e-9 * float(least.max()))


def test_ternary_words():
    book = TernaryWords()
    y, metric = targets(1.0, 8)
    words = torch.from_numpy(tables.grid_rows("IQ1_S"))
    found = book.nearest(y, metric)
    assert_least(cost(y, found, metric), least_cost(y, words, metric))
    assert (book.grid.index_of(found) >= 0).all()


@pytest.mark.parametrize("name, even", [("IQ2_XXS", True), ("IQ2_XS", True), ("IQ2_S", False)])
def test_signed_words_of_eight(name, even):
    book = SignedWords(name, even)
    y, metric = targets(book.peak, 8)
    words = torch.from_numpy(tables.grid_rows(name))
    patterns = [s for s in itertools.product((1.0, -1.0), repeat=8) if not even or s.count(-1.0) % 2 == 0]
    least = torch.stack([least_cost(y, words * torch.tensor(signs), metric) for signs in patterns]).amin(0)
    found = book.nearest(y, metric)
    assert_least(cost(y, found, metric), least)
    assert (book.grid.index_of(found.abs()) >= 0).all()
    if even:
        assert ((found < 0).sum(-1) % 2 == 0).all()


@pytest.mark.parametrize("name, even", [("IQ3_XXS", True), ("IQ3_S", False)])
def test_signed_pairs_of_words_of_four(name, even):
    book = SignedWords(name, even)
    y, metric = targets(book.peak, 8)
    words = torch.from_numpy(tables.grid_rows(name))
    halves = []
    for part in (slice(0, 4), slice(4, 8)):
        by_parity = [[], []]
        for signs in itertools.product((1.0, -1.0), repeat=4):
            by_parity[signs.count(-1.0) % 2].append(
                least_cost(y[..., part], words * torch.tensor(signs), metric[:, part])
            )
        halves.append([torch.stack(costs).amin(0) for costs in by_parity])
    (even_1, odd_1), (even_2, odd_2) = halves
    least = torch.minimum(even_1 + even_2, odd_1 + odd_2)
    if not even:
        least = torch.minimum(least, torch.minimum(even_1 + odd_2, odd_1 + even_2))
    found = book.nearest(y, metric)
    assert_least(cost(y, found, metric), least)
    if even:
        assert ((found < 0).sum(-1) % 2 == 0).all()


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_XS", "IQ3_XXS"])
def test_both_searches_with_one_sign_against_are_equally_near(name):
    grid = SignedWords(name, even_signs=True).grid
    y, metric = targets(grid.peak, 8)
    rows, owner = y.abs().flatten(0, 1), torch.arange(GROUPS).repeat_interleave(ROWS)
    search = Targets(grid, rows, metric, owner)
    both = search.with_one_negated(torch.arange(len(rows))), search.all_with_one_negated()
    for found in both:
        assert ((found < 0).sum(-1) == 1).all() and (grid.index_of(found.abs().view(-1, grid.width)) >= 0).all()
    bounded, compared = (((rows - found).double().square() * metric[owner]).sum(-1) for found in both)
    assert_least(bounded, compared)


@pytest.mark.parametrize("book", [Integers(-4, 3), Integers(0, 15), Values("IQ4_NL"), Values("MXFP4")], ids=str)
def test_single_weights(book):
    y, metric = targets(book.peak, 1)
    if isinstance(book, Integers):
        words = torch.arange(book.low, book.high + 1.0).unsqueeze(1)
    else:
        words = tables.values(book.type_name, torch.device("cpu")).unsqueeze(1)
    assert_least(cost(y, book.nearest(y, metric), metric), least_cost(y, words, metric))
