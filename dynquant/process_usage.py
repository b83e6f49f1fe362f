"""What this process has used so far: memory at its peak, and bytes read and written.

Bytes are those of the process's own reads and writes as Linux counts them, cached or not, plus tensors taken from
memory-mapped files, which the kernel does not count: whoever maps a file tells `count_mapped`.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_STATUS = Path("/proc/self/status")
_IO = Path("/proc/self/io")
_mapped_bytes = 0


class Traffic(NamedTuple):
    """Bytes since the process began; None where the system does not tell."""

    read: int | None
    written: int | None

    def since(self, start: "Traffic") -> "Traffic":
        """What was added after `start`."""
        return Traffic(*(None if a is None or b is None else a - b for a, b in zip(self, start, strict=True)))

    def plus(self, other: "Traffic") -> "Traffic":
        """The sum of two spans."""
        return Traffic(*(None if a is None or b is None else a + b for a, b in zip(self, other, strict=True)))


def count_mapped(num_bytes: int) -> None:
    """Add bytes that were read through a memory map."""
    global _mapped_bytes
    _mapped_bytes += num_bytes


def count_mapped_files(files: Iterable[Path]) -> None:
    """Add whole files that another library reads through memory maps."""
    count_mapped(sum(file.stat().st_size for file in files))


def traffic() -> Traffic:
    """Bytes read and written until now."""
    try:
        counts = dict(line.split(": ") for line in _IO.read_text().splitlines())
        return Traffic(int(counts["rchar"]) + _mapped_bytes, int(counts["wchar"]))
    except (OSError, KeyError, ValueError):
        return Traffic(None, None)


def peak_memory_bytes() -> int | None:
    """The largest resident set until now; None on systems that do not tell."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
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
    return max(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
