"""Tells what a file is by its first bytes, whatever it is called."""

from pathlib import Path

from dynquant.errors import CheckpointError

GGUF, SAFETENSORS, JSON = "a GGUF file", "a safetensors file", "a JSON file"
_STARTS = {
    b"GGUF": GGUF,
    b"PK\x03\x04": "a zip archive, as pickled weights are",
    b"\x80\x02": "a pickle",
    b"\x1f\x8b": "a gzip archive",
    b"PAR1": "a Parquet file",
}
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library. What else begins with letters begins with a larger number."""


def kind_of(path: Path) -> str:
    """Return what a file is, with its article; empty where there is no file, or nothing known in it."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return ""  # what reads the file will say so
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < _MAX_HEADER_BYTES:
        return SAFETENSORS
    if start.lstrip()[:1] in (b"{", b"["):
        return JSON
    return next((kind for letters, kind in _STARTS.items() if start.startswith(letters)), "")


def refuse_other_kind(path: Path, wanted: str) -> None:
    """Raise CheckpointError for a file that is known to be something else than is wanted."""
    if (kind := kind_of(path)) not in ("", wanted):
        raise CheckpointError(f"{path} is {kind}, not {wanted}, by what it holds. Check which file you mean.")
