"""Independent pieces of work on the cores of this machine, side by side, with one PyTorch thread inside each.

Cutting every operation into threads pays only where operations are large; pieces of work that do not wait for each
other keep all cores busy at any size, as long as what they run releases the GIL: ggml, compiled loops, PyTorch.

There is one level of threads: a piece that is cut further (`share`) gets those threads for it that have no piece of
their own left to begin, so that few large pieces keep all cores busy as well as many small ones.

Threads wait for each other where pieces are many short steps in Python; `in_processes` is for those.
"""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from dynquant.errors import WorkerError
from dynquant.resources import WorkerUse, begin_worker, count_worker, usable_cores, worker_use

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_module(name: str, arguments: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a module in a Python process of its own that imports from where this one does, and return what it said.

    `-m` alone would add the working directory, where a file may have the name of a library.
    """
    paths = os.pathsep.join(map(os.path.abspath, sys.path))
    command = [sys.executable, "-P", "-m", name, *arguments]
    environment = os.environ | {"PYTHONPATH": paths} | variables
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)


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


def can_fork() -> bool:
    """Return whether `in_processes` works here: elsewhere libraries of the system forbid copies of a process."""
    return sys.platform == "linux"


def in_processes(
    function: Callable[[Item], Result],
    items: Collection[Item],
    workers: int | None = None,
    *,
    cost: Callable[[Item], float] = lambda item: 0,
    budget: float = 0,
) -> Iterator[tuple[Item, Result]]:
    """Yield items with `function(item)` as they are done, computed by so many copies of this process.

    Copies see all that this process holds when the first item is drawn, and share its memory; items and results travel
    between them. `cost` and `budget` are those of `side_by_side`. Copies end with this process, also when it is killed,
    and when nobody takes the rest.

    Other threads of this process are not copied, but locks that they hold are. A thread that runs meanwhile may
    therefore only do what copies do not: second moments are being written to a file, without a product of PyTorch,
    an import or a message.

    Raises:
        WorkerError: a copy was killed. What the function raised comes first.
    """
    workers, rest = max(1, min(workers or usable_cores(), len(items))), iter(items)
    # Whoever holds the writing end of the pipe is waited for: this process alone.
    living, life = os.pipe()
    entering = {"initializer": _enter_copy, "initargs": (function, living, life)}
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), **entering)
    pending: dict[Future[tuple[Any, WorkerUse]], tuple[Item, float]] = {}
    item = next(rest, None)
    try:
        while item is not None or pending:
            while item is not None and len(pending) < 2 * workers:
                price = cost(item)
                if pending and sum(spent for _, spent in pending.values()) + price > budget:
                    break
                pending[pool.submit(_work_in_copy, item)] = item, price
                item = next(rest, None)
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                result, use = future.result()
                count_worker(use)
                yield pending.pop(future)[0], result
    except BrokenProcessPool as error:
        raise WorkerError(
            f"One of {workers} processes that worked side by side was killed, most often because the machine's memory "
            "was used up. Give fewer --threads, or free memory, and run the same command again; what is done is kept."
        ) from error
    finally:
        if not pending:
            pool.shutdown()
        os.close(life)  # ends copies that are still at work
        pool.shutdown(cancel_futures=True)
        os.close(living)


_function_of_copy: Callable[[Any], Any]


def _enter_copy(function: Callable[[Any], Any], living: int, life: int) -> None:
    """Make a forked process a worker: silent at Ctrl-C and hang-ups, with one thread, and gone when the other is."""
    global _function_of_copy
    _function_of_copy = function
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    os.close(life)
    threading.Thread(target=lambda: os.read(living, 1) or os._exit(1), daemon=True).start()
    torch.set_num_threads(1)
    _Crew.of_thread.crew = _Crew(1)  # nobody helps with what is shared: the other cores have copies of their own
    gc.freeze()  # a collection would write to objects that are shared
    begin_worker()


def _work_in_copy(item: Any) -> tuple[Any, WorkerUse]:
    return _function_of_copy(item), worker_use()
