"""Timing, tables and JSON of the benchmarks here and in `analysis.bench`. Importing it needs no GPU."""

import gc
import json
import multiprocessing
import statistics
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

Row = dict[str, object]


def options(doc: str | None, positional: str = "", choices: Iterable[str] | None = None, /, **flags) -> Namespace:
    """Parse the command line of a script whose help is the module's text.

    A flag is its default, or a type where it has none (a `Path` must be there), or a pair of that and its help. A
    truth value can be denied by `--no-`, a list is filled by repeating the flag.
    """
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    if positional:
        parser.add_argument(positional, choices=choices)
    for name, flag in flags.items():
        value, text = flag if isinstance(flag, tuple) else (flag, None)
        if isinstance(value, type):
            words = {"type": value, "required": value is Path}
        elif isinstance(value, bool | list):
            words = {"action": "append" if value == [] else BooleanOptionalAction, "default": value}
        else:
            words = {"type": type(value), "default": value}
        short = ["-o"] if name == "output" else []
        parser.add_argument(*short, f"--{name.replace('_', '-')}", help=text, **words)
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    """Return the numbers of a flag as `1,8,32`."""
    return [int(number) for number in text.split(",")]


def device_name(device: str = "cuda") -> str:
    """Return the name of a GPU; "CPU" without one."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


def measured(run: Callable[[], object], device: str = "cuda") -> tuple[float, int]:
    """Return seconds of a run, and the most GPU memory in bytes that was held in it."""
    is_cuda = device.startswith("cuda")
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run()
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() if is_cuda else 0


def eager_time(calls: list[Callable[[], object]]) -> float:
    """Return microseconds a call, launched from Python one after another."""

    def run() -> None:
        for call in calls:  # whose results are not kept
            call()

    seconds, _ = measured(run)
    return seconds * 1e6 / len(calls)


def graph_time(calls: list[Callable[[], object]], replays: int = 15) -> tuple[float, list[object]]:
    """Return microseconds a call in replays of one CUDA graph of all `calls` (median), and what the calls returned."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        calls[0]()  # compiles, which a capture must not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = [call() for call in calls]
        times = []
        for _ in range(replays + 2):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
    return statistics.median(times[2:]) * 1000 / len(calls), results  # the first two warm up


def precompile(compile_one: Callable, jobs: Sequence, workers: int) -> None:
    """Compile the kernels of all jobs in processes of their own; they are read back from Triton's cache."""
    began = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as executor:
        pending = {executor.submit(compile_one, job): job for job in jobs}
        for future in as_completed(pending):
            if future.exception() is not None:
                print(f"compiling {pending[future]} failed: {future.exception()}", flush=True)
    print(f"compiled for {len(jobs)} cases in {time.perf_counter() - began:.0f} s", flush=True)


def release_memory() -> None:
    """Give the memory of models that are gone back to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


class MarkdownTable:
    """A table on the standard output, written row by row."""

    def __init__(self, *columns: str) -> None:
        print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)

    def add(self, *cells: object) -> None:
        """Print one row."""
        print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


class JsonReport:
    """Rows beside a head, printed one by one; the file is whole after each."""

    def __init__(self, path: Path, head: Row) -> None:
        self.path, self.head, self.rows = path, head, []
        print(json.dumps(head), flush=True)

    def add(self, row: Row) -> None:
        """Print a row and write the file with it."""
        self.rows.append(row)
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        self.path.write_text(json.dumps({**self.head, "rows": self.rows}, indent=1) + "\n")
