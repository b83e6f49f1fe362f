"""Independent pieces of work on the cores of this machine, side by side, with one PyTorch thread inside each.

Cutting every operation into threads pays only where operations are large; pieces of work that do not wait for each
other keep all cores busy at any size, as long as what they run releases the GIL: ggml, compiled loops, PyTorch.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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


def side_by_side(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Iterator[Result]:
    """Yield `function(item)` of every item, in their order, computed by so many threads (None: one for each core).

    At most two results for each thread wait to be taken, and no item is drawn before it is needed. The first exception
    is raised where its result would have been; nothing new is begun after it.
    """
    workers = workers or usable_cores()
    if workers == 1:
        with torch_threads(1):
            yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    # Threads that are new take over PyTorch's number of threads; those that exist keep their own.
    with torch_threads(1), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
