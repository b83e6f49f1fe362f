"""Work side by side: order, laziness, refusals, and PyTorch's threads."""

import threading
import time
from threading import Barrier

import pytest
import torch

from dynquant.workers import share, side_by_side, torch_threads


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


def test_items_in_work_keep_to_the_budget() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def work(cost: int) -> int:
        nonlocal running, most
        with lock:
            running += cost
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= cost
        return cost

    costs = [3, 1, 1, 4, 9, 1, 1, 1, 1, 5]
    assert list(side_by_side(work, costs, 4, cost=lambda cost: cost, budget=5)) == costs
    assert most == 9, "the one that is larger than the budget runs alone"


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_shared_items_are_each_done_once(workers: int) -> None:
    done: list[tuple[int, int]] = []
    before = torch.get_num_threads()
    share(lambda item: done.append((item, torch.get_num_threads())), range(50), workers)
    assert sorted(done) == [(item, 1) for item in range(50)] and torch.get_num_threads() == before


def test_idle_threads_help_with_a_large_piece_and_none_are_added() -> None:
    names, both = set(), Barrier(2)

    def small(item: int) -> None:
        names.add(threading.current_thread().name)
        if item < 2:
            both.wait(timeout=20)  # two threads are here at once

    def large(_: int) -> None:
        share(lambda _: share(small, range(4), 2), range(1))  # a share in a share

    before = threading.active_count()
    assert list(side_by_side(large, range(1), 2)) == [None]
    assert len(names) == 2 and threading.active_count() == before


@pytest.mark.parametrize("workers", [1, 3])
def test_a_failing_item_ends_the_share(workers: int) -> None:
    begun = []

    def fail(item: int) -> None:
        begun.append(item)
        if item == 3:
            raise ValueError("three")
        time.sleep(0.001)

    with pytest.raises(ValueError, match="three"):
        share(fail, range(1000), workers)
    assert len(begun) < 20


def test_leaving_ends_pieces_between_two_shared_items() -> None:
    done = []

    def piece(number: int) -> None:
        share(lambda item: (time.sleep(0.005), done.append(item)), range(1000 if number else 1), number)

    results = side_by_side(piece, range(4), 2)
    next(results)
    results.close()
    assert len(done) < 200
