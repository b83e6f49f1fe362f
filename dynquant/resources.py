"""What to run on: the device that was asked for, or else a GPU where there is one, and how many CPU cores."""

import os

from dynquant.errors import DeviceError


def chosen_device(asked: str | None) -> str:
    """`asked`, or cuda where PyTorch sees one, or cpu.

    Raises:
        DeviceError: no such device; those that exist are named.
    """
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
