"""Tells what a file is by what it holds, whatever it is called: its kind by its first bytes, and which document or
file of ours it is by the names in it."""

from pathlib import Path

from safetensors import SafetensorError

from dynquant.errors import CheckpointError, DynquantError
from dynquant.storage.atomic import read_tensors_header
from dynquant.storage.file_names import PLAN_NAME, RELEASE_NAME
from dynquant.storage.strict_json import parse_json

GGUF, SAFETENSORS, JSON, EMPTY = "a GGUF file", "a safetensors file", "a JSON file", "an empty file"
_STARTS = {
    b"GGUF": GGUF,
    b"PK\x03\x04": "a zip archive, as pickled weights are",
    b"\x80\x02": "a pickle",
    b"\x1f\x8b": "a gzip archive",
    b"PAR1": "a Parquet file",
}
PLAN = "a plan of dynquant"
STATISTICS, MOMENTS = "a statistics file of dynquant", "a file of second moments of dynquant"
_DOCUMENTS = {
    "model_type": "the configuration of a model",
    "weight_map": "the index of a model's safetensors files",
    "entries": PLAN,
    "encoder": "an error table of dynquant",
    "super_weights": "a list of super weights of dynquant",
    "candidates": "a selection of dynquant",
    "extra_files": "the record of a release of dynquant",
    "multiple_choice": "a report of `dynquant eval` of dynquant",
    "matmul_flops": "a machine file of dynquant",
}
"""JSON documents by a field that none below has: a configuration may have an `encoder`, as an error table has."""
_MAX_DOCUMENT_BYTES = 1 << 28
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
    if not start:
        return EMPTY
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < _MAX_HEADER_BYTES:
        return SAFETENSORS
    if start.lstrip()[:1] in (b"{", b"["):
        return JSON
    return next((kind for letters, kind in _STARTS.items() if start.startswith(letters)), "")


def content_of(path: Path) -> str:
    """Return what a file is as `kind_of` does, and of documents and statistics which."""
    kind = kind_of(path)
    try:
        if kind == JSON and path.stat().st_size <= _MAX_DOCUMENT_BYTES:
            document = parse_json(path.read_bytes())
            fields = document if isinstance(document, dict) else {}
            return next((what for field, what in _DOCUMENTS.items() if field in fields), kind)
        if kind == SAFETENSORS and "provenance" in (header := read_tensors_header(path)):
            return MOMENTS if "kind" in header else STATISTICS
    except (OSError, SafetensorError, KeyError, ValueError):
        pass  # damaged, or nobody's whom we know
    return kind


def folder_content(folder: Path) -> str:
    """Return what a folder of ours is that holds no model, with its article; empty where nothing is known of it."""
    contents = {RELEASE_NAME: "the folder of a release", PLAN_NAME: "the folder of a plan"}
    return next((f"{what} of dynquant" for name, what in contents.items() if (folder / name).is_file()), "")


def but_is(path: Path) -> str:
    """Return the end of a sentence that says what a file is not; empty where nothing is known of it."""
    content = content_of(path)
    return content and f", but {content}"


def refuse_other_kind(
    path: Path,
    kind: str,
    what: str,
    way_out: str = "",
    refusal: type[DynquantError] = CheckpointError,
) -> None:
    """Raise `refusal` for a file that is known to be of another kind than `what` is."""
    if (other := kind_of(path)) not in ("", kind):
        way_out = way_out or ("Fetch or make it again." if other == EMPTY else "Check which file you mean.")
        raise refusal(f"{path} is {content_of(path)}, not {what}. {way_out}")
