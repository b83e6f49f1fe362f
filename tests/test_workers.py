"""Work side by side: order, laziness, refusals, and PyTorch's threads."""

from threading import Barrier

import pytest
import torch

from dynquant.workers import side_by_side, torch_threads


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_with_one_torch_thread_inside(workers: int) -> None:
    before = torch.get_num_threads()
    results = list(side_by_side(lambda item: (item * 2, torch.get_num_threads()), range(20), workers))
    assert results == [(2 * item, 1) for item in range(20)]
    assert torch.get_num_threads() == before


def test_pieces_run_at_the_same_time() -> None:
    both = Barrier(2)
    assert len(list(side_by_side(lambda _: both.wait(timeout=20), range(2), 2))) == 2


def test_items_are_drawn_as_they_are_needed() -> None:
    drawn = []
    results = side_by_side(lambda item: item, (drawn.append(i) or i for i in range(100)), 2)
    assert next(results) == 0 and len(drawn) <= 4
    results.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_exception_ends_it(workers: int) -> None:
    begun = []

    def fail(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise ValueError("three")
        return item

    results = side_by_side(fail, range(1000), workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert len(begun) < 20


def test_threads_of_torch_come_back() -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
