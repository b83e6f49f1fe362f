"""Which device to run on: what was asked for, if it is there, or else a GPU where there is one."""

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
