"""Work side by side: order, laziness, refusals, and PyTorch's threads."""

import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from multiprocessing import active_children
from pathlib import Path
from threading import Barrier

import pytest
import torch

from dynquant.errors import EncodeError, WorkerError
from dynquant.workers import can_fork, in_processes, run_module, share, side_by_side, torch_threads

forks = pytest.mark.skipif(not can_fork(), reason="processes are not copied on this system")


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


def test_a_module_imports_from_where_this_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "said.py").write_text("import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['HERE']]))")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "json.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(elsewhere)
    done = run_module("said", ["one"], HERE="two")
    assert (done.returncode, done.stdout) == (0, '[["one"], "two"]\n'), done.stderr


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


@forks
def test_processes_see_what_is_here_and_have_one_torch_thread() -> None:
    here, torch_threads_before = torch.arange(100), torch.get_num_threads()

    def work(item: int) -> tuple[int, int, int]:
        time.sleep(0.01)
        return int(here[item]), torch.get_num_threads(), os.getpid()

    results = dict(in_processes(work, range(50), 3))
    assert {item: result[:2] for item, result in results.items()} == {item: (item, 1) for item in range(50)}
    processes = {result[2] for result in results.values()}
    assert len(processes) == 3 and os.getpid() not in processes
    assert torch.get_num_threads() == torch_threads_before and not active_children()


@forks
def test_processes_have_no_threads_that_help() -> None:
    def work(_: int) -> int:
        names = set()
        share(lambda _: names.add(threading.current_thread().name) or time.sleep(0.001), range(20), 4)
        return len(names)

    assert dict(in_processes(work, range(2), 2)) == {0: 1, 1: 1}


_MEASURED = """
import torch
from dynquant.resources import peak_memory_bytes
from dynquant.workers import in_processes
before = peak_memory_bytes()
assert dict(in_processes(lambda size: float(torch.ones(size).sum()), [1 << 26], 2)) == {1 << 26: 1 << 26}
print(peak_memory_bytes() - before)
"""


@pytest.mark.nightly
@forks
def test_memory_of_processes_counts() -> None:
    """In a process of its own: what others left in this one's memory is told apart from the rest by an estimate."""
    said = subprocess.run([sys.executable, "-c", _MEASURED], capture_output=True, text=True, check=True).stdout
    assert 2.5e8 < int(said) < 5e8, "268 MB, and no shared ones"


@forks
def test_an_exception_in_a_process_arrives_and_ends_the_others() -> None:
    def fail(item: int) -> int:
        if item:
            time.sleep(1000)
        raise EncodeError("`blk.0` holds NaN")

    with pytest.raises(EncodeError, match="holds NaN"):
        list(in_processes(fail, range(5), 2))
    assert not active_children()


@forks
def test_a_killed_process_is_told_with_the_way_out() -> None:
    def fall(item: int) -> int:
        return os.kill(os.getpid(), signal.SIGKILL) or item

    with pytest.raises(WorkerError, match=r"2 processes.*killed.*Give fewer --threads"):
        list(in_processes(fall, range(5), 2))


@forks
def test_processes_keep_to_the_budget() -> None:
    def work(item: int) -> tuple[float, float]:
        start = time.monotonic()
        time.sleep(0.02)
        return start, time.monotonic()

    times = list(dict(in_processes(work, range(4), 4, cost=lambda item: 2, budget=3)).values())
    assert all(earlier[1] <= later[0] for earlier, later in pairwise(times))


@forks
def test_processes_end_with_the_one_that_is_killed() -> None:
    code = (
        "import os, time\nfrom dynquant.workers import in_processes\n"
        "def work(item):\n    os.write(1, b'at work\\n')\n    time.sleep(100)\n"
        "list(in_processes(work, range(4), 2))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        begun = [process.stdout.readline() for _ in range(2)]
        process.kill()
        assert begun == ["at work\n"] * 2
        assert process.stdout.read() == "", "the pipe is closed when nobody has it any more"
