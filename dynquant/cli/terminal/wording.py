"""Amounts, times, sizes and names in words."""

import shlex
from collections.abc import Collection, Iterable, Iterator
from pathlib import PurePath

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


def quoted(word: str) -> str:
    """Return a word for a shell; one with letters that break or steer a line as `$'a\\nb'`, in one line."""
    if word.isprintable():
        return shlex.quote(word)
    return f"$'{''.join(map(_escaped, word))}'"


def _escaped(letter: str) -> str:
    if letter in "\\'":
        return f"\\{letter}"
    if letter.isprintable():
        return letter
    if 0xDC80 <= ord(letter) <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(letter, f"\\U{ord(letter):08x}")


def names_to_quote(words: Iterable[str]) -> list[str]:
    """Return the names of files, with and without their endings, that a line of text cannot show as they are, the
    longest first. A word is a path, or an option with one behind `=`."""
    paths = (word.partition("=")[2] if word.startswith("-") else word for word in words)
    names = {name for path in paths for part in path.split("/") for name in _with_stems(part)}
    return sorted((name for name in names if name.strip() and not name.isprintable()), key=len, reverse=True)


def _with_stems(name: str) -> Iterator[str]:
    while name:
        yield name
        shorter = PurePath(name).stem
        name = shorter if shorter != name else ""


def printable(text: str, names: Collection[str] = ()) -> str:
    """Return the text with these names quoted, and without what steers a terminal: names and metadata come from files
    of strangers."""
    for name in names:
        text = text.replace(name, quoted(name))
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
