"""Independent pieces of work on the cores of this machine, side by side, with one PyTorch thread inside each.

Cutting every operation into threads pays only where operations are large; pieces of work that do not wait for each
other keep all cores busy at any size, as long as what they run releases the GIL: ggml, compiled loops, PyTorch.

There is one level of threads: a piece that is cut further (`share`) gets those threads for it that have no piece of
their own left to begin, so that few large pieces keep all cores busy as well as many small ones.
"""

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from dynquant.resources import usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Context manager: PyTorch uses `count` threads inside an operation; None leaves their number as it is."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Crew:
    """Threads of one `side_by_side`, or those that help the caller of `share`."""

    of_thread = threading.local()
    """Its attribute `crew` is that of the thread, where it belongs to one."""

    def __init__(self, size: int) -> None:
        self.size, self.is_leaving = size, False
        self.pool = ThreadPoolExecutor(size, initializer=self._enter)

    def _enter(self) -> None:
        torch.set_num_threads(1)
        self.of_thread.crew = self

    def __enter__(self) -> "_Crew":
        return self

    def __exit__(self, *_: object) -> None:
        """Begin nothing more, not even the next item of a piece that is shared, and wait for what is running."""
        self.is_leaving = True
        self.pool.shutdown(cancel_futures=True)

    def share(self, function: Callable[[Item], None], items: Iterable[Item], helpers: int) -> None:
        """Call the function with every item, from this thread and from helpers that are idle."""
        waiting = deque(items)

        def work() -> None:
            while waiting and not self.is_leaving:
                try:
                    item = waiting.popleft()
                except IndexError:  # another thread took the last
                    return
                try:
                    function(item)
                except BaseException:
                    waiting.clear()
                    raise

        # They queue behind pieces that wait to be begun. Most are cancelled before they start: all threads were busy.
        helping = [self.pool.submit(work) for _ in range(helpers)]
        try:
            work()
        finally:
            started = [future for future in helping if not future.cancel()]
        for future in started:
            future.result()
        if waiting:
            raise CancelledError


def share(function: Callable[[Item], None], items: Collection[Item], workers: int | None = None) -> None:
    """Call the function with every item, in any order, on so many threads (None: one for each core).

    Within `side_by_side` these are this thread and those of its threads that have nothing else to do. The first
    exception ends it.
    """
    helpers = min(workers or usable_cores(), len(items)) - 1
    crew: _Crew | None = getattr(_Crew.of_thread, "crew", None)
    with torch_threads(1):
        if crew is not None:
            crew.share(function, items, min(helpers, crew.size - 1))
        elif helpers < 1:
            for item in items:
                function(item)
        else:
            with _Crew(helpers + 1) as crew:
                crew.pool.submit(crew.share, function, items, helpers).result()


def side_by_side(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int | None = None,
    *,
    cost: Callable[[Item], float] = lambda item: 0,
    budget: float = 0,
) -> Iterator[Result]:
    """Yield `function(item)` of every item, in their order, computed by so many threads (None: one for each core).

    At most two results for each thread wait to be taken, and no item is drawn before it is needed. Items that are begun
    and whose results are not done with cost at most `budget` together, unless it is a single one. The first exception
    is raised where its result would have been; nothing new is begun after it.
    """
    workers = workers or usable_cores()
    if workers == 1:
        with torch_threads(1):
            yield from map(function, items)
        return
    waiting: deque[tuple[Future[Result], float]] = deque()
    # Threads that are new take over PyTorch's number of threads; those that exist keep their own.
    with torch_threads(1), _Crew(workers) as crew:
        for item in items:
            price = cost(item)
            while waiting and sum(spent for _, spent in waiting) + price > budget:
                yield waiting[0][0].result()
                waiting.popleft()
            waiting.append((crew.pool.submit(function, item), price))
            if len(waiting) >= 2 * workers:
                yield waiting[0][0].result()
                waiting.popleft()
        while waiting:
            yield waiting[0][0].result()
            waiting.popleft()
