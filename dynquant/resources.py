"""Resources of a run: the device, cores, sizes and tokens that were asked for, and what the process has used so far.

Bytes read and written are those of the process's own reads and writes as Linux counts them, cached or not, plus tensors
taken from memory-mapped files, which the kernel does not count: whoever maps a file calls `count_mapped`.
"""

import ctypes
import os
import re
import reprlib
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dynquant.errors import DeviceError, OptionError

_SIZE = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*([kMGT]i?)?B?\s*", re.IGNORECASE | re.ASCII)
_POWER = {"k": 1, "m": 2, "g": 3, "t": 4}
_TOKENS = re.compile(r"\s*([+-]?\d{1,99})(?:\.(\d{1,99}))?\s*([km]?)\s*", re.IGNORECASE | re.ASCII)
_STATUS = Path("/proc/self/status")
_IO = Path("/proc/self/io")
_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""For GNU's OpenMP, in PyTorch's wheels and under llama.cpp, whose spin count is then 0; and for LLVM's and Intel's."""
_SPINNING = {*_WAITING, "GOMP_SPINCOUNT"}
_mapped_bytes = 0
_cuda_peak = 0
_cuda_allocations = 0
_shared_bytes = 0
_worker_bytes: dict[int, int] = {}
"""Memory of worker processes beside what they share with this one, by their number."""


def let_waiting_threads_sleep() -> None:
    """Have OpenMP's threads sleep when they wait for each other, unless the user says how they should wait.

    By default they spin for milliseconds, on cores that others need: beside busy programs a command took thirteen times
    as long. The runtimes read their settings once, when PyTorch loads them, so this comes before. It is for commands,
    whose process is ours; `import dynquant` leaves it alone, because settings hold for all of a process and its
    children, and the training loop or server that imports us may be right to spin. llama.cpp's own thread pools are
    not needed: with OpenMP it makes none, and without it threads spin at every barrier whatever the pool's poll level.
    """
    if not _SPINNING & os.environ.keys():
        os.environ.update(_WAITING)


def chosen_device(asked: str | None) -> str:
    """Return `asked`, or cuda where PyTorch sees one, or cpu; raise DeviceError for a device that is not there."""
    import torch

    count = torch.cuda.device_count()
    if asked is None:
        return "cuda" if count else "cpu"
    there = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if asked not in there:
        raise DeviceError(f"There is no device `{asked}` for PyTorch {torch.__version__}; it has {', '.join(there)}.")
    return asked


def usable_cores() -> int:
    """CPU cores that this process may use; taskset, a batch system or a container may leave it few of the machine's."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def total_memory() -> int:
    """Return the bytes of memory of this machine."""
    return _windows_memory()[0] if os.name == "nt" else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _windows_memory() -> tuple[int, int]:
    """Return all and free bytes of memory, by GlobalMemoryStatusEx."""
    # MEMORYSTATUSEX: its own length and the load in percent, each of 32 bits, and seven counts of bytes of 64.
    status = (ctypes.c_uint64 * 8)(64)
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return status[1], status[2]


def free_memory() -> int:
    """Bytes that this process can still take, by the machine's and its control group's count."""
    free, meminfo = _windows_memory()[1] if os.name == "nt" else total_memory(), Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, max(0, int(text) - int(used.read_text())))  # a container may have less than the machine
    return free


def parse_size(text: str) -> int:
    """Return the bytes of `31002144`, `140GB` (decimal) or `130.6GiB` (binary), or raise OptionError for no size."""
    match = _SIZE.fullmatch(text)
    unit = ((match and match.group(2)) or "").lower()
    size = float(match.group(1)) * (1024 if unit.endswith("i") else 1000) ** _POWER.get(unit[:1], 0) if match else -1
    if not 0 <= size < 2**63:
        raise OptionError(
            f"{shown_value(text)} is not a size; write bytes, or a number with a unit as 140GB, 31.5MB or 12GiB, "
            "less than 8 EiB."
        )
    return int(size)


def parse_tokens(text: str) -> int:
    """Return the tokens of `16384`, `16k` or `1m`, or raise OptionError for no number; k is 1,024, as contexts are
    called by it."""
    match = _TOKENS.fullmatch(text)
    whole, fraction, unit = match.groups("") if match else ("0", "1", "")
    number, rest = divmod(int(whole + fraction) * 1024 ** _POWER.get(unit.lower(), 0), 10 ** len(fraction))
    if rest:
        raise OptionError(
            f"{shown_value(text)} is no number of tokens; give one as 16384, 16k, 1.5k or 1m, where k is 1,024."
        )
    return number


def shown_value(value: object) -> str:
    """Return the value of an option as it is typed, cut where it is long: bare, in quotes where a shell needs them."""
    return shlex.quote(f"{value:.40}") if isinstance(value, str) else reprlib.repr(value)


def human_bytes(count: int) -> str:
    """Decimal units, as file managers and model hubs show them."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def count_mapped(num_bytes: int) -> None:
    """Add bytes that were read through a memory map."""
    global _mapped_bytes
    _mapped_bytes += num_bytes


def count_mapped_files(files: Iterable[Path]) -> None:
    """Add whole files that another library reads through memory maps."""
    count_mapped(sum(file.stat().st_size for file in files))


def traffic() -> tuple[int | None, int | None]:
    """Bytes read and written since the process began; None where the system does not tell."""
    try:
        counts = dict(line.split(": ") for line in _IO.read_text().splitlines())
        return int(counts["rchar"]) + _mapped_bytes, int(counts["wchar"])
    except (OSError, KeyError, ValueError):
        return None, None


@dataclass(frozen=True)
class WorkerUse:
    """Bytes that a forked process read from maps since it last told, and the most memory that it had of its own."""

    process: int
    mapped: int
    memory: int


def begin_worker() -> None:
    """Count from here on what this process, which was forked, uses beside what it shares with the other."""
    global _mapped_bytes, _shared_bytes
    status = _memory_status()
    _mapped_bytes, _shared_bytes = 0, status.get("VmRSS", 0) - status.get("RssFile", 0)


def worker_use() -> WorkerUse:
    """Return what the worker that this process is has used."""
    global _mapped_bytes
    status, mapped = _memory_status(), _mapped_bytes
    _mapped_bytes = 0
    memory = status.get("VmHWM", 0) - status.get("RssFile", 0) - _shared_bytes  # files in memory are shared
    return WorkerUse(os.getpid(), mapped, max(0, memory))


def count_worker(use: WorkerUse) -> None:
    """Add what a worker has used; the system itself counts what it read and wrote otherwise."""
    count_mapped(use.mapped)
    _worker_bytes[use.process] = max(use.memory, _worker_bytes.get(use.process, 0))


def _memory_status() -> dict[str, int]:
    """Return the system's counts of memory in bytes; empty where it tells none."""
    try:
        lines = [line.split() for line in _STATUS.read_text().splitlines()]
        return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[2:] == ["kB"]}
    except (OSError, ValueError):
        return {}


def peak_memory_bytes() -> int | None:
    """The largest resident set until now, with that of worker processes; None on systems that do not tell."""
    peak = _memory_status().get("VmHWM")
    if peak is not None:
        return peak + sum(_worker_bytes.values())
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_cuda_bytes() -> int | None:
    """The most that PyTorch had allocated on any CUDA device; None when it has not used one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    now = max(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    return max(now, _cuda_peak)


def cuda_bytes_since() -> int | None:
    """Return the most that PyTorch had allocated on a CUDA device since the last call.

    None where it allocated nothing in that time: all work on a GPU does, while weights that merely lie there do not.
    """
    global _cuda_peak, _cuda_allocations
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    devices = range(torch.cuda.device_count())
    counts = [torch.cuda.memory_stats_as_nested_dict(device) for device in devices]
    allocations = sum(count["allocation"]["all"]["allocated"] for count in counts)
    peak = max(count["allocated_bytes"]["all"]["peak"] for count in counts)
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    _cuda_peak, before, _cuda_allocations = max(_cuda_peak, peak), _cuda_allocations, allocations
    return peak if allocations > before else None
