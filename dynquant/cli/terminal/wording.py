"""Amounts, times and sizes in words."""

from dynquant.resources import human_bytes, peak_cuda_bytes, peak_memory_bytes


def short(number: float) -> str:
    """`12.3 M`; small whole numbers as they are."""
    for limit, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= limit:
            return f"{number / limit:.1f}{suffix}"
    return str(number) if isinstance(number, int) else f"{number:.1f}"


def clock_time(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """`4.2 s`, and from a minute on as on a clock."""
    return f"{seconds:.1f} s" if seconds < 60 else clock_time(seconds)


def sizes_and_peaks(**sizes: int | None) -> str:
    """`read 1.2 GB, written 30 kB, peak memory 900 MB`, without what the system does not tell."""
    peaks = {"peak memory": peak_memory_bytes(), "peak GPU memory": peak_cuda_bytes()}
    return ", ".join(f"{name} {human_bytes(size)}" for name, size in (sizes | peaks).items() if size is not None)


def printable(text: str) -> str:
    """Return the text without what steers a terminal: names and metadata come from files of strangers."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
